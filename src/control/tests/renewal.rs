//! Certificates that change under a running control server and client, over real sockets.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use helios_control::{CallError, ControlClient, Live, Material, TlsFiles, serve};
use hyper::Method;
use rcgen::{CertificateParams, CertifiedIssuer, DnType, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(20);
/// How often files are looked at here.
const EVERY: Duration = Duration::from_millis(10);
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
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    fn issue(&self, name: &str) -> Pair {
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        Pair {
            certificate: params.signed_by(&key, &self.0).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }
}

/// A folder as the kubelet makes it of a Secret: the files are links into a folder of their version,
/// by way of one link, which is replaced.
struct Volume {
    dir: tempfile::TempDir,
    version: usize,
}

impl Volume {
    fn new(authorities: &str, pair: &Pair) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["ca.crt", "tls.crt", "tls.key"] {
            let file = Path::new("..data").join(name);
            std::os::unix::fs::symlink(file, dir.path().join(name)).unwrap();
        }
        let mut volume = Self { dir, version: 0 };
        volume.put(authorities, pair);
        volume
    }

    fn put(&mut self, authorities: &str, pair: &Pair) {
        self.version += 1;
        let root = self.dir.path();
        let folder = PathBuf::from(format!("..version-{}", self.version));
        std::fs::create_dir(root.join(&folder)).unwrap();
        for (name, text) in [
            ("ca.crt", authorities),
            ("tls.crt", &pair.certificate),
            ("tls.key", &pair.key),
        ] {
            std::fs::write(root.join(&folder).join(name), text).unwrap();
        }
        let new = root.join("..data_tmp");
        std::os::unix::fs::symlink(&folder, &new).unwrap();
        std::fs::rename(&new, root.join("..data")).unwrap();
    }

    fn files(&self) -> TlsFiles {
        let file = |name: &str| self.dir.path().join(name);
        TlsFiles {
            ca: file("ca.crt"),
            certificate: file("tls.crt"),
            key: file("tls.key"),
        }
    }
}

/// A server whose `/v1/slow` answers when it is told to.
async fn start(
    certificates: &Live,
    stop: &CancellationToken,
) -> (SocketAddr, Arc<Notify>, Arc<Notify>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (begun, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, wait) = (Arc::clone(&begun), Arc::clone(&go));
    let slow = move || async move {
        tell.notify_one();
        wait.notified().await;
        "slow pong"
    };
    let router = Router::new()
        .route("/v1/ping", get(|| async { "pong" }))
        .route("/v1/slow", get(slow));
    serve(listener, router, certificates, OPERATOR, stop.clone());
    (address, begun, go)
}

async fn call(client: &ControlClient, path: &str) -> Result<String, CallError> {
    let (_, body) = client.call(Method::GET, path, Vec::new(), LIMIT).await?;
    Ok(String::from_utf8_lossy(&body).into_owned())
}

