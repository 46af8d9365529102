//! The operator on a real Kubernetes: `make e2e` builds one where there is none, installs the chart and
//! runs these. Judged by what clients were told and what the database holds.

#![allow(
    clippy::print_stdout,
    reason = "what was measured, for whoever reads the log"
)]

mod bootstrap;
mod certificates;
mod charts;
mod faults;
mod life;
mod monitoring;
mod outages;
mod plugin;
mod proxies;
mod readme;
mod upgrades;
mod volumes;

use std::time::{Duration, Instant};

use helios_e2e::kube::{self, Namespace};
use helios_e2e::ledger::{Ledger, connect};
use helios_e2e::{Result, Shown};
use serde_json::Value;

use faults::rounds;

/// Two data directories, two clones of images, on a machine that is busy otherwise.
const UP: Duration = Duration::from_secs(300);
/// From a Pod that is ready to a node that sends clients to it.
const ROUTED: Duration = Duration::from_secs(30);
/// A change of primary with everything around it.
const MOVED: Duration = Duration::from_secs(120);
/// Clients with open transactions.
const WRITERS: i32 = 12;

fn sample(name: &str) -> Result<String> {
    manifest(&format!("samples/{name}"))
}

/// A file of `manifests`, with the image that the tests have.
fn manifest(name: &str) -> Result<String> {
    let path = format!("{}/../manifests/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
    let image = std::env::var("HELIOS_POSTGRES_IMAGE")?;
    Ok(std::fs::read_to_string(path)?.replace("docker.io/library/postgres:17", &image))
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    object["status"]["conditions"]
        .as_array()
        .and_then(|all| all.iter().find(|c| c["type"] == kind))
        .unwrap_or(&Value::Null)
}

fn is_ready(object: &Value) -> bool {
    condition(object, "Ready")["status"] == "True"
}

/// Applies the minimal sample and waits until it serves.
async fn cluster(space: &Namespace) -> Result<Value> {
    helios_e2e::node::recycle_volumes().await?;
    space.apply(&sample("minimal")?).await?;
    space.until("hc", "pg", UP, is_ready).await
}

/// How a client comes to the proxies: by the Service's address, with the application's Secret.
async fn client(space: &Namespace) -> Result<tokio_postgres::Config> {
    client_of(space, "pg").await
}

/// The same, of a cluster with another name.
async fn client_of(space: &Namespace, name: &str) -> Result<tokio_postgres::Config> {
    let service = space.get("service", name).await?;
    let address = format!("{}:5432", text(&service, "/spec/clusterIP"));
    // The node learns of a ready Pod a moment later than the API server.
    let deadline = Instant::now() + ROUTED;
    while let Err(error) = tokio::net::TcpStream::connect(&address).await {
        if Instant::now() > deadline {
            return Err(format!("the cluster is ready, its Service is not: {error}").into());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let secret = format!("{name}-app");
    let mut config = tokio_postgres::Config::new();
    config
        .host(text(&service, "/spec/clusterIP"))
        .port(5432)
        .user(space.secret(&secret, "username").await?)
        .password(space.secret(&secret, "password").await?)
        .dbname(space.secret(&secret, "dbname").await?)
        .connect_timeout(Duration::from_secs(20));
    Ok(config)
}

fn last_operation(object: &Value) -> Value {
    let all = object["status"]["lastOperations"].as_array();
    all.and_then(|all| all.last()).cloned().unwrap_or_default()
}

/// Whether commits wait for an instance: such a standby may take over.
fn confirms(object: &Value, name: &str) -> bool {
    let all = object["status"]["instances"].as_array();
    all.is_some_and(|all| {
        all.iter()
            .any(|i| i["name"] == name && i["synchronous"] == true && i["ready"] == true)
    })
}

/// Waits until operation `id` has ended and everything serves again.
async fn settled(space: &Namespace, id: i64) -> Result<Value> {
    let done = |o: &Value| last_operation(o)["id"].as_i64() >= Some(id) && is_ready(o);
    space.until("hc", "pg", MOVED, done).await
}

/// From where to where move number so-and-so goes.
fn there_and_back(number: i64) -> (&'static str, &'static str) {
    if number % 2 == 1 {
        ("pg-1", "pg-2")
    } else {
        ("pg-2", "pg-1")
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn switchovers_by_annotation_lose_nothing() -> std::result::Result<(), Shown> {
    Ok(switchovers().await?)
}

async fn switchovers() -> Result<()> {
    let space = Namespace::create("switchover").await?;
    let up = cluster(&space).await?;
    assert_eq!(text(&up, "/status/currentPrimary"), "pg-1");
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    // An odd number of them: the last is primary where the Service is looked at.
    let last = (rounds() | 1).max(3);
    for number in 1..=last {
        let (_, expected) = there_and_back(number);
        let to = if number % 2 == 0 { expected } else { "auto" };
        // Else it is refused.
        space
            .until("hc", "pg", MOVED, |o| confirms(o, expected))
            .await?;
        let request = format!("heliosdb.io/switchover={to}");
        space.kubectl(&["annotate", "hc/pg", &request]).await?;
        let moved = settled(&space, number).await?;
        let operation = last_operation(&moved);
        assert_eq!(operation["outcome"], "succeeded", "{operation}");
        assert_eq!(operation["kind"], "switchover", "{operation}");
        assert_eq!(text(&moved, "/status/currentPrimary"), expected);
        let annotations = &moved["metadata"]["annotations"];
        assert!(
            annotations.get("heliosdb.io/switchover").is_none(),
            "{annotations}"
        );
        println!("switchover {number}: {operation}");
    }
    faults::accounted(ledger, last, MOVED).await?;
    // The Service in front of the primary follows its role.
    let follows =
        |endpoints: &Value| text(endpoints, "/subsets/0/addresses/0/targetRef/name") == "pg-2-0";
    space
        .until("endpoints", "pg-primary", ROUTED, follows)
        .await?;
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_killed_postmaster_is_failed_over() -> std::result::Result<(), Shown> {
    Ok(failover().await?)
}

async fn failover() -> Result<()> {
    let space = Namespace::create("failover").await?;
    cluster(&space).await?;
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    let kill = "kill -9 $(head -n 1 /var/lib/helios/pg/data/postmaster.pid)";
    for number in 1..=rounds() {
        let (from, to) = there_and_back(number);
        space.until("hc", "pg", MOVED, |o| confirms(o, to)).await?;
        let pod = format!("{from}-0");
        space
            .kubectl(&["exec", &pod, "-c", "postgres", "--", "bash", "-c", kill])
            .await?;
        let moved = settled(&space, number).await?;
        let operation = last_operation(&moved);
        println!("failover {number}: {operation}");
        assert_eq!(operation["kind"], "failover", "{operation}");
        assert_eq!(text(&moved, "/status/currentPrimary"), to);
    }
    faults::accounted(ledger, rounds(), MOVED).await?;
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_primary_whose_pod_is_deleted_hands_over_first() -> std::result::Result<(), Shown> {
    Ok(deleted().await?)
}

/// What a drain of a node and a rolling change do to a Pod.
async fn deleted() -> Result<()> {
    let space = Namespace::create("deleted").await?;
    cluster(&space).await?;
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    for number in 1..=rounds() {
        let (from, to) = there_and_back(number);
        space.until("hc", "pg", MOVED, |o| confirms(o, to)).await?;
        let pod = format!("{from}-0");
        space
            .kubectl(&["delete", "pod", &pod, "--wait=false"])
            .await?;
        let moved = settled(&space, number).await?;
        let operation = last_operation(&moved);
        println!("deletion {number}: {operation}");
        assert_eq!(operation["kind"], "switchover", "{operation}");
        assert_eq!(operation["outcome"], "succeeded", "{operation}");
        assert_eq!(text(&moved, "/status/currentPrimary"), to);
    }
    faults::accounted(ledger, rounds(), MOVED).await?;
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_primary_whose_pod_vanishes_is_replaced() -> std::result::Result<(), Shown> {
    Ok(vanished().await?)
}

async fn vanished() -> Result<()> {
    let space = Namespace::create("vanished").await?;
    let up = cluster(&space).await?;
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    let mut primary = text(&up, "/status/currentPrimary").to_owned();
    for number in 1..=rounds() {
        let standby = if primary == "pg-1" { "pg-2" } else { "pg-1" };
        space
            .until("hc", "pg", MOVED, |o| confirms(o, standby))
            .await?;
        let pod = format!("{primary}-0");
        let now = ["delete", "pod", &pod, "--grace-period=0", "--force"];
        space.kubectl(&now).await?;
        let moved = settled(&space, number).await?;
        println!("deletion {number}: {}", last_operation(&moved));
        text(&moved, "/status/currentPrimary").clone_into(&mut primary);
    }
    faults::accounted(ledger, rounds(), MOVED).await?;
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn an_operator_that_dies_during_a_switchover_is_succeeded() -> std::result::Result<(), Shown>
{
    Ok(succession().await?)
}

async fn succession() -> Result<()> {
    let space = Namespace::create("succession").await?;
    cluster(&space).await?;
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    for number in 1..=3_i64 {
        space
            .kubectl(&["annotate", "hc/pg", "heliosdb.io/switchover=auto"])
            .await?;
        // Both copies: one of them leads. What they were at differs from round to round.
        tokio::time::sleep(Duration::from_millis(number.unsigned_abs() * 60)).await;
        let args = [
            "delete",
            "pods",
            "--namespace",
            "helios-system",
            "--grace-period=0",
            "--force",
            "--wait=false",
            "--selector",
            "app.kubernetes.io/name=helios-operator",
        ];
        kube::run(&args, None).await?;
        let moved = settled(&space, number).await?;
        println!("switchover {number}: {}", last_operation(&moved));
        let annotations = &moved["metadata"]["annotations"];
        assert!(
            annotations.get("heliosdb.io/switchover").is_none(),
            "{annotations}"
        );
    }
    let (count, slowest) = ledger.settle().await?;
    println!("{count} transactions, the longest took {slowest:?}");
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn what_is_wrong_is_named_and_changes_nothing() -> std::result::Result<(), Shown> {
    Ok(wrong().await?)
}

async fn wrong() -> Result<()> {
    let space = Namespace::create("wrong").await?;
    let minimal = sample("minimal")?;
    // What the schema says, the API server says.
    for (bad, field) in [
        ("  instances: 0\n", "spec.instances"),
        ("  proxy: {replicas: 51}\n", "spec.proxy.replicas"),
        (
            "  postgresql: {synchronous: {dataDurability: maybe}}\n",
            "spec.postgresql.synchronous.dataDurability",
        ),
    ] {
        let refused = space.apply(&format!("{minimal}{bad}")).await;
        let error = refused.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(field), "{field}: {error}");
    }
    // What it cannot say, the operator says.
    for (bad, field) in [
        (
            "  bootstrap: {initdb: {owner: postgres}}\n",
            "spec.bootstrap.initdb.owner",
        ),
        (
            "  postgresql: {parameters: {port: \"1\"}}\n",
            "spec.postgresql",
        ),
    ] {
        space.apply(&format!("{minimal}{bad}")).await?;
        let invalid = |o: &Value| condition(o, "Valid")["status"] == "False";
        let object = space.until("hc", "pg", MOVED, invalid).await?;
        let message = text(condition(&object, "Valid"), "/message");
        assert!(message.contains(field), "{message}");
        let sets = space
            .kubectl(&["get", "statefulsets,deployments,pvc", "-o", "name"])
            .await?;
        assert_eq!(sets, "");
        let events = space.kubectl(&["get", "events", "-o", "json"]).await?;
        assert!(events.contains(field), "{events}");
        space.kubectl(&["delete", "hc/pg"]).await?;
    }
    // A cluster that runs goes on as it is.
    cluster(&space).await?;
    let client = connect(&client(&space).await?).await?;
    let wrong = r#"{"spec": {"storage": {"size": "512Mi"}}}"#;
    space
        .kubectl(&["patch", "hc/pg", "--type=merge", "-p", wrong])
        .await?;
    let named = |o: &Value| text(condition(o, "Valid"), "/message").contains("spec.storage.size");
    space.until("hc", "pg", MOVED, named).await?;
    // One session, opened before: nothing of the cluster was restarted.
    client.query_one("select 1", &[]).await?;
    for request in ["pg-1", "pg-9", "no such name"] {
        let annotation = format!("heliosdb.io/switchover={request}");
        space
            .kubectl(&["annotate", "hc/pg", "--overwrite", &annotation])
            .await?;
        let refused = |o: &Value| {
            condition(o, "SwitchoverAccepted")["status"] == "False"
                && o.pointer("/metadata/annotations/heliosdb.io~1switchover")
                    .is_none()
        };
        let object = space.until("hc", "pg", MOVED, refused).await?;
        println!(
            "{request}: {}",
            text(condition(&object, "SwitchoverAccepted"), "/message")
        );
        assert_eq!(text(&object, "/status/currentPrimary"), "pg-1");
    }
    space.delete().await
}
