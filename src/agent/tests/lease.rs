//! The lease of a primary on real servers: renewed by grants, kept by a standby's confirmation, and
//! the end of the server when it has neither.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // a test fails by panicking

mod common;

use std::time::Duration;

use common::{FIRST, LIMIT, Node, folder, insert, numbers, pair};
use helios_agent::client::ClientError;
use helios_api::Epoch;
use helios_api::agent::{AgentCommand, AgentError, InstanceState};
use helios_api::lease::{LeaseReply, LeaseRequest, Rule, Terms};

/// Long enough for a machine that is busy otherwise.
const HOLD_MS: u64 = 3_000;

async fn renew(node: &Node, grant: Option<u64>) -> LeaseReply {
    let request = LeaseRequest {
        epoch: Epoch(1),
        terms: Terms {
            version: 1,
            rule: Rule::Any(["b".parse().unwrap()].into()),
            hold_ms: HOLD_MS,
        },
        grant,
    };
    node.client.renew(&request, LIMIT).await.unwrap()
}

/// Grants a lease once.
async fn grant(node: &Node) {
    let ask = renew(node, None).await.ask;
    assert_eq!(renew(node, Some(ask)).await.version, Some(1));
}

fn is_primary(state: &InstanceState) -> bool {
    matches!(state, InstanceState::Primary { .. })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_lives_by_its_standby_and_ends_with_its_lease() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    insert(&a, 1).await;
    grant(&a).await;
    // Nobody renews for more than the lease: its standby keeps it alive.
    tokio::time::sleep(Duration::from_millis(2 * HOLD_MS)).await;
    assert!(is_primary(&a.state().await.instance));
    insert(&a, 2).await;
    // From here on nobody confirms, whatever the server goes on writing.
    let client = a.sql().await;
    b.command(1, AgentCommand::StopReceiver).await;
    let stopped = std::time::Instant::now();
    a.reach(|s| matches!(s, InstanceState::Stopped { crashed: true, .. }))
        .await;
    println!("ended {:?} behind the last confirmation", stopped.elapsed());
    assert!(stopped.elapsed() >= Duration::from_millis(HOLD_MS / 2));
    assert!(common::processes(&a.config).is_empty());
    assert!(client.simple_query("select 1").await.is_err());
    // Who was stopped so that a successor can be chosen confirms nobody in the same epoch.
    let error = b.try_command(1, common::follow(&a, &FIRST)).await;
    assert!(
        matches!(error, Err(ClientError::Agent(AgentError::Refused { .. }))),
        "{error:?}"
    );
    // Without a lease it is not started again, whoever says so.
    let error = a.try_command(1, AgentCommand::StartPrimary).await;
    assert!(
        matches!(error, Err(ClientError::Agent(AgentError::Failed { .. }))),
        "{error:?}"
    );
    assert!(common::processes(&a.config).is_empty());
    let renewing = async {
        loop {
            grant(&a).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    };
    let started = async {
        a.command(1, AgentCommand::StartPrimary).await;
        numbers(&a).await
    };
    tokio::select! {
        () = renewing => {}
        found = started => assert_eq!(found, [1, 2]),
    }
}
