//! A proxy that is nothing but its edge: it forwards bytes blindly once both sides are logged in.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use helios_api::{Endpoint, Host};
use helios_proxy::auth::{AuthMethod, VerifierCache};
use helios_proxy::backend::{self, BackendError, Credentials, Login};
use helios_proxy::listener::{Limits, Listener};
use helios_proxy::login::{Accepted, EdgeContext, accept};
use helios_proxy::tls::{BackendTls, CertificateFiles, ServerTls};
use helios_testkit::PgServer;
use helios_wire::message::back;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use tokio::io::AsyncWriteExt as _;
use tokio_util::sync::CancellationToken;

pub(crate) const LIMIT: Duration = Duration::from_secs(10);
pub(crate) const PASSWORD: &str = "pa'ss wörd";

/// How the edge under test is set up.
pub(crate) struct Setup {
    pub(crate) auth: AuthMethod,
    pub(crate) tls: Option<ServerTls>,
    pub(crate) tls_required: bool,
    pub(crate) backend_tls: BackendTls,
    pub(crate) backend: Endpoint,
    pub(crate) login_timeout: Duration,
    pub(crate) limits: Arc<Limits>,
    pub(crate) unix_dir: Option<PathBuf>,
}

impl Setup {
    pub(crate) fn new(server: &PgServer) -> Self {
        Self {
            auth: AuthMethod::ScramSha256,
            tls: None,
            tls_required: false,
            backend_tls: BackendTls::disabled(),
            backend: tcp(server),
            login_timeout: LIMIT,
            limits: Limits::new(100, None),
            unix_dir: None,
        }
    }
}

/// A running edge; stops on drop.
pub(crate) struct Edge {
    pub(crate) port: u16,
    pub(crate) context: Arc<EdgeContext>,
    stop: CancellationToken,
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Edge {
    pub(crate) async fn start(setup: Setup) -> Self {
        let service = login("postgres", Credentials::Password(PASSWORD.into()));
        let patience = Duration::from_millis(500);
        let verifiers = VerifierCache::new(service, setup.backend_tls.clone(), patience);
        verifiers.set_endpoint(Some(setup.backend.clone()));
        let context = Arc::new(EdgeContext {
            auth: setup.auth,
            tls: setup.tls,
            tls_required: setup.tls_required,
            verifiers: Arc::new(verifiers),
            limits: setup.limits.clone(),
            login_timeout: setup.login_timeout,
        });
        let listener = Listener::bind("127.0.0.1", 0, setup.unix_dir.as_deref());
        let listener = listener.await.unwrap();
        let port = listener.port();
        let stop = CancellationToken::new();
        let (ctx, backend, tls) = (context.clone(), setup.backend, setup.backend_tls);
        tokio::spawn(listener.run(setup.limits, stop.clone(), move |incoming| {
            let (ctx, backend, tls) = (ctx.clone(), backend.clone(), tls.clone());
            tokio::spawn(async move {
                if let Ok(accepted) = accept(incoming, &ctx).await {
                    serve(accepted, &backend, &tls).await;
                }
            });
        }));
        Self {
            port,
            context,
            stop,
        }
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint {
            host: Host::Tcp("127.0.0.1".to_owned()),
            port: self.port,
        }
    }

    pub(crate) fn conninfo(&self, user: &str, password: &str) -> String {
        let password = password.replace('\\', "\\\\").replace('\'', "\\'");
        format!(
            "host=127.0.0.1 port={} user={user} dbname=postgres password='{password}'",
            self.port
        )
    }
}

async fn serve(accepted: Accepted, endpoint: &Endpoint, tls: &BackendTls) {
    let mut client = match accepted {
        Accepted::Cancel {
            key,
            stream: _stream,
        } => {
            let _ = backend::cancel(endpoint, tls, key.pid, key.secret, LIMIT).await;
            return;
        }
        Accepted::Session(client) => client,
    };
    let mut greeting = BytesMut::new();
    let mut server = match backend::connect(endpoint, tls, &client.login, LIMIT).await {
        Ok(server) => server,
        Err(error) => {
            if let BackendError::Refused { frame, .. } = error {
                let _ = client.stream.write_all(&frame).await;
            }
            return;
        }
    };
    for (name, value) in &server.parameters {
        back::parameter_status(&mut greeting, name, value);
    }
    back::backend_key_data(&mut greeting, server.pid, &server.secret);
    back::ready_for_query(&mut greeting, b'I');
    let _ = client.stream.write_all(&greeting).await;
    let _ = client.stream.flush().await;
    let _ = server.stream.write_all(&client.buf).await;
    let _ = tokio::io::copy_bidirectional(&mut client.stream, &mut server.stream).await;
}

pub(crate) fn login(user: &str, credentials: Credentials) -> Login {
    Login {
        user: user.to_owned(),
        database: "postgres".to_owned(),
        params: vec![("application_name".to_owned(), "edge test".to_owned())],
        credentials,
    }
}

pub(crate) fn tcp(server: &PgServer) -> Endpoint {
    Endpoint {
        host: Host::Tcp("127.0.0.1".to_owned()),
        port: server.port(),
    }
}

/// An authority and certificates that it signs, in a folder that the server may read.
pub(crate) struct Authority {
    pub(crate) dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let dir = helios_testkit::pg::server_dir("helios-tls-").unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "test authority");
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        std::fs::write(dir.path().join("ca.crt"), pem).unwrap();
        let issuer = Issuer::new(params, key);
        Self { dir, issuer }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("ca.crt")
    }

    /// A certificate for this common name, valid for these alternative names.
    pub(crate) fn issue(&self, name: &str, alternatives: &[&str]) -> CertificateFiles {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = alternatives
            .iter()
            .map(|a| match a.parse() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName((*a).try_into().unwrap()),
            })
            .collect();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let files = CertificateFiles {
            certificate: self.dir.path().join(format!("{name}.crt")),
            key: self.dir.path().join(format!("{name}.key")),
        };
        std::fs::write(&files.certificate, certificate.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        // PostgreSQL and libpq insist on an owner and on nobody else reading it.
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
        let owner = std::fs::metadata(self.dir.path()).unwrap();
        std::os::unix::fs::chown(&files.key, Some(owner.uid()), Some(owner.gid())).unwrap();
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&files.key, private).unwrap();
        files
    }
}
