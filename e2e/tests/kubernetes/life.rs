//! The life of a HeliosCluster after it is up, on a real Kubernetes: rolling changes, fencing,
//! scaling, what cannot be carried out. Judged by what clients were told and what the database and
//! the API server hold.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use helios_e2e::kube::Namespace;
use helios_e2e::ledger::{Ledger, connect};
use helios_e2e::{Result, Shown};
use serde_json::Value;

use super::{UP, client, condition, sample, text};

/// Clients with open transactions.
const WRITERS: i32 = 8;

/// Whether a condition is of the spec that is there now, and true.
fn holds(object: &Value, kind: &str) -> bool {
    let condition = condition(object, kind);
    condition["status"] == "True"
        && condition["observedGeneration"] == object["metadata"]["generation"]
}

pub(super) fn settled(object: &Value) -> bool {
    ["Ready", "UpToDate", "ParametersApplied"]
        .iter()
        .all(|kind| holds(object, kind))
}

/// A cluster of so many instances, up.
async fn cluster(space: &Namespace, instances: u32) -> Result<Value> {
    let minimal = sample("minimal")?;
    space
        .apply(&format!("{minimal}  instances: {instances}\n"))
        .await?;
    space.until("hc", "pg", UP, settled).await
}

async fn patch(space: &Namespace, patch: &str) -> Result<()> {
    let args = ["patch", "hc/pg", "--type=merge", "-p", patch];
    space.kubectl(&args).await.map(drop)
}

