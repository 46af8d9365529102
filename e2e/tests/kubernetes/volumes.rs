//! Volumes on a real Kubernetes: the write-ahead log on one of its own, and clusters that are made again
//! over what was kept. Judged by what clients were
//! told and by what lies where.

use helios_e2e::kube::Namespace;
use helios_e2e::ledger::{Ledger, connect};
use helios_e2e::{Result, Shown};

use super::{MOVED, UP, client, condition, confirms, is_ready, sample, settled, text};

/// Clients with open transactions.
const WRITERS: i32 = 8;

/// Runs a shell command in an instance's container.
async fn shell(space: &Namespace, instance: &str, command: &str) -> Result<String> {
    let pod = format!("{instance}-0");
    let args = ["exec", &pod, "-c", "postgres", "--", "bash", "-c", command];
    space.kubectl(&args).await
}

/// The log lies on its volume and nowhere else.
async fn log_is_apart(space: &Namespace, instance: &str) -> Result<()> {
    let look = "set -e; readlink /var/lib/helios/pg/data/pg_wal; \
                find /var/lib/helios/pg -name '0000*' -size +500k | wc -l; \
                ls /var/lib/helios-wal/pg | wc -l";
    let found = shell(space, instance, look).await?;
    let lines: Vec<&str> = found.lines().map(str::trim).collect();
    assert!(lines[0].starts_with("/var/lib/helios-wal/pg/"), "{found}");
    assert_eq!(&lines[1..], ["0", "1"], "{instance}: {found}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_log_on_its_own_volume_stays_there() -> std::result::Result<(), Shown> {
    Ok(apart().await?)
}

async fn apart() -> Result<()> {
    let space = Namespace::create("wal-volume").await?;
    helios_e2e::node::recycle_volumes().await?;
    let minimal = sample("minimal")?;
    let with_log = format!("{minimal}  walStorage: {{size: 1Gi}}\n");
    space.apply(&with_log).await?;
    space.until("hc", "pg", UP, is_ready).await?;
    for instance in ["pg-1", "pg-2"] {
        space.get("pvc", &format!("{instance}-wal")).await?;
        log_is_apart(&space, instance).await?;
    }
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    // Killed, and back by rewind or clone; then the same the other way.
    let kill = "kill -9 $(head -n 1 /var/lib/helios/pg/data/postmaster.pid)";
    for (number, (from, to)) in [("pg-1", "pg-2"), ("pg-2", "pg-1")].into_iter().enumerate() {
        space.until("hc", "pg", MOVED, |o| confirms(o, to)).await?;
        shell(&space, from, kill).await?;
        settled(&space, i64::try_from(number)? + 1).await?;
        log_is_apart(&space, from).await?;
    }
    let (count, slowest) = ledger.settle().await?;
    println!("{count} transactions, the longest took {slowest:?}");
    // It cannot be taken away: by the API server's rule, or, without those, by the operator's word.
    let without = r#"{"spec": {"walStorage": null}}"#;
    let args = ["patch", "hc/pg", "--type=merge", "-p", without];
    match space.kubectl(&args).await {
        Err(refused) => {
            let refused = refused.to_string();
            assert!(refused.contains("spec.walStorage"), "{refused}");
        }
        Ok(_) => {
            let named = |o: &serde_json::Value| {
                text(condition(o, "Valid"), "/message").contains("spec.walStorage")
            };
            space.until("hc", "pg", MOVED, named).await?;
        }
    }
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_cluster_made_again_goes_on_where_the_data_are_furthest() -> std::result::Result<(), Shown>
{
    Ok(again().await?)
}

/// Deletes the cluster and waits until its Pods are gone: they hold its volumes.
async fn delete(space: &Namespace) -> Result<()> {
    space.kubectl(&["delete", "hc/pg"]).await?;
    let deadline = std::time::Instant::now() + UP;
    loop {
        let left = space
            .kubectl(&[
                "get",
                "pods,statefulsets,secrets",
                "-l",
                "heliosdb.io/cluster=pg",
                "-o",
                "name",
            ])
            .await?;
        if left.is_empty() {
            return Ok(());
        }
        if std::time::Instant::now() > deadline {
            return Err(format!("still there: {left}").into());
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
}

async fn again() -> Result<()> {
    let space = Namespace::create("made-again").await?;
    super::cluster(&space).await?;
    space
        .until("hc", "pg", MOVED, |o| confirms(o, "pg-2"))
        .await?;
    // Its first instance is a standby at the end.
    let ask = "heliosdb.io/switchover=pg-2";
    space.kubectl(&["annotate", "hc/pg", ask]).await?;
    settled(&space, 1).await?;
    space
        .until("hc", "pg", MOVED, |o| confirms(o, "pg-1"))
        .await?;
    let sql = connect(&client(&space).await?).await?;
    sql.batch_execute("create table kept (n int); insert into kept select generate_series(1, 9)")
        .await?;
    drop(sql);
    let rows = async |space: &Namespace| -> Result<i64> {
        // By the password of the cluster that is there now.
        let sql = connect(&client(space).await?).await?;
        let row = sql.query_one("select count(*) from kept", &[]).await?;
        sql.execute("insert into kept values (0)", &[]).await?;
        Ok(row.get(0))
    };
    let made =
        |o: &serde_json::Value| is_ready(o) && condition(o, "Bootstrapped")["status"] == "True";
    delete(&space).await?;
    space.apply(&sample("minimal")?).await?;
    let object = space.until("hc", "pg", UP, made).await?;
    assert_eq!(text(&object, "/status/currentPrimary"), "pg-2");
    assert_eq!(rows(&space).await?, 9);
    space
        .until("hc", "pg", MOVED, |o| confirms(o, "pg-1"))
        .await?;
    // The primary's volume is lost: the standby's is all there is.
    delete(&space).await?;
    space.kubectl(&["delete", "pvc", "pg-2"]).await?;
    helios_e2e::node::recycle_volumes().await?;
    space.apply(&sample("minimal")?).await?;
    let object = space.until("hc", "pg", UP, made).await?;
    assert_eq!(text(&object, "/status/currentPrimary"), "pg-1");
    assert_eq!(rows(&space).await?, 10);
    space.delete().await
}
