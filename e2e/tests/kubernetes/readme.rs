//! What the README says, from the sample to a move and a crash under load: a client Pod with the
//! stock psql and pgbench comes through the Service, and writers that keep account beside it.
//!
//! The short choice that CI runs.

use std::time::Duration;

use helios_e2e::kube::Namespace;
use helios_e2e::ledger::Ledger;
use helios_e2e::{Result, Shown};
use serde_json::Value;

use crate::{
    MOVED, UP, WRITERS, client, cluster, confirms, last_operation, manifest, settled, text,
};

/// How long pgbench runs; both moves fall into it on any machine, or the test says so.
const LOAD: u32 = 60;
/// How long its end may take beyond that.
const LATE: Duration = Duration::from_secs(240);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn what_the_readme_says() -> std::result::Result<(), Shown> {
    Ok(readme().await?)
}

async fn readme() -> Result<()> {
    let space = Namespace::create("readme").await?;
    let up = cluster(&space).await?;
    assert_eq!(text(&up, "/status/currentPrimary"), "pg-1");
    start_client(&space).await?;
    let answer = in_client(
        &space,
        "psql -XAtc 'select current_user, pg_is_in_recovery()'",
    )
    .await?;
    assert_eq!(answer, "app|f\n");
    in_client(&space, "pgbench --quiet -i -s 2").await?;
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    let load = format!(
        "pgbench -n -c 8 -T {LOAD} --max-tries=1 >/tmp/pgbench.out 2>&1; echo $? >/tmp/pgbench.rc"
    );
    let begin = format!("nohup bash -c '{load}' >/dev/null 2>&1 </dev/null & exit 0");
    in_client(&space, &begin).await?;

    space
        .until("hc", "pg", MOVED, |o| confirms(o, "pg-2"))
        .await?;
    space
        .kubectl(&["annotate", "hc/pg", "heliosdb.io/switchover=auto"])
        .await?;
    let moved = last_operation(&settled(&space, 1).await?);
    println!("switchover: {moved}");
    assert_eq!(moved["outcome"], "succeeded", "{moved}");

    space
        .until("hc", "pg", MOVED, |o| confirms(o, "pg-1"))
        .await?;
    let kill = "kill -9 $(head -n 1 /var/lib/helios/pg/data/postmaster.pid)";
    space
        .kubectl(&["exec", "pg-2-0", "-c", "postgres", "--", "bash", "-c", kill])
        .await?;
    let moved = last_operation(&settled(&space, 2).await?);
    println!("crash: {moved}");
    assert_eq!(moved["kind"], "failover", "{moved}");
    let running = in_client(&space, "test -e /tmp/pgbench.rc; echo $?").await?;
    println!(
        "pgbench was {} at its end",
        if running == "1\n" { "not" } else { "already" }
    );

    pgbench(&space).await?;
    let (count, slowest) = ledger.settle().await?;
    println!("{count} transactions, the longest took {slowest:?}");
    assert!(count > 0);
    // pgbench's own account: each of its transactions added the same to all four tables.
    let sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from \
                pgbench_history) and (select sum(bbalance) from pgbench_branches) = (select \
                sum(delta) from pgbench_history)";
    assert_eq!(
        in_client(&space, &format!("psql -XAtc \"{sums}\"")).await?,
        "t\n"
    );
    space.delete().await
}

/// The Pod of `manifests/client.yaml`: address and password from the Service and the Secret.
async fn start_client(space: &Namespace) -> Result<()> {
    space.apply(&manifest("client")?).await?;
    let running = |o: &Value| text(o, "/status/phase") == "Running";
    space.until("pod", "client", UP, running).await?;
    Ok(())
}

async fn in_client(space: &Namespace, script: &str) -> Result<String> {
    space
        .kubectl(&["exec", "client", "--", "bash", "-c", script])
        .await
}

/// Waits for pgbench's end and reads its own account.
async fn pgbench(space: &Namespace) -> Result<()> {
    let deadline = tokio::time::Instant::now() + LATE;
    while in_client(space, "test -e /tmp/pgbench.rc && echo ended || true").await? != "ended\n" {
        if tokio::time::Instant::now() > deadline {
            return Err("pgbench has not ended".into());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let said = in_client(space, "cat /tmp/pgbench.out /tmp/pgbench.rc").await?;
    println!("{said}");
    assert!(said.ends_with("\n0\n"), "pgbench failed: {said}");
    assert!(said.contains("number of failed transactions: 0 "), "{said}");
    Ok(())
}
