//! A primary that is up and slow: it is left for a standby by a planned move, once, and only where a
//! planned move can be made.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on has failed

#[allow(dead_code)] // shared with the sequences, which use more of it
mod world;

use helios_api::control::Slowness;
use helios_cluster::{OperationKind, Outcome, Request, Settings, decide};
use world::{Fault, World, name};

/// Ticks of the model in a second.
const SECOND: u64 = 100;

/// Between two such moves, in seconds.
const INTERVAL: u64 = 20;

fn running(count: usize) -> World {
    let settings = Settings {
        slow_interval_ms: INTERVAL * 1000,
        ..Settings::default()
    };
    let mut world = World::new(count, settings);
    world.settle();
    world
}

fn slow() -> Slowness {
    Slowness {
        threshold_ms: 500,
        median_ms: 800,
        for_ms: 12_000,
    }
}

fn steps(world: &mut World, ticks: u64) {
    for _ in 0..ticks {
        world.step();
    }
}

#[test]
fn a_slow_primary_is_left_and_not_gone_back_to_before_the_interval() {
    let mut world = running(2);
    world.slow = Some(slow());
    // Not sooner after the cluster was made.
    steps(&mut world, (INTERVAL - 2) * SECOND);
    assert_eq!(world.durable.primary_name(), Some(&name(1)));
    assert!(world.durable.operations.is_empty());
    steps(&mut world, 2 * SECOND);
    world.settle();
    world.check_nothing_lost();
    assert_eq!(world.durable.primary_name(), Some(&name(2)));
    let record = world.durable.operations.last().unwrap().clone();
    assert_eq!(record.kind, OperationKind::Switchover);
    assert_eq!(record.outcome, Outcome::Succeeded);
    let cause = "primary is slow: heartbeats take 800 ms (median), over 500 ms for 12000 ms";
    assert_eq!(record.cause, cause);
    // The new one is as slow: nothing moves for as long, then once.
    steps(&mut world, (INTERVAL - 2) * SECOND);
    assert_eq!(world.durable.operations.len(), 1);
    steps(&mut world, 2 * SECOND);
    world.settle();
    assert_eq!(world.durable.operations.len(), 2);
    assert_eq!(world.durable.primary_name(), Some(&name(1)));
}

#[test]
fn a_move_for_another_reason_counts_for_the_interval() {
    let mut world = running(2);
    steps(&mut world, (INTERVAL + 1) * SECOND);
    world.request = Some(Request::Switchover { to: None });
    world.step();
    world.settle();
    world.slow = Some(slow());
    steps(&mut world, (INTERVAL - 2) * SECOND);
    assert_eq!(world.durable.operations.len(), 1);
}

#[test]
fn without_a_fit_standby_nothing_moves_until_there_is_one() {
    let mut world = running(2);
    steps(&mut world, (INTERVAL + 1) * SECOND);
    world.request = Some(Request::Fence { instance: name(2) });
    steps(&mut world, 5 * SECOND);
    world.slow = Some(slow());
    steps(&mut world, 5 * SECOND);
    assert!(world.durable.operations.is_empty());
    assert_eq!(world.durable.primary_name(), Some(&name(1)));
    world.request = Some(Request::Unfence { instance: name(2) });
    for _ in 0..30 * SECOND {
        world.step();
        if !world.durable.operations.is_empty() {
            break;
        }
    }
    assert_eq!(world.durable.primary_name(), Some(&name(2)));
}

/// A primary that has died is a failover's matter, however slow it was before.
#[test]
fn latency_alone_never_begins_a_failover() {
    let mut world = running(2);
    steps(&mut world, (INTERVAL + 1) * SECOND);
    world.stop(&name(1));
    world.slow = Some(slow());
    world.settle();
    let kinds: Vec<_> = world.durable.operations.iter().map(|op| op.kind).collect();
    assert_eq!(kinds, [OperationKind::Failover]);
}

/// One fault at every point of such a move: it ends as a requested one does.
#[test]
fn a_fault_at_every_point_of_it() {
    let run = |faults: &[(u64, Fault)]| {
        let mut world = running(2);
        steps(&mut world, (INTERVAL + 1) * SECOND);
        let base = world.points;
        world.faults = faults.iter().map(|(at, f)| (base + at, *f)).collect();
        world.slow = Some(slow());
        world.step();
        world.settle();
        world.check_nothing_lost();
        world.points - base
    };
    let points = run(&[]);
    assert!(points > 10, "{points}");
    for at in 0..points {
        for fault in [Fault::Controller, Fault::Postmaster(1), Fault::Machine(2)] {
            run(&[(at, fault)]);
        }
    }
}

/// One of several proxies may have a slow way to the primary; one that is of another epoch speaks of
/// another primary.
#[test]
fn most_of_several_proxies_must_agree() {
    let mut world = running(2);
    steps(&mut world, (INTERVAL + 1) * SECOND);
    let epoch = world.durable.epoch;
    let begun = |reports: &[(u64, bool)]| {
        let mut obs = world.observe();
        let (_, one) = obs.proxies.pop_first().unwrap();
        let one = one.unwrap();
        for (at, (behind, is_slow)) in reports.iter().enumerate() {
            let mut status = one.clone();
            status.epoch = helios_api::Epoch(epoch.0 - behind);
            status.slow = is_slow.then(slow);
            obs.proxies.insert(format!("proxy-{at}"), Some(status));
        }
        obs.proxies.insert("silent".to_owned(), None);
        let now = world.now();
        let decision = decide(&world.settings, &world.durable, &obs, now).unwrap();
        decision.next.moving().is_some()
    };
    assert!(begun(&[(0, true)]));
    assert!(!begun(&[(0, false)]));
    assert!(!begun(&[(0, true), (0, false)]));
    assert!(begun(&[(0, true), (0, true), (0, false)]));
    assert!(!begun(&[(1, true)]));
    assert!(!begun(&[(1, true), (0, false)]));
    assert!(!begun(&[]));
}