/// Identities of the instances' Pods: another one was started anew.
pub(super) async fn pods(space: &Namespace) -> Result<BTreeSet<String>> {
    let path = "jsonpath={.items[*].metadata.uid}";
    let selector = "heliosdb.io/component=instance";
    let text = space
        .kubectl(&["get", "pods", "--selector", selector, "-o", path])
        .await?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

async fn shown(config: &tokio_postgres::Config, name: &str) -> Result<String> {
    let client = connect(config).await?;
    let row = client.query_one(&format!("show {name}"), &[]).await?;
    Ok(row.get(0))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_changed_spec_is_rolled_out_under_load() -> std::result::Result<(), Shown> {
    Ok(rolled().await?)
}

async fn rolled() -> Result<()> {
    let space = Namespace::create("rolled").await?;
    cluster(&space, 2).await?;
    let config = client(&space).await?;
    let ledger = Ledger::start(config.clone(), WRITERS).await?;
    let first = pods(&space).await?;
    // A reload is enough.
    let memory = r#"{"spec": {"postgresql": {"parameters": {"work_mem": "7MB"}}}}"#;
    patch(&space, memory).await?;
    space.until("hc", "pg", UP, settled).await?;
    assert_eq!(shown(&config, "work_mem").await?, "7MB");
    assert_eq!(pods(&space).await?, first);
    // PostgreSQL refuses one: nothing changes, and its words are told.
    let wrong = r#"{"spec": {"postgresql": {"parameters": {"work_mem": "lots"}}}}"#;
    patch(&space, wrong).await?;
    let refused = |o: &Value| condition(o, "ParametersApplied")["reason"] == "Refused";
    let object = space.until("hc", "pg", UP, refused).await?;
    let message = text(condition(&object, "ParametersApplied"), "/message");
    println!("refused: {message}");
    assert!(message.contains("invalid value for parameter \"work_mem\""));
    assert_eq!(shown(&config, "work_mem").await?, "7MB");
    assert_eq!(pods(&space).await?, first);
    // This needs new Pods and another primary.
    let began = Instant::now();
    let both = r#"{"spec": {
        "postgresql": {"parameters": {"work_mem": "7MB", "shared_buffers": "40MB"}},
        "podMetadata": {"annotations": {"example.com/changed": "yes"}}}}"#;
    patch(&space, both).await?;
    let object = space.until("hc", "pg", UP, settled).await?;
    println!(
        "rolled out in {:?}: {}",
        began.elapsed(),
        object["status"]["lastOperations"]
    );
    assert!(pods(&space).await?.is_disjoint(&first));
    assert_eq!(shown(&config, "shared_buffers").await?, "40MB");
    assert_eq!(text(&object, "/status/currentPrimary"), "pg-2");
    let (count, slowest) = ledger.settle().await?;
    println!("{count} transactions, the longest took {slowest:?}");
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_fenced_instance_stays_stopped_and_a_fenced_primary_moves()
-> std::result::Result<(), Shown> {
    Ok(fenced().await?)
}

async fn fenced() -> Result<()> {
    let space = Namespace::create("fenced").await?;
    cluster(&space, 2).await?;
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    let role = |o: &Value, n: usize| text(o, &format!("/status/instances/{n}/role")).to_owned();
    let annotate = async |value: &str| {
        let args = ["annotate", "hc/pg", "--overwrite", value];
        space.kubectl(&args).await
    };
    annotate("heliosdb.io/fenced=pg-2").await?;
    let done = |o: &Value| holds(o, "Fenced") && role(o, 1) == "fenced";
    space.until("hc", "pg", UP, done).await?;
    // Nobody moves to it.
    annotate("heliosdb.io/switchover=pg-2").await?;
    let refused = |o: &Value| condition(o, "SwitchoverAccepted")["status"] == "False";
    let object = space.until("hc", "pg", UP, refused).await?;
    let message = text(condition(&object, "SwitchoverAccepted"), "/message");
    println!("refused: {message}");
    assert!(message.contains("fenced"), "{message}");
    // A fenced primary gives way to another one.
    annotate("heliosdb.io/fenced-").await?;
    space.until("hc", "pg", UP, settled).await?;
    annotate("heliosdb.io/fenced=pg-1").await?;
    let moved = |o: &Value| {
        holds(o, "Fenced") && text(o, "/status/currentPrimary") == "pg-2" && role(o, 0) == "fenced"
    };
    space.until("hc", "pg", UP, moved).await?;
    annotate("heliosdb.io/fenced-").await?;
    space.until("hc", "pg", UP, settled).await?;
    let (count, slowest) = ledger.settle().await?;
    println!("{count} transactions, the longest took {slowest:?}");
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn instances_come_and_go_under_load() -> std::result::Result<(), Shown> {
    Ok(scaled().await?)
}

async fn scaled() -> Result<()> {
    let space = Namespace::create("scaled").await?;
    cluster(&space, 2).await?;
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    patch(&space, r#"{"spec": {"instances": 3}}"#).await?;
    let three = |o: &Value| settled(o) && o["status"]["instancesReady"] == 3;
    space.until("hc", "pg", UP, three).await?;
    // The one with the highest number is the primary when it has to go.
    let ask = "heliosdb.io/switchover=pg-3";
    space.kubectl(&["annotate", "hc/pg", ask]).await?;
    let there = |o: &Value| settled(o) && text(o, "/status/currentPrimary") == "pg-3";
    space.until("hc", "pg", UP, there).await?;
    patch(&space, r#"{"spec": {"instances": 2}}"#).await?;
    let two = |o: &Value| settled(o) && o["status"]["instancesTotal"] == 2;
    let object = space.until("hc", "pg", UP, two).await?;
    let primary = text(&object, "/status/currentPrimary");
    assert_ne!(primary, "pg-3");
    let sets = space
        .kubectl(&["get", "statefulsets", "-o", "name"])
        .await?;
    assert_eq!(sets, "statefulset.apps/pg-1\nstatefulset.apps/pg-2\n");
    // Its volume is kept, its slot is not.
    space.get("pvc", "pg-3").await?;
    let (pod, sql) = (
        format!("{primary}-0"),
        "select string_agg(slot_name, ',') from pg_replication_slots",
    );
    let psql = [
        "psql",
        "-h",
        "/run/helios/pg",
        "-U",
        "helios",
        "-d",
        "postgres",
        "-Atc",
        sql,
    ];
    let mut exec = vec!["exec", &pod, "-c", "postgres", "--"];
    exec.extend(psql);
    let slots = space.kubectl(&exec).await?;
    println!("slots of {primary}: {slots}");
    assert!(!slots.contains('3') && !slots.trim().is_empty(), "{slots}");
    let (count, slowest) = ledger.settle().await?;
    println!("{count} transactions, the longest took {slowest:?}");
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_volume_that_nobody_provides_or_that_cannot_grow_is_named()
-> std::result::Result<(), Shown> {
    Ok(volumes().await?)
}

async fn volumes() -> Result<()> {
    let space = Namespace::create("volumes").await?;
    cluster(&space, 1).await?;
    let before = pods(&space).await?;
    patch(&space, r#"{"spec": {"storage": {"size": "2Gi"}}}"#).await?;
    let refused = |o: &Value| condition(o, "VolumesReady")["reason"] == "CannotGrow";
    let object = space.until("hc", "pg", UP, refused).await?;
    println!("{}", text(condition(&object, "VolumesReady"), "/message"));
    assert_eq!(pods(&space).await?, before);
    let yaml = "apiVersion: heliosdb.io/v1alpha1\nkind: HeliosCluster\nmetadata: {name: other}\n\
                spec: {imageName: x, instances: 1, storage: {size: 1Gi, storageClass: no-such-class}}\n";
    space.apply(yaml).await?;
    let pending = |o: &Value| {
        let message = text(condition(o, "VolumesReady"), "/message");
        message.contains("pending") && message.contains("no-such-class")
    };
    space.until("hc", "other", UP, pending).await?;
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn two_requests_at_once_and_a_deletion_in_the_middle_of_one() -> std::result::Result<(), Shown>
{
    Ok(at_once().await?)
}

async fn at_once() -> Result<()> {
    let space = Namespace::create("at-once").await?;
    cluster(&space, 2).await?;
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    let ask = [
        "annotate",
        "hc/pg",
        "--overwrite",
        "heliosdb.io/switchover=auto",
    ];
    let taken = |o: &Value| {
        let path = "/metadata/annotations/heliosdb.io~1switchover";
        o.pointer(path).is_none()
    };
    space.kubectl(&ask).await?;
    space.until("hc", "pg", UP, taken).await?;
    space.kubectl(&ask).await?;
    space.until("hc", "pg", UP, taken).await?;
    let object = space.until("hc", "pg", UP, settled).await?;
    // The second one began when the first had ended, or was refused because it had not.
    let moves = object["status"]["lastOperations"]
        .as_array()
        .map_or(0, Vec::len);
    let answer = condition(&object, "SwitchoverAccepted");
    println!("{moves} moves; {}", text(answer, "/message"));
    match moves {
        1 => assert!(text(answer, "/message").contains("another operation is under way")),
        _ => assert_eq!((moves, text(answer, "/status")), (2, "True")),
    }
    let (count, slowest) = ledger.settle().await?;
    println!("{count} transactions, the longest took {slowest:?}");
    // Deleted in the middle: nothing is left but what is to be kept.
    space.kubectl(&ask).await?;
    space.until("hc", "pg", UP, taken).await?;
    space.kubectl(&["delete", "hc/pg"]).await?;
    let deadline = Instant::now() + UP;
    loop {
        let left = space
            .kubectl(&[
                "get",
                "pods,statefulsets,deployments,services",
                "-o",
                "name",
            ])
            .await?;
        if left.is_empty() {
            break;
        }
        if Instant::now() > deadline {
            return Err(format!("still there: {left}").into());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    for kept in ["pg-1", "pg-2"] {
        space.get("pvc", kept).await?;
    }
    space.delete().await
}
