//! What a cluster starts from, on a real Kubernetes: the user's SQL, and a copy of a running server.
//! Judged by what the database holds and by what people are told.

use helios_e2e::kube::Namespace;
use helios_e2e::ledger::connect;
use helios_e2e::{Result, Shown};
use serde_json::Value;

use super::{UP, client, client_of, condition, is_ready, sample, text};

/// Runs SQL as the superuser on an instance.
pub(super) async fn psql(space: &Namespace, pod: &str, sql: &str) -> Result<String> {
    let args = [
        "exec",
        pod,
        "-c",
        "postgres",
        "--",
        "psql",
        "-h",
        "/run/helios/pg",
        "-U",
        "helios",
        "-d",
        "postgres",
        "-v",
        "ON_ERROR_STOP=1",
        "-Atc",
        sql,
    ];
    space.kubectl(&args).await
}

fn bootstrapped(object: &Value) -> bool {
    condition(object, "Bootstrapped")["status"] == "True"
}

/// Waits until somebody is told this, in the condition and in an Event.
async fn is_told(space: &Namespace, reason: &str, says: &str) -> Result<()> {
    let told = |o: &Value| {
        let condition = condition(o, "Bootstrapped");
        condition["reason"] == reason && text(condition, "/message").contains(says)
    };
    let object = space.until("hc", "pg", UP, told).await?;
    println!("{}", text(condition(&object, "Bootstrapped"), "/message"));
    let deadline = std::time::Instant::now() + UP;
    loop {
        let events = space.kubectl(&["get", "events", "-o", "json"]).await?;
        if events.contains(reason) {
            return Ok(());
        }
        if std::time::Instant::now() > deadline {
            return Err(format!("no Event says {reason}").into());
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn sql_of_the_users_is_run_once_and_its_failure_is_told() -> std::result::Result<(), Shown> {
    Ok(scripted().await?)
}

async fn scripted() -> Result<()> {
    let space = Namespace::create("bootstrap-sql").await?;
    helios_e2e::node::recycle_volumes().await?;
    let minimal = sample("minimal")?;
    let bootstrap = "  bootstrap:\n    initdb:\n      sql: [create table made (n int)]\n      \
                     sqlFrom: {configMap: {name: schema, key: more}}\n";
    space.apply(&format!("{minimal}{bootstrap}")).await?;
    is_told(&space, "DatabaseFailed", "ConfigMap \"schema\"").await?;
    let map = |sql: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: schema}}\ndata: {{more: \"{sql}\"}}\n"
        )
    };
    space
        .apply(&map("insert into made values (1), ('x')"))
        .await?;
    is_told(&space, "DatabaseFailed", "invalid input syntax").await?;
    space.apply(&map("insert into made values (1)")).await?;
    let up = |o: &Value| bootstrapped(o) && is_ready(o);
    space.until("hc", "pg", UP, up).await?;
    let sql = connect(&client(&space).await?).await?;
    let row = sql.query_one("select count(*) from made", &[]).await?;
    assert_eq!(row.get::<_, i64>(0), 1);
    // The application's own: it was run as its role.
    sql.execute("insert into made values (2)", &[]).await?;
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_running_server_is_copied_and_what_keeps_it_from_that_is_told()
-> std::result::Result<(), Shown> {
    Ok(copied().await?)
}

async fn copied() -> Result<()> {
    let space = Namespace::create("bootstrap-copy").await?;
    helios_e2e::node::recycle_volumes().await?;
    let minimal = sample("minimal")?;
    // Another cluster stands in for a server of somebody else's.
    let old = minimal.replace("name: pg", "name: old");
    let hba = "  instances: 1\n  postgresql:\n    pgHBA:\n      \
               - hostssl replication mover all scram-sha-256\n      \
               - host all all all scram-sha-256\n";
    space.apply(&format!("{old}{hba}")).await?;
    let up = |o: &Value| bootstrapped(o) && is_ready(o);
    space.until("hc", "old", UP, up).await?;
    let role = "create role mover replication login password 'right'";
    psql(&space, "old-1-0", role).await?;
    let sql = connect(&client_of(&space, "old").await?).await?;
    sql.batch_execute("create table kept (n int); insert into kept values (1), (2)")
        .await?;
    let service = space.get("service", "old-primary").await?;
    let address = text(&service, "/spec/clusterIP").to_owned();
    let secret = |password: &str| {
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: mover}}\nstringData: {{pw: {password}}}\n"
        )
    };
    space.apply(&secret("wrong")).await?;
    let source = format!(
        "  bootstrap:\n    baseBackup:\n      host: {address}\n      user: mover\n      \
         sslMode: require\n      passwordSecret: {{name: mover, key: pw}}\n"
    );
    space.apply(&format!("{minimal}{source}")).await?;
    is_told(
        &space,
        "FirstPrimaryFailed",
        "password authentication failed",
    )
    .await?;
    // A kubelet brings a changed Secret to its Pods within a minute or two.
    space.apply(&secret("right")).await?;
    space.until("hc", "pg", UP, up).await?;
    // With the new cluster's own password.
    let sql = connect(&client(&space).await?).await?;
    let row = sql.query_one("select count(*) from kept", &[]).await?;
    assert_eq!(row.get::<_, i64>(0), 2);
    sql.execute("insert into kept values (3)", &[]).await?;
    // The Secret has served its turn.
    space.kubectl(&["delete", "secret", "mover"]).await?;
    space.kubectl(&["delete", "pod", "pg-1-0"]).await?;
    let moved = |o: &Value| is_ready(o) && text(o, "/status/currentPrimary") == "pg-2";
    space.until("hc", "pg", UP, moved).await?;
    let sql = connect(&client(&space).await?).await?;
    let row = sql.query_one("select count(*) from kept", &[]).await?;
    assert_eq!(row.get::<_, i64>(0), 3);
    space.delete().await
}
