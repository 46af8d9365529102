//! A first data directory that is a copy of a server which knows nothing of helios: real servers.

#![allow(clippy::unwrap_used, clippy::panic)] // a test fails by panicking

mod common;

use std::path::Path;

use common::{FIRST, Node, folder, insert, shows};
use helios_agent::{AgentConfig, BaseBackup};
use helios_api::agent::{AgentCommand, Rejoin};
use helios_testkit::pg::{PgOptions, PgServer};

/// A server with a table `t`, a role that may copy it, and settings that are of no use elsewhere.
async fn old() -> PgServer {
    let options = PgOptions::default()
        .hba("local all all trust")
        .hba("host all postgres all trust")
        .hba("host replication mover all scram-sha-256")
        .config("archive_command = '/no/such/program'")
        .config("cluster_name = 'old'");
    let server = PgServer::start(options).await.unwrap();
    let sql = server.connect().await.unwrap();
    sql.batch_execute(
        "set password_encryption = 'scram-sha-256'; \
         create role mover replication login password 'it''s'; \
         create table t (n int); insert into t values (1)",
    )
    .await
    .unwrap();
    sql.batch_execute("alter system set work_mem = '9MB'")
        .await
        .unwrap();
    server
}

fn config(base: &Path, name: &str, old: &PgServer, password: &str) -> AgentConfig {
    let mut config = common::config(base, name);
    let file = base.join(format!("{name}.password"));
    std::fs::write(&file, format!("{password}\n")).unwrap();
    let options = [
        ("host", "127.0.0.1".to_owned()),
        ("port", old.port().to_string()),
        ("user", "mover".to_owned()),
        ("sslmode", "prefer".to_owned()),
    ];
    config.base_backup = Some(BaseBackup {
        options: options.map(|(name, value)| (name.to_owned(), value)).into(),
        password_file: Some(file),
    });
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_server_is_copied_and_its_copy_has_standbys() {
    let dir = folder();
    let old = old().await;
    let mut config = config(dir.path(), "a", &old, "it's");
    let volume = dir.path().join("a-wal");
    std::fs::create_dir(&volume).unwrap();
    if let Some(user) = &config.run_as {
        std::os::unix::fs::chown(&volume, Some(user.uid), Some(user.gid)).unwrap();
    }
    config.wal_dir = Some(volume.clone());
    let a = Node::run(config).await;
    a.command(1, AgentCommand::Bootstrap).await;
    shows(&a, &[1]).await;
    let link = std::fs::read_link(a.config.data_dir.join("pg_wal")).unwrap();
    assert!(link.starts_with(&volume), "{link:?}");
    // Nothing of the other server's settings.
    let sql = a.sql().await;
    for (name, value) in [("cluster_name", "a"), ("work_mem", "4MB")] {
        let row = sql.query_one(&format!("show {name}"), &[]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), value, "{name}");
    }
    // Again is no harm, and copies nothing.
    insert(&a, 2).await;
    a.command(1, AgentCommand::Bootstrap).await;
    let b = Node::start(dir.path(), "b").await;
    assert_eq!(b.follow(1, &a, &FIRST).await, Rejoin::Cloned);
    shows(&b, &[1, 2]).await;
    // The old one goes on by itself.
    let theirs = old.connect().await.unwrap();
    let row = theirs
        .query_one("select count(*) from t", &[])
        .await
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 1);
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_copied_is_said_and_leaves_nothing() {
    let dir = folder();
    let mut old = old().await;
    let refused = async |node: &Node, says: &str| {
        let refused = node.try_command(1, AgentCommand::Bootstrap).await;
        let error = refused.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
        assert!(!node.config.data_dir.exists());
    };
    let a = Node::run(config(dir.path(), "a", &old, "wrong")).await;
    refused(&a, "password authentication failed").await;
    let password = a.config.base_backup.as_ref().unwrap();
    std::fs::remove_file(password.password_file.as_ref().unwrap()).unwrap();
    refused(&a, "is its Secret there").await;
    a.stop().await;
    let b = Node::run(config(dir.path(), "b", &old, "it's")).await;
    old.crash();
    refused(&b, "could not reach the server to copy, 127.0.0.1:").await;
    // The cause is gone: the next attempt does it.
    old.boot().await.unwrap();
    b.command(1, AgentCommand::Bootstrap).await;
    shows(&b, &[1]).await;
    b.stop().await;
}
