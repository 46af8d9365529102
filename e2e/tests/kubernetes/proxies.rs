//! Several proxies in front of one cluster: the barrier across them, rolling updates, one that is
//! killed.

use super::bootstrap::psql;
use super::*;
use helios_e2e::crowd::Crowd;

/// Sessions at each proxy, beside those in the queue for a lock.
const EACH: usize = 100;

/// The proxies' Pods that stay, with the address of each.
async fn pods(space: &Namespace) -> Result<Vec<(String, String)>> {
    let selector = "heliosdb.io/component=proxy";
    let list = space
        .kubectl(&["get", "pods", "-l", selector, "-o", "json"])
        .await?;
    let list: Value = serde_json::from_str(&list)?;
    let pods = list["items"].as_array().cloned().unwrap_or_default();
    let stays = |pod: &&Value| pod.pointer("/metadata/deletionTimestamp").is_none();
    let named = |pod: &Value| {
        let name = text(pod, "/metadata/name").to_owned();
        (name, text(pod, "/status/podIP").to_owned())
    };
    Ok(pods.iter().filter(stays).map(named).collect())
}

/// How a client comes to one proxy, past the Service.
fn at(service: &tokio_postgres::Config, address: &str) -> tokio_postgres::Config {
    let mut config = tokio_postgres::Config::new();
    config.host(address).port(5432);
    config.connect_timeout(Duration::from_secs(20));
    if let Some(user) = service.get_user() {
        config.user(user);
    }
    if let Some(password) = service.get_password() {
        config.password(password);
    }
    if let Some(database) = service.get_dbname() {
        config.dbname(database);
    }
    config
}

