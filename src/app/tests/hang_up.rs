//! `helios proxy` with a real process that is told (SIGHUP) that its certificate was renewed.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use helios_testkit::pg::{PgOptions, PgServer, as_server_user};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio_postgres::NoTls;

/// What a step may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);

/// A proxy's process; killed on drop.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn start(config: &Path) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_helios"))
            .arg("proxy")
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }

    fn hang_up(&self) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        kill(pid, Signal::SIGHUP).unwrap();
    }
}

/// Makes a certificate that is its own authority, in place of the one that is there.
fn renew(folder: &Path) -> PathBuf {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(folder.join("tls.key"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(folder.join("tls.crt"), made.cert.pem()).unwrap();
    // A copy for a client to go by.
    let root = tempfile::Builder::new().suffix(".crt").tempfile_in(folder);
    let (mut file, path) = root.unwrap().keep().unwrap();
    std::io::Write::write_all(&mut file, made.cert.pem().as_bytes()).unwrap();
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(&path, readable).unwrap();
    path
}

/// Whether a client that believes this certificate gets in.
async fn believes(port: u16, root: &Path) -> bool {
    let mut psql = as_server_user(Command::new("psql"));
    psql.env("HOME", "/")
        .args(["-XAtc", "select 42"])
        .arg(format!(
            "host=127.0.0.1 port={port} user=postgres sslmode=verify-ca sslrootcert={}",
            root.display()
        ));
    let done = tokio::task::spawn_blocking(move || psql.output().unwrap());
    done.await.unwrap().status.success()
}

async fn until(port: u16, root: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while !believes(port, root).await {
        assert!(Instant::now() < deadline, "the certificate is not shown");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_hung_up_on_shows_its_new_certificate() {
    let folder = helios_testkit::pg::server_dir("helios-hup-").unwrap();
    let folder = folder.path();
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let port = helios_testkit::net::free_port().unwrap();
    let file = |name: &str| folder.join(name).display().to_string();
    let config = format!(
        "[proxy]\nlisten_address = \"127.0.0.1:{port}\"\nauth = \"trust\"\n\
         tls_cert = \"{}\"\ntls_key = \"{}\"\n\n\
         [observability]\nmetrics_enabled = false\n\n\
         [backends]\nservice_user = \"postgres\"\nservice_database = \"postgres\"\n\n\
         [[backends.instances]]\nname = \"one\"\nhost = \"{}\"\nport = {}\n",
        file("tls.crt"),
        file("tls.key"),
        server.socket_dir().display(),
        server.port()
    );
    let path = folder.join("helios_proxy.toml");
    std::fs::write(&path, config).unwrap();
    let first = renew(folder);
    let process = Process::start(&path);
    until(port, &first).await;
    let conninfo = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres");
    let (session, connection) = tokio_postgres::connect(&conninfo, NoTls).await.unwrap();
    tokio::spawn(connection);

    let second = renew(folder);
    // It looks when it is told to.
    assert!(believes(port, &first).await && !believes(port, &second).await);
    process.hang_up();
    until(port, &second).await;
    assert!(!believes(port, &first).await);

    // One that is none: the one before stays.
    std::fs::write(folder.join("tls.key"), "no key").unwrap();
    process.hang_up();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(believes(port, &second).await);
    let row = session.query_one("select 42", &[]).await.unwrap();
    assert_eq!(row.get::<_, i32>(0), 42);
}
