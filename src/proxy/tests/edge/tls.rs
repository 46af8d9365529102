//! TLS on both sides, channel binding, certificates of clients.

use std::process::Command;
use std::sync::Arc;

use helios_api::{Endpoint, Host};
use helios_proxy::auth::AuthMethod;
use helios_proxy::backend::{BackendError, Credentials, connect};
use helios_proxy::tls::{BackendTls, CertificateFiles, ServerTls, SslMode};
use helios_testkit::pg::as_server_user;
use helios_testkit::{PgOptions, PgServer};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::{Authority, Edge, LIMIT, PASSWORD, Setup, login, tcp};

async fn tls_server(authority: &Authority) -> PgServer {
    let files = authority.issue("server", &["127.0.0.1"]);
    let options = PgOptions::default()
        .hba("local all all trust")
        .hba("hostssl all all 127.0.0.1/32 scram-sha-256")
        .config("ssl = on")
        .config(format!("ssl_cert_file = '{}'", files.certificate.display()))
        .config(format!("ssl_key_file = '{}'", files.key.display()))
        .password(PASSWORD);
    PgServer::start(options).await.unwrap()
}

#[tokio::test]
async fn sslmode_means_what_libpq_means() {
    let authority = Authority::new();
    let stranger = Authority::new();
    let server = tls_server(&authority).await;
    let (root, wrong) = (authority.root(), stranger.root());
    let own_root = authority.dir.path().join("server.crt");
    let named = Endpoint {
        host: Host::Tcp("localhost".to_owned()),
        ..tcp(&server)
    };
    use SslMode::{Disable, Prefer, Require, VerifyCa, VerifyFull};
    let cases = [
        (Disable, None, tcp(&server), false),
        (Prefer, None, tcp(&server), true),
        // Not checked, as in libpq.
        (Prefer, Some(&wrong), tcp(&server), true),
        (Require, None, tcp(&server), true),
        (Require, Some(&root), tcp(&server), true),
        (Require, Some(&wrong), tcp(&server), false),
        (VerifyCa, Some(&root), tcp(&server), true),
        (VerifyCa, Some(&wrong), tcp(&server), false),
        (VerifyCa, Some(&root), named.clone(), true),
        (VerifyFull, Some(&root), tcp(&server), true),
        (VerifyFull, Some(&root), named.clone(), false),
        (VerifyFull, Some(&wrong), tcp(&server), false),
        // The server's own certificate as the root.
        (VerifyFull, Some(&own_root), tcp(&server), true),
        (VerifyFull, Some(&own_root), named, false),
    ];
    let login = login("postgres", Credentials::Password(PASSWORD.into()));
    for (mode, root, endpoint, works) in cases {
        let tls = BackendTls::new(mode, root.map(|r| r.as_path()), None).unwrap();
        let done = connect(&endpoint, &tls, &login, LIMIT).await;
        assert_eq!(done.is_ok(), works, "{mode:?} {root:?} {endpoint} {done:?}");
        if let Ok(conn) = done {
            assert!(conn.stream.is_tls(), "{mode:?}");
        }
    }
    assert!(BackendTls::new(VerifyFull, None, None).is_err());
    let missing = std::path::Path::new("/nowhere/root.crt");
    let error = BackendTls::new(VerifyFull, Some(missing), None).unwrap_err();
    assert!(error.to_string().contains("/nowhere/root.crt"), "{error}");
}

#[tokio::test]
async fn a_server_without_tls_is_refused_where_tls_is_required() {
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let login = login("postgres", Credentials::None);
    let tls = BackendTls::new(SslMode::Require, None, None).unwrap();
    match connect(&tcp(&server), &tls, &login, LIMIT).await {
        Err(BackendError::Protocol { why, .. }) => assert!(why.contains("TLS"), "{why}"),
        other => panic!("{other:?}"),
    }
    let tls = BackendTls::new(SslMode::Prefer, None, None).unwrap();
    let conn = connect(&tcp(&server), &tls, &login, LIMIT).await.unwrap();
    assert!(!conn.stream.is_tls());
    // Unix sockets have no TLS, whatever the mode.
    let socket = Endpoint {
        host: Host::Unix(server.socket_dir().to_owned()),
        port: server.port(),
    };
    let tls = BackendTls::new(SslMode::Require, None, None).unwrap();
    assert!(connect(&socket, &tls, &login, LIMIT).await.is_ok());
}

