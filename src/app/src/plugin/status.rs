//! `status`: a cluster's status as a page of text. Pure but for the request.

use std::fmt::Write as _;

use helios_api::v1alpha1::{
    FinishedOperation, HeliosCluster, HeliosClusterStatus, InstanceStatus, ProxyReport, names,
};
use kube::ResourceExt as _;

use super::args::StatusArgs;
use super::place::Place;
use crate::failure::Failure;
use crate::{out, table};

/// `kubectl helios status`.
pub(super) async fn run(place: &Place, args: &StatusArgs) -> Result<(), Failure> {
    let cluster = place.cluster(&args.cluster.cluster).await?;
    if args.json {
        let mut status = cluster.status.unwrap_or_default();
        // It is the operator's own.
        status.state = None;
        let text = serde_json::to_string(&status)
            .map_err(|e| Failure::failed(format!("could not write JSON: {e}")))?;
        out::print(&text);
    } else {
        out::print(&describe(&cluster));
    }
    Ok(())
}

fn dash() -> String {
    "-".to_owned()
}

fn describe(cluster: &HeliosCluster) -> String {
    let empty = HeliosClusterStatus::default();
    let status = cluster.status.as_ref().unwrap_or(&empty);
    let mut text = head(cluster, status);
    if !status.instances.is_empty() {
        let primary = status.current_primary.as_deref();
        let rows: Vec<_> = status
            .instances
            .iter()
            .map(|i| instance(i, primary == Some(&*i.name)))
            .collect();
        let head = [
            "INSTANCE",
            "ROLE",
            "READY",
            "POSITION",
            "BEHIND",
            "CONFIRMS COMMITS",
        ];
        let _ = write!(text, "\n{}", table::render(&head, &rows));
    }
    if !status.proxies.is_empty() {
        let rows: Vec<_> = status.proxies.iter().map(proxy).collect();
        let head = ["PROXY", "PHASE", "SESSIONS", "PROTECTED"];
        let _ = write!(text, "\n{}", table::render(&head, &rows));
    }
    if !status.conditions.is_empty() {
        let rows: Vec<_> = status
            .conditions
            .iter()
            .map(|c| {
                vec![
                    c.type_.clone(),
                    c.status.clone(),
                    c.last_transition_time.0.to_string(),
                    c.message.clone(),
                ]
            })
            .collect();
        let head = ["CONDITION", "STATUS", "SINCE", "MESSAGE"];
        let _ = write!(text, "\n{}", table::render(&head, &rows));
    }
    if !status.last_operations.is_empty() {
        let rows: Vec<_> = status.last_operations.iter().map(operation).collect();
        let head = [
            "OPERATION",
            "KIND",
            "STARTED",
            "FROM",
            "TO",
            "PAUSE",
            "REPLAYED",
            "FAILED",
            "OUTCOME",
            "CAUSE",
        ];
        let _ = write!(text, "\n{}", table::render(&head, &rows));
    }
    text
}

fn head(cluster: &HeliosCluster, status: &HeliosClusterStatus) -> String {
    let namespace = cluster.namespace().unwrap_or_default();
    let primary = status.current_primary.clone().unwrap_or_else(dash);
    let timeline = status.timeline.map_or_else(dash, |t| t.to_string());
    let (ready, wanted) = (status.instances_ready, cluster.spec.instances);
    let mut lines = vec![
        ("cluster", format!("{namespace}/{}", cluster.name_any())),
        ("phase", phase(cluster, status)),
        (
            "primary",
            format!("{primary}, epoch {}, timeline {timeline}", status.epoch),
        ),
        ("instances", format!("{ready} of {wanted} ready")),
        ("image", cluster.spec.image_name.clone()),
    ];
    if let Some(o) = &status.operation {
        let to = status.target_primary.as_ref();
        let to = to.map_or_else(String::new, |to| format!(" to {to}"));
        let (kind, step, since) = (&o.kind, &o.step, &o.started.0);
        let running = format!("{kind} {}{to}: {step} since {since} ({})", o.id, o.cause);
        lines.push(("running", running));
    }
    if let Some(request) = cluster.annotations().get(names::SWITCHOVER) {
        let requested = format!("switchover to {request}, not taken yet");
        lines.push(("requested", requested));
    }
    let mut text = String::new();
    for (name, value) in lines {
        let _ = writeln!(text, "{name:<10} {value}");
    }
    text
}