/// The certificate that a server shows to somebody who holds `pair`.
async fn shown(address: SocketAddr, authorities: &str, pair: &Pair) -> Vec<u8> {
    let mut roots = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(authorities.as_bytes()) {
        roots.add(root.unwrap()).unwrap();
    }
    let chain = vec![CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("pg-1").unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = connector.connect(name, stream).await.unwrap();
    let chain = stream.get_ref().1.peer_certificates().unwrap();
    chain.first().unwrap().to_vec()
}

fn der(pair: &Pair) -> Vec<u8> {
    CertificateDer::from_pem_slice(pair.certificate.as_bytes())
        .unwrap()
        .to_vec()
}

/// Waits until a server shows this.
async fn shows(address: SocketAddr, authorities: &str, operator: &Pair, wanted: &Pair) {
    let shown = async {
        while shown(address, authorities, operator).await != der(wanted) {
            tokio::time::sleep(EVERY).await;
        }
    };
    tokio::time::timeout(LIMIT, shown).await.unwrap();
}

fn material(authorities: &str, pair: &Pair) -> Material {
    Material::from_pem(
        authorities.as_bytes(),
        pair.certificate.as_bytes(),
        pair.key.as_bytes(),
    )
    .unwrap()
}

/// Waits until a client is let in by a server with these, and lets it be one.
async fn gets_on_with(client: &Live, authorities: &str, server: &Pair, stop: &CancellationToken) {
    let server = Live::new(&material(authorities, server)).unwrap();
    let (address, ..) = start(&server, stop).await;
    let client = ControlClient::new(address, "pg-1", client).unwrap();
    let getting = async {
        while call(&client, "/v1/ping").await.is_err() {
            tokio::time::sleep(EVERY).await;
        }
    };
    tokio::time::timeout(LIMIT, getting).await.unwrap();
}

/// The authority is replaced as the operator does it, under a server and a client that go on.
#[tokio::test]
async fn an_authority_is_replaced_under_a_running_server_and_client() {
    let stop = CancellationToken::new();
    let (first, second) = (Authority::new("first"), Authority::new("second"));
    let (a, b) = (first.0.pem(), second.0.pem());
    let both = format!("{a}{b}");
    let (server_1, operator_1) = (first.issue("pg-1"), first.issue(OPERATOR));
    let mut at_server = Volume::new(&a, &server_1);
    let mut at_client = Volume::new(&a, &operator_1);
    let follow = |volume: &Volume| Live::follow(&volume.files(), EVERY, stop.clone()).unwrap();
    let (server, operator) = (follow(&at_server), follow(&at_client));
    let (address, begun, go) = start(&server, &stop).await;
    let client = ControlClient::new(address, "pg-1", &operator).unwrap();
    assert_eq!(call(&client, "/v1/ping").await.unwrap(), "pong");

    // A request that is under way all the time.
    let slow = tokio::spawn({
        let client = client.clone();
        async move { call(&client, "/v1/slow").await }
    });
    tokio::time::timeout(LIMIT, begun.notified()).await.unwrap();

    // Both believe both; then the server's certificate is renewed, then the client's.
    at_server.put(&both, &server_1);
    at_client.put(&both, &operator_1);
    let (server_2, operator_2) = (second.issue("pg-1"), second.issue(OPERATOR));
    gets_on_with(&operator, &both, &server_2, &stop).await;
    at_server.put(&both, &server_2);
    shows(address, &both, &operator_1, &server_2).await;
    // The client has not changed its own, and both of them are let in.
    for _ in 0..20 {
        assert_eq!(call(&client, "/v1/ping").await.unwrap(), "pong");
    }
    at_client.put(&both, &operator_2);
    gets_on_with(&operator, &b, &server_2, &stop).await;
    shows(address, &b, &operator_2, &server_2).await;

    // The first authority is believed no more: who holds its certificates is not let in.
    at_server.put(&b, &server_2);
    at_client.put(&b, &operator_2);
    let old = Live::new(&material(&both, &operator_1)).unwrap();
    let old = ControlClient::new(address, "pg-1", &old).unwrap();
    let refused = async {
        while call(&old, "/v1/ping").await.is_ok() {
            tokio::time::sleep(EVERY).await;
        }
    };
    tokio::time::timeout(LIMIT, refused).await.unwrap();
    assert_eq!(call(&client, "/v1/ping").await.unwrap(), "pong");

    // What began with the first certificates ends as if nothing had been.
    go.notify_one();
    assert_eq!(slow.await.unwrap().unwrap(), "slow pong");
    stop.cancel();
}

#[tokio::test]
async fn what_does_not_fit_or_is_a_strangers_changes_nothing() {
    let stop = CancellationToken::new();
    let (ours, stranger) = (Authority::new("ours"), Authority::new("ours"));
    let ca = ours.0.pem();
    let (first, operator) = (ours.issue("pg-1"), ours.issue(OPERATOR));
    let mut volume = Volume::new(&ca, &first);
    let live = Live::follow(&volume.files(), EVERY, stop.clone()).unwrap();
    let (address, ..) = start(&live, &stop).await;
    assert_eq!(shown(address, &ca, &operator).await, der(&first));

    // Another pair's key, no key, no certificate, no authority.
    let other = ours.issue("pg-1");
    let with = |certificate: &str, key: &str| Pair {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
    };
    for (authorities, pair) in [
        (&*ca, with(&other.certificate, &first.key)),
        (&*ca, with(&other.certificate, "")),
        (
            &*ca,
            with("-----BEGIN CERTIFICATE-----\nbroken", &other.key),
        ),
        ("", with(&other.certificate, &other.key)),
    ] {
        volume.put(authorities, &pair);
        tokio::time::sleep(10 * EVERY).await;
        assert_eq!(shown(address, &ca, &operator).await, der(&first));
        let error = Material::load(&volume.files()).unwrap_err().to_string();
        let folder = volume.dir.path().display().to_string();
        assert!(error.contains(&folder), "{error}");
    }
    // Files that are gone.
    std::fs::remove_file(volume.dir.path().join("..data")).unwrap();
    tokio::time::sleep(10 * EVERY).await;
    assert_eq!(shown(address, &ca, &operator).await, der(&first));

    volume.put(&ca, &other);
    shows(address, &ca, &operator, &other).await;
    // An authority of the same name is another one all the same.
    let theirs = stranger.issue(OPERATOR);
    let live = Live::new(&material(&ca, &theirs)).unwrap();
    let client = ControlClient::new(address, "pg-1", &live).unwrap();
    let refused = call(&client, "/v1/ping").await;
    assert!(
        matches!(
            refused,
            Err(CallError::Unreachable { .. } | CallError::Broken { .. })
        ),
        "{refused:?}"
    );
    stop.cancel();
}
