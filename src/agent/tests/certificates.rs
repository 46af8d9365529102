//! Certificates that change under a running agent and its PostgreSQL server.

#![allow(clippy::unwrap_used, clippy::panic)] // a test fails by panicking

mod common;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{LIMIT, Node, config, folder, wait_for};
use helios_agent::{AgentConfig, Network, ServerTls};
use helios_api::agent::AgentCommand;
use helios_control::{ControlClient, LOOK_EVERY, Live, Material, PostgresTls, TlsFiles};
use hyper::Method;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config};

const INSTANCE: &str = "a";
const OPERATOR: &str = "operator.helios";

struct Authority(CertifiedIssuer<'static, KeyPair>);

struct Pair {
    certificate: String,
    key: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    fn issue(&self, name: &str) -> Pair {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "helios");
        let key = KeyPair::generate().unwrap();
        Pair {
            certificate: params.signed_by(&key, &self.0).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }

    /// Somebody who believes this authority only, and has its certificate.
    fn operator(&self) -> Live {
        let pair = self.issue(OPERATOR);
        let material = Material::from_pem(
            self.0.pem().as_bytes(),
            pair.certificate.as_bytes(),
            pair.key.as_bytes(),
        );
        Live::new(&material.unwrap()).unwrap()
    }
}

/// A folder as the kubelet makes it of a Secret.
struct Volume {
    dir: PathBuf,
    version: usize,
}

impl Volume {
    fn new(base: &Path) -> Self {
        let dir = base.join("tls");
        std::fs::create_dir(&dir).unwrap();
        for name in ["ca.crt", "tls.crt", "tls.key"] {
            let file = Path::new("..data").join(name);
            std::os::unix::fs::symlink(file, dir.join(name)).unwrap();
        }
        Self { dir, version: 0 }
    }

    fn put(&mut self, config: &AgentConfig, authorities: &str, pair: &Pair) {
        use std::os::unix::fs::PermissionsExt as _;
        self.version += 1;
        let folder = format!("..version-{}", self.version);
        std::fs::create_dir(self.dir.join(&folder)).unwrap();
        for (name, text) in [
            ("ca.crt", authorities),
            ("tls.crt", &pair.certificate),
            ("tls.key", &pair.key),
        ] {
            let file = self.dir.join(&folder).join(name);
            std::fs::write(&file, text).unwrap();
            let rights = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(&file, rights).unwrap();
            if let Some(user) = &config.run_as {
                std::os::unix::fs::chown(&file, Some(user.uid), Some(user.gid)).unwrap();
            }
        }
        let new = self.dir.join("..data_tmp");
        std::os::unix::fs::symlink(&folder, &new).unwrap();
        std::fs::rename(&new, self.dir.join("..data")).unwrap();
    }
}

fn free() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// An agent as it runs in a Pod.
fn in_a_pod(base: &Path, tls: &Path) -> AgentConfig {
    let mut config = config(base, INSTANCE);
    config.port = free().port();
    config.listen_addresses = vec!["127.0.0.1".to_owned()];
    config.hba = vec![
        "local all all trust".to_owned(),
        "hostssl all helios all cert".to_owned(),
    ];
    let files = TlsFiles {
        ca: tls.join("ca.crt"),
        certificate: tls.join("tls.crt"),
        key: tls.join("tls.key"),
    };
    config.tls = Some(ServerTls {
        certificate: files.certificate.clone(),
        key: files.key.clone(),
        client_ca: Some(files.ca.clone()),
    });
    config.network = Some(Network {
        control: free(),
        probes: free(),
        tls: files,
    });
    config
}

async fn sql(config: &AgentConfig, as_: &Live) -> Result<Client, tokio_postgres::Error> {
    let tls = PostgresTls::new(INSTANCE, as_).unwrap();
    let mut to = Config::new();
    to.host("127.0.0.1")
        .port(config.port)
        .user("helios")
        .dbname("postgres")
        .ssl_mode(SslMode::Require)
        .connect_timeout(LIMIT);
    let (client, connection) = to.connect(tls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn orders(config: &AgentConfig, as_: &Live) -> bool {
    let address = config.network.as_ref().unwrap().control;
    let client = ControlClient::new(address, INSTANCE, as_).unwrap();
    let asked = client.call(Method::GET, "/v1/state", Vec::new(), LIMIT);
    asked.await.is_ok_and(|(status, _)| status.is_success())
}

/// Whether both ports take and are believed by whoever holds this.
async fn serves(config: &AgentConfig, as_: &Live) -> (bool, bool) {
    (orders(config, as_).await, sql(config, as_).await.is_ok())
}

async fn backend(client: &Client) -> i32 {
    let row = client.query_one("select pg_backend_pid()", &[]).await;
    row.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_and_server_take_new_certificates_without_a_restart() {
    let dir = folder();
    let mut volume = Volume::new(dir.path());
    let config = in_a_pod(dir.path(), &volume.dir);
    let (first, second) = (Authority::new("first"), Authority::new("second"));
    let both = format!("{}{}", first.0.pem(), second.0.pem());
    let (old, new) = (first.operator(), second.operator());
    volume.put(&config, &first.0.pem(), &first.issue(INSTANCE));
    let node = Node::run(config.clone()).await;
    node.command(1, AgentCommand::Bootstrap).await;
    assert_eq!(serves(&config, &old).await, (true, true));
    assert_eq!(serves(&config, &new).await, (false, false));
    let postmaster = node.postmaster();
    let session = sql(&config, &old).await.unwrap();
    let own = backend(&session).await;

    // Another authority's certificate, and both are believed.
    volume.put(&config, &both, &second.issue(INSTANCE));
    wait_for(|| async { serves(&config, &new).await == (true, true) }).await;
    // Who believes the first one only sees that it is another one's now.
    assert_eq!(serves(&config, &old).await, (false, false));

    // A pair that is none: both go on with what they have.
    let mixed = Pair {
        key: first.issue(INSTANCE).key,
        ..first.issue(INSTANCE)
    };
    volume.put(&config, &both, &mixed);
    tokio::time::sleep(LOOK_EVERY + Duration::from_secs(2)).await;
    assert_eq!(serves(&config, &new).await, (true, true));

    // Then the first authority is believed no more.
    let again = second.issue(INSTANCE);
    volume.put(&config, &second.0.pem(), &again);
    // Its certificate on the client's side, who believes the second one.
    let pair = first.issue(OPERATOR);
    let theirs = Material::from_pem(
        both.as_bytes(),
        pair.certificate.as_bytes(),
        pair.key.as_bytes(),
    );
    let theirs = Live::new(&theirs.unwrap()).unwrap();
    wait_for(|| async { serves(&config, &theirs).await == (false, false) }).await;
    assert_eq!(serves(&config, &new).await, (true, true));

    // The session of the beginning goes on, and it is the same server.
    assert_eq!(backend(&session).await, own);
    assert_eq!(node.postmaster(), postmaster);
}