/// Waits until the Service has sent clients to each of these addresses: nodes learn of a Pod that is
/// ready a second or two later.
async fn shared_among(service: &tokio_postgres::Config, addresses: &[&str]) -> Result<()> {
    let deadline = Instant::now() + MOVED;
    let mut seen = std::collections::BTreeSet::new();
    while !addresses.iter().all(|address| seen.contains(*address)) {
        if Instant::now() > deadline {
            return Err(format!("of {addresses:?} only {seen:?} get clients").into());
        }
        let client = connect(service).await?;
        let asked = "select host(inet_client_addr())";
        seen.insert(client.query_one(asked, &[]).await?.get::<_, String>(0));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn the_barrier_holds_across_both_proxies() -> std::result::Result<(), Shown> {
    Ok(barrier().await?)
}

async fn barrier() -> Result<()> {
    let space = Namespace::create("barrier").await?;
    // Each session has a backend, and there are some in the queue.
    let roomy = "  postgresql: {parameters: {max_connections: \"400\"}}\n";
    space
        .apply(&format!("{}{roomy}", sample("minimal")?))
        .await?;
    space.until("hc", "pg", UP, is_ready).await?;
    let service = client(&space).await?;
    let both = |o: &Value| {
        o["status"]["proxies"]
            .as_array()
            .is_some_and(|p| p.len() == 2)
    };
    space.until("hc", "pg", MOVED, both).await?;
    let proxies: Vec<_> = pods(&space)
        .await?
        .iter()
        .map(|p| at(&service, &p.1))
        .collect();
    assert_eq!(proxies.len(), 2);
    for (number, to) in (1_i64..).zip(["pg-2", "pg-1", "pg-2"]) {
        let confirmed = |o: &Value| confirms(o, to);
        space.until("hc", "pg", MOVED, confirmed).await?;
        let crowd = Crowd::gather(&service, &proxies, EACH).await?;
        let deadline = Instant::now() + MOVED;
        while crowd.waiting().await? < i64::try_from(crowd.queued())? {
            assert!(Instant::now() < deadline, "nobody waits for a lock");
        }
        // The last one is a crash.
        let planned = number < 3;
        let outcome = crowd.settle(moves(&space, number, to, planned)).await?;
        let count = outcome.waits.len();
        println!(
            "{} sessions: new work held for at most {:?}, half of it for less than {:?}",
            outcome.sessions,
            outcome.waits.last().copied().unwrap_or_default(),
            outcome.waits.get(count / 2).copied().unwrap_or_default(),
        );
    }
    space.delete().await
}

async fn moves(space: &Namespace, number: i64, to: &str, planned: bool) -> Result<()> {
    // New work runs before.
    tokio::time::sleep(Duration::from_secs(1)).await;
    if planned {
        let request = format!("heliosdb.io/switchover={to}");
        space.kubectl(&["annotate", "hc/pg", &request]).await?;
    } else {
        let kill = "kill -9 $(head -n 1 /var/lib/helios/pg/data/postmaster.pid)";
        space
            .kubectl(&["exec", "pg-1-0", "-c", "postgres", "--", "bash", "-c", kill])
            .await?;
    }
    let moved = settled(space, number).await?;
    let operation = last_operation(&moved);
    println!("move {number}: {operation}");
    assert_eq!(operation["outcome"], "succeeded", "{operation}");
    assert_eq!(text(&moved, "/status/currentPrimary"), to);
    assert_eq!(operation["failed"], 0, "{operation}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_rolling_update_of_the_proxies_loses_no_transaction() -> std::result::Result<(), Shown> {
    Ok(rolling().await?)
}

async fn rolling() -> Result<()> {
    let space = Namespace::create("rolling").await?;
    cluster(&space).await?;
    let ledger = Ledger::start_again_and_again(client(&space).await?, WRITERS, 0).await?;
    let before = pods(&space).await?;
    for round in ["one", "two"] {
        let patch = serde_json::json!({"spec": {"proxy": {"podMetadata": {
            "annotations": {"example.com/round": round},
        }}}});
        let patch = patch.to_string();
        space
            .kubectl(&["patch", "hc/pg", "--type=merge", "-p", &patch])
            .await?;
        let renewed = |o: &Value| {
            let pointer = "/spec/template/metadata/annotations/example.com~1round";
            text(o, pointer) == round
        };
        space
            .until("deployment", "pg-proxy", MOVED, renewed)
            .await?;
        let wait = ["rollout", "status", "deployment/pg-proxy", "--timeout=150s"];
        space.kubectl(&wait).await?;
    }
    // The last of the old ones are on their way out.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let after = pods(&space).await?;
    assert!(
        after.iter().all(|pod| !before.contains(pod)),
        "{before:?} {after:?}"
    );
    let settled = ledger.account().await?;
    for lost in settled.lost.iter().take(5) {
        println!("{lost}");
    }
    println!(
        "{} transactions, the longest took {:?}; {} connections ended; {:?} unknown, there",
        settled.count,
        settled.slowest,
        settled.lost.len(),
        settled.unknown
    );
    assert!(
        !settled.lost.is_empty(),
        "nobody was connected to what was replaced"
    );
    // They were told so where no transaction was open.
    assert_eq!(settled.unknown, (0, 0));
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_killed_proxy_costs_its_own_clients_their_connections_only()
-> std::result::Result<(), Shown> {
    Ok(killed().await?)
}

async fn killed() -> Result<()> {
    let space = Namespace::create("killed").await?;
    cluster(&space).await?;
    let service = client(&space).await?;
    let both = |o: &Value| o["status"]["readyReplicas"] == 2;
    space.until("deployment", "pg-proxy", MOVED, both).await?;
    let proxies = pods(&space).await?;
    let [(doomed, its), (_, spared)] = proxies.as_slice() else {
        return Err(format!("two proxies are expected: {proxies:?}").into());
    };
    shared_among(&service, &[its, spared]).await?;
    let everywhere = Ledger::start_again_and_again(service.clone(), WRITERS, 100).await?;
    let there = Ledger::start(at(&service, spared), WRITERS).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let now = ["delete", "pod", doomed, "--grace-period=0", "--force"];
    space.kubectl(&now).await?;
    space.until("deployment", "pg-proxy", MOVED, both).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    // No error at all at the other one.
    let (count, slowest) = there.settle().await?;
    println!("at the other proxy: {count} transactions, the longest took {slowest:?}");
    let settled = everywhere.account().await?;
    println!(
        "through the Service: {} transactions, the longest took {:?}; {} connections ended; \
         {:?} unknown, there",
        settled.count,
        settled.slowest,
        settled.lost.len(),
        settled.unknown
    );
    assert!(
        !settled.lost.is_empty(),
        "nobody was connected to what was killed"
    );
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_transaction_that_lasts_finds_its_backend_at_a_failover() -> std::result::Result<(), Shown>
{
    Ok(always().await?)
}

/// Backends of the application's user on an instance, once there are so many.
async fn backends(space: &Namespace, pod: &str, count: usize) -> Result<Vec<String>> {
    let deadline = Instant::now() + MOVED;
    loop {
        let asked = "select pid from pg_stat_activity where usename = 'app'";
        let pids = psql(space, pod, asked).await?;
        let pids: Vec<String> = pids.split_whitespace().map(str::to_owned).collect();
        if pids.len() == count {
            return Ok(pids);
        }
        assert!(Instant::now() < deadline, "not {count}: {pids:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn always() -> Result<()> {
    let space = Namespace::create("always").await?;
    let always = "  proxy: {sessionMigration: {restoreAhead: always}}\n";
    space
        .apply(&format!("{}{always}", sample("minimal")?))
        .await?;
    space.until("hc", "pg", UP, is_ready).await?;
    let confirmed = |o: &Value| confirms(o, "pg-2");
    space.until("hc", "pg", MOVED, confirmed).await?;
    let client = connect(&client(&space).await?).await?;
    client
        .batch_execute("create table t (n int); set work_mem = '7MB'; begin")
        .await?;
    let insert = client.prepare("insert into t values ($1)").await?;
    client.execute(&insert, &[&1]).await?;
    let kept = backends(&space, "pg-2-0", 1).await?;
    let kill = "kill -9 $(head -n 1 /var/lib/helios/pg/data/postmaster.pid)";
    let crash = ["exec", "pg-1-0", "-c", "postgres", "--", "bash", "-c", kill];
    space.kubectl(&crash).await?;
    client.execute(&insert, &[&2]).await?;
    let asked = "select pg_backend_pid()::text, current_setting('work_mem')";
    let row = client.query_one(asked, &[]).await?;
    assert_eq!([row.get::<_, String>(0)], kept.as_slice());
    assert_eq!(row.get::<_, String>(1), "7MB");
    client.batch_execute("commit").await?;
    settled(&space, 1).await?;
    let there = client.query_one("select count(*) from t", &[]).await?;
    assert_eq!(there.get::<_, i64>(0), 2);
    space.delete().await
}