#[tokio::test]
async fn tls_and_channel_binding_on_both_sides() {
    let authority = Authority::new();
    let server = tls_server(&authority).await;
    let mut setup = Setup::new(&server);
    let files = authority.issue("proxy", &["127.0.0.1"]);
    setup.tls = Some(ServerTls::new(&files, None).unwrap());
    setup.backend_tls =
        BackendTls::new(SslMode::VerifyFull, Some(&authority.root()), None).unwrap();
    let edge = Edge::start(setup).await;
    // libpq checks our certificate and insists on channel binding; the same login goes on to the
    // server, bound to the server's certificate.
    let psql = |settings: &str| {
        let mut psql = as_server_user(Command::new("psql"));
        let sql = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
        // No settings or certificates of whoever runs the tests.
        psql.env("PGPASSWORD", PASSWORD)
            .env("HOME", "/")
            .args(["-XAtc", sql]);
        psql.arg(format!(
            "host=127.0.0.1 port={} user=postgres dbname=postgres {settings}",
            edge.port
        ));
        tokio::task::spawn_blocking(move || psql.output().unwrap())
    };
    let root = authority.root();
    let checked = format!("sslmode=verify-full sslrootcert={}", root.display());
    for settings in [
        format!("{checked} channel_binding=require"),
        format!("{checked} channel_binding=disable"),
        "sslmode=disable".to_owned(),
    ] {
        let done = psql(&settings).await.unwrap();
        let (out, err) = (
            done.stdout,
            String::from_utf8_lossy(&done.stderr).into_owned(),
        );
        assert_eq!(String::from_utf8_lossy(&out), "t\n", "{settings}: {err}");
    }
    let unbound = psql("sslmode=disable channel_binding=require")
        .await
        .unwrap();
    assert!(!unbound.status.success());
    // Our own client, with the password and with captured keys' mechanism.
    let tls = BackendTls::new(SslMode::VerifyFull, Some(&root), None).unwrap();
    let own = login("postgres", Credentials::Password(PASSWORD.into()));
    let conn = connect(&edge.endpoint(), &tls, &own, LIMIT).await.unwrap();
    assert!(conn.stream.is_tls());
}

#[tokio::test]
async fn tls_can_be_made_a_duty() {
    let authority = Authority::new();
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let mut setup = Setup::new(&server);
    setup.auth = AuthMethod::Trust;
    let files = authority.issue("proxy", &["127.0.0.1"]);
    setup.tls = Some(ServerTls::new(&files, None).unwrap());
    setup.tls_required = true;
    setup.login_timeout = std::time::Duration::from_secs(2);
    setup.unix_dir = Some(authority.dir.path().to_owned());
    let edge = Edge::start(setup).await;
    let psql = async |host: &str, sslmode: &str| {
        let mut psql = as_server_user(Command::new("psql"));
        psql.env("HOME", "/")
            .args(["-XAtc", "select 42"])
            .arg(format!(
                "host={host} port={} user=postgres sslmode={sslmode}",
                edge.port
            ));
        let done = tokio::task::spawn_blocking(move || psql.output().unwrap());
        let done = done.await.unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        if done.status.success() {
            text(&done.stdout)
        } else {
            text(&done.stderr)
        }
    };
    let refused = psql("127.0.0.1", "disable").await;
    assert!(
        refused.contains("FATAL:  connections without TLS are not allowed")
            && refused.contains("HINT:  connect with sslmode=require or a stronger one"),
        "{refused}"
    );
    for sslmode in ["allow", "prefer", "require"] {
        assert_eq!(psql("127.0.0.1", sslmode).await, "42\n", "{sslmode}");
    }
    // There is no wire that somebody could listen to.
    let dir = authority.dir.path().display().to_string();
    assert_eq!(psql(&dir, "disable").await, "42\n");
    // One that stops inside of its TLS handshake: no word in the clear would be understood.
    let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", edge.port))
        .await
        .unwrap();
    socket.write_all(&[0x16, 3, 1]).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(LIMIT, socket.read_to_end(&mut answer))
        .await
        .unwrap();
    assert_eq!(answer, b"");
}

#[tokio::test]
async fn certificates_of_clients() {
    let authority = Authority::new();
    let stranger = Authority::new();
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let mut setup = Setup::new(&server);
    setup.auth = AuthMethod::Cert;
    let files = authority.issue("proxy", &["127.0.0.1"]);
    setup.tls = Some(ServerTls::new(&files, Some(&authority.root())).unwrap());
    let edge = Edge::start(setup).await;
    let attempt = async |files: Option<&helios_proxy::tls::CertificateFiles>, user: &str| {
        let root = authority.root();
        let tls = BackendTls::new(SslMode::VerifyFull, Some(&root), files).unwrap();
        let login = login(user, Credentials::None);
        match connect(&edge.endpoint(), &tls, &login, LIMIT).await {
            Ok(_) => "ok".to_owned(),
            Err(BackendError::Refused { fields, .. }) => fields.to_string(),
            Err(other) => format!("{other:?}"),
        }
    };
    let postgres = authority.issue("postgres", &[]);
    assert_eq!(attempt(Some(&postgres), "postgres").await, "ok");
    assert_eq!(
        attempt(Some(&postgres), "ann").await,
        "FATAL 28000: certificate authentication failed for user \"ann\""
    );
    assert_eq!(
        attempt(None, "postgres").await,
        "FATAL 28000: connection requires a valid client certificate"
    );
    let forged = stranger.issue("postgres", &[]);
    assert!(attempt(Some(&forged), "postgres").await.starts_with("Io"));
}