/// The phase, and what it does not say of itself.
fn phase(cluster: &HeliosCluster, status: &HeliosClusterStatus) -> String {
    let unknown = || "unknown: no operator has looked at it yet".to_owned();
    let mut text = status.phase.clone().unwrap_or_else(unknown);
    let asked = cluster.annotations().get(names::RECONCILE);
    if asked.is_some_and(|v| v == "paused") && text != "Paused" {
        text.push_str(", paused");
    }
    if let (Some(seen), Some(now)) = (status.observed_generation, cluster.metadata.generation)
        && seen < now
    {
        text.push_str(", the last change of the spec not seen yet");
    }
    text
}

fn instance(i: &InstanceStatus, is_primary: bool) -> Vec<String> {
    vec![
        i.name.clone(),
        i.role.clone(),
        yes(i.ready),
        i.position.clone().unwrap_or_else(dash),
        i.lag_bytes.map_or_else(dash, |b| format!("{b} B")),
        if is_primary {
            dash()
        } else {
            yes(i.synchronous)
        },
    ]
}

fn yes(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}

fn proxy(p: &ProxyReport) -> Vec<String> {
    vec![
        p.name.clone(),
        p.phase.clone(),
        p.sessions.to_string(),
        p.protected.to_string(),
    ]
}

fn operation(o: &FinishedOperation) -> Vec<String> {
    let outcome = match &o.reason {
        Some(why) => format!("{}: {why}", o.outcome),
        None => o.outcome.clone(),
    };
    vec![
        o.id.to_string(),
        o.kind.clone(),
        o.started.0.to_string(),
        o.from.clone(),
        o.to.clone(),
        format!("{} ms", o.pause_ms),
        o.replayed.to_string(),
        o.failed.to_string(),
        outcome,
        o.cause.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cluster(status: serde_json::Value) -> HeliosCluster {
        serde_json::from_value(json!({
            "apiVersion": "heliosdb.io/v1alpha1", "kind": "HeliosCluster",
            "metadata": {"name": "pg", "namespace": "shop", "generation": 2},
            "spec": {"imageName": "postgres:17", "storage": {"size": "1Gi"}},
            "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn a_cluster_nobody_has_looked_at_says_so() {
        assert_eq!(
            describe(&cluster(json!({}))),
            "\
cluster    shop/pg
phase      unknown: no operator has looked at it yet
primary    -, epoch 0, timeline -
instances  0 of 2 ready
image      postgres:17
"
        );
    }

    #[test]
    fn everything_known_is_on_the_page() {
        let text = describe(&cluster(json!({
            "observedGeneration": 1, "phase": "Switchover", "currentPrimary": "pg-1",
            "targetPrimary": "pg-2", "epoch": 4, "timeline": 3,
            "instancesTotal": 2, "instancesReady": 1,
            "instances": [
                {"name": "pg-1", "role": "primary", "ready": true, "position": "0/3000060"},
                {"name": "pg-2", "role": "replica", "ready": false, "position": "0/3000000",
                 "lagBytes": 96, "synchronous": true},
            ],
            "proxies": [{"name": "pg-proxy-a", "phase": "running", "sessions": 12, "protected": 11}],
            "operation": {"id": 5, "kind": "switchover", "step": "drain", "cause": "requested",
                          "started": "2026-11-29T10:00:00Z"},
            "lastOperations": [{
                "id": 4, "kind": "failover", "from": "pg-2", "to": "pg-1", "epoch": 4,
                "cause": "crashed", "outcome": "succeeded", "started": "2026-11-29T09:00:00Z",
                "pauseMs": 812, "replayed": 6, "failed": 0,
            }],
        })));
        assert_eq!(
            text,
            "\
cluster    shop/pg
phase      Switchover, the last change of the spec not seen yet
primary    pg-1, epoch 4, timeline 3
instances  1 of 2 ready
image      postgres:17
running    switchover 5 to pg-2: drain since 2026-11-29T10:00:00Z (requested)

INSTANCE  ROLE     READY  POSITION   BEHIND  CONFIRMS COMMITS
pg-1      primary  yes    0/3000060  -       -
pg-2      replica  no     0/3000000  96 B    yes

PROXY       PHASE    SESSIONS  PROTECTED
pg-proxy-a  running  12        11

OPERATION  KIND      STARTED               FROM  TO    PAUSE   REPLAYED  FAILED  OUTCOME    CAUSE
4          failover  2026-11-29T09:00:00Z  pg-2  pg-1  812 ms  6         0       succeeded  crashed
"
        );
    }
}
