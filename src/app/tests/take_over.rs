//! `helios proxy --take-over` with real processes: one replaces the other, or is killed on the way.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use helios_testkit::pg::{PgOptions, PgServer};
use tokio_postgres::{Client, NoTls};

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
    fn start(folder: &Path) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_helios"))
            .arg("proxy")
            .arg("--config")
            .arg(folder.join("helios_proxy.toml"))
            .arg("--take-over")
            .arg(folder.join("take-over.sock"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }

    /// Waits for its end; whether it went well.
    async fn ended(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.success();
            }
            assert!(Instant::now() < deadline, "the process does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A free port; somebody else could take it before it is used, which does not happen in practice.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

async fn client(port: u16) -> Client {
    let conninfo = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres");
    let deadline = Instant::now() + PATIENCE;
    loop {
        match tokio_postgres::connect(&conninfo, NoTls).await {
            Ok((client, connection)) => {
                tokio::spawn(async move { connection.await.ok() });
                return client;
            }
            Err(e) => assert!(Instant::now() < deadline, "{e}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn pid(client: &Client) -> i32 {
    let asked = client.query_one("SELECT pg_backend_pid()", &[]).await;
    asked.unwrap().get(0)
}

/// Waits until a process listens for the next one.
async fn listens(folder: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while std::os::unix::net::UnixStream::connect(folder.join("take-over.sock")).is_err() {
        assert!(Instant::now() < deadline, "it does not listen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A server, and the configuration of a proxy in front of it.
async fn setup(folder: &Path) -> (PgServer, u16) {
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let port = free_port();
    let config = format!(
        "[proxy]\nlisten_address = \"127.0.0.1:{port}\"\nauth = \"trust\"\n\n\
         [observability]\nmetrics_enabled = false\n\n\
         [backends]\nservice_user = \"postgres\"\nservice_database = \"postgres\"\n\n\
         [[backends.instances]]\nname = \"one\"\nhost = \"{}\"\nport = {}\n",
        server.socket_dir().display(),
        server.port()
    );
    std::fs::write(folder.join("helios_proxy.toml"), config).unwrap();
    (server, port)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_is_replaced_and_no_client_notices() {
    let folder = tempfile::tempdir().unwrap();
    let (_server, port) = setup(folder.path()).await;
    let mut old = Process::start(folder.path());
    listens(folder.path()).await;
    let (idle, open) = (client(port).await, client(port).await);
    idle.batch_execute("SET work_mem = '3MB'").await.unwrap();
    let before = pid(&idle).await;
    open.batch_execute("BEGIN; CREATE TABLE t AS SELECT 1 AS v")
        .await
        .unwrap();
    for round in 0..2 {
        let mut new = Process::start(folder.path());
        assert_eq!(pid(&idle).await, before);
        if round == 0 {
            open.batch_execute("COMMIT").await.unwrap();
        }
        assert!(old.ended().await, "round {round}");
        assert!(new.0.try_wait().unwrap().is_none(), "round {round}");
        old = new;
        let row = idle.query_one("SHOW work_mem", &[]).await.unwrap();
        assert_eq!(row.get::<_, String>(0), "3MB");
        assert_eq!(pid(&idle).await, before);
        open.query_one("SELECT v FROM t", &[]).await.unwrap();
        listens(folder.path()).await;
    }
}

/// Killed at some moment of its start or of the take-over: whoever has not been taken goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_process_that_is_killed_leaves_clients_with_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let (_server, port) = setup(folder.path()).await;
    let mut old = Process::start(folder.path());
    listens(folder.path()).await;
    // In a transaction: it stays until the new one is gone.
    let open = client(port).await;
    open.batch_execute("BEGIN").await.unwrap();
    let before = pid(&open).await;
    for millis in [0, 5, 10, 20, 30, 50, 80, 150, 400] {
        let new = Process::start(folder.path());
        tokio::time::sleep(Duration::from_millis(millis)).await;
        drop(new);
        assert_eq!(pid(&open).await, before, "after {millis} ms");
        client(port).await.batch_execute("SELECT 1").await.unwrap();
    }
    open.batch_execute("COMMIT").await.unwrap();
    assert!(old.0.try_wait().unwrap().is_none());
    let _new = Process::start(folder.path());
    assert!(old.ended().await);
    assert_eq!(pid(&open).await, before);
}