#[tokio::test]
async fn direct_tls_needs_alpn() {
    let authority = Authority::new();
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let mut setup = Setup::new(&server);
    setup.auth = AuthMethod::Trust;
    let files = authority.issue("proxy", &["127.0.0.1"]);
    setup.tls = Some(ServerTls::new(&files, None).unwrap());
    let edge = Edge::start(setup).await;
    let root = CertificateDer::from_pem_file(authority.root()).unwrap();
    for (alpn, works) in [(Some(b"postgresql".to_vec()), true), (None, false)] {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(
            rustls::crypto::ring::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
        config.alpn_protocols = alpn.into_iter().collect();
        let socket = tokio::net::TcpStream::connect(("127.0.0.1", edge.port));
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let mut stream = connector
            .connect(name, socket.await.unwrap())
            .await
            .unwrap();
        let mut startup = bytes::BytesMut::new();
        let params = [("user", "postgres")];
        helios_wire::startup::startup_message(&mut startup, 0, params).unwrap();
        let _ = stream.write_all(&startup).await;
        let mut first = [0];
        let got = stream.read(&mut first).await;
        assert_eq!(matches!(got, Ok(1)) && first == *b"R", works);
    }
}

/// Files that are replaced while they are used: what clients are shown, and what we show servers.
#[tokio::test]
async fn files_are_looked_at_again() {
    let (first, second) = (Authority::new(), Authority::new());
    let server = tls_server(&first).await;
    let mut setup = Setup::new(&server);
    let files = first.issue("proxy", &["127.0.0.1"]);
    setup.tls = Some(ServerTls::new(&files, None).unwrap());
    setup.backend_tls = BackendTls::new(SslMode::VerifyFull, Some(&first.root()), None).unwrap();
    let (shown, towards) = (setup.tls.clone().unwrap(), setup.backend_tls.clone());
    let edge = Edge::start(setup).await;
    // With channel binding: the proof is bound to the certificate that was shown.
    let believing = |authority: &Authority| {
        let tls = BackendTls::new(SslMode::VerifyFull, Some(&authority.root()), None).unwrap();
        let own = login("postgres", Credentials::Password(PASSWORD.into()));
        let endpoint = edge.endpoint();
        async move { connect(&endpoint, &tls, &own, LIMIT).await }
    };
    let mut before = believing(&first).await.unwrap();
    assert!(believing(&second).await.is_err());
    assert!(!shown.look(), "nothing has changed");

    let replace = |by: &CertificateFiles, with_key: bool| {
        std::fs::copy(&by.certificate, &files.certificate).unwrap();
        if with_key {
            std::fs::copy(&by.key, &files.key).unwrap();
        }
    };
    let new = second.issue("proxy", &["127.0.0.1"]);
    // Not its key: what was there before stays.
    replace(&new, false);
    assert!(!shown.look());
    assert!(believing(&first).await.is_ok());
    std::fs::write(&files.key, "no key").unwrap();
    assert!(!shown.look());
    assert!(believing(&first).await.is_ok());

    replace(&new, true);
    assert!(shown.look());
    assert!(believing(&first).await.is_err());
    let after = believing(&second).await.unwrap();
    assert!(after.stream.is_tls());
    // The session of before goes on.
    before
        .stream
        .write_all(b"Q\0\0\0\x0dselect 1\0")
        .await
        .unwrap();
    let mut answer = [0; 1];
    before.stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, *b"T");

    // Towards the server: another root, then none at all, then the first one again.
    let root = std::fs::read(first.root()).unwrap();
    std::fs::copy(second.root(), first.root()).unwrap();
    assert!(towards.look());
    assert!(
        believing(&second).await.is_err(),
        "the server is not believed"
    );
    std::fs::write(first.root(), "").unwrap();
    assert!(!towards.look());
    std::fs::write(first.root(), root).unwrap();
    assert!(towards.look());
    assert!(believing(&second).await.is_ok());
}
