//! Every sequence, with a death at every point of it.
//!
//! Invariants that the model checks in every round: one writable instance at most, nothing
//! diverged streams, whoever sessions are resumed on holds every acknowledged commit. And it always
//! ends with a primary, everybody else behind it, and the proxy on it.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on has failed

mod world;

use std::collections::BTreeSet;

use helios_api::agent::{AgentCommand, StopMode};
use helios_api::control::LostCommits;
use helios_cluster::{
    Action, Durability, OperationKind, Outcome, Refusal, Request, Settings, Step,
};
use world::{Fault, Role, World, name};

fn settings(durability: Durability) -> Settings {
    Settings {
        durability,
        ..Settings::default()
    }
}

fn running(count: usize, durability: Durability) -> World {
    let mut world = World::new(count, settings(durability));
    world.settle();
    for _ in 0..5 {
        world.step();
    }
    world
}

/// What a sequence begins with.
#[derive(Debug, Clone, Copy)]
enum Start {
    Switchover,
    Crash,
    StandbyCrash,
    DiesWhenPromoted,
}

fn begin(world: &mut World, start: Start) {
    match start {
        Start::Switchover => world.request = Some(Request::Switchover { to: None }),
        Start::Crash => world.stop(&name(1)),
        Start::StandbyCrash => world.stop(&name(2)),
        Start::DiesWhenPromoted => {
            let standby = world.instances.get_mut(&name(2)).unwrap();
            standby.dies_when_promoted = true;
            world.request = Some(Request::Switchover { to: None });
        }
    }
}

/// Runs a sequence with faults at points counted from its beginning; returns the points it took.
fn run(
    count: usize,
    durability: Durability,
    start: Start,
    faults: &[(u64, Fault)],
    reverse: bool,
) -> u64 {
    let mut world = running(count, durability);
    let base = world.points;
    world.faults = faults.iter().map(|(at, f)| (base + at, *f)).collect();
    world.reverse = reverse;
    begin(&mut world, start);
    world.step();
    world.settle();
    world.check_nothing_lost();
    assert!(!world.acknowledged.is_empty());
    let acknowledged = world.acknowledged.len();
    // A fault in the last moment of the sequence takes its time as well.
    for _ in 0..150 {
        world.step();
    }
    assert!(
        world.acknowledged.len() > acknowledged,
        "commits do not go on: {:#?}
{}",
        world.durable,
        world.trace.join(
            "
"
        )
    );
    world.points - base
}

const STARTS: [Start; 4] = [
    Start::Switchover,
    Start::Crash,
    Start::StandbyCrash,
    Start::DiesWhenPromoted,
];

/// One fault of every kind at every point of every sequence.
fn every_point(count: usize, durability: Durability) {
    let mut kinds = vec![Fault::Controller];
    kinds.extend((1..=count).map(Fault::Postmaster));
    kinds.extend((1..=count).map(Fault::Machine));
    for start in STARTS {
        for reverse in [false, true] {
            let points = run(count, durability, start, &[], reverse);
            for at in 0..points {
                for kind in &kinds {
                    run(count, durability, start, &[(at, *kind)], reverse);
                }
            }
        }
    }
}

#[test]
fn one_fault_at_every_point_of_two_instances() {
    every_point(2, Durability::Preferred);
}

#[test]
fn one_fault_at_every_point_of_two_instances_with_required_durability() {
    every_point(2, Durability::Required);
}

#[test]
fn one_fault_at_every_point_of_three_instances() {
    every_point(3, Durability::Preferred);
}

#[test]
fn two_faults_at_all_pairs_of_points() {
    let kinds = [
        Fault::Controller,
        Fault::Postmaster(1),
        Fault::Postmaster(2),
    ];
    for start in [Start::Switchover, Start::Crash] {
        let points = run(2, Durability::Preferred, start, &[], false).min(40);
        for first in 0..points {
            for second in (first + 1..points + 10).step_by(2) {
                for a in kinds {
                    for b in kinds {
                        let faults = [(first, a), (second, b)];
                        run(2, Durability::Preferred, start, &faults, false);
                    }
                }
            }
        }
    }
}

#[test]
fn one_instance_restarts_in_place_and_refuses_a_switchover() {
    let mut world = running(1, Durability::Preferred);
    world.stop(&name(1));
    world.step();
    world.settle();
    world.check_nothing_lost();
    let op = world.durable.operations.last().unwrap();
    assert_eq!(op.kind, OperationKind::Restart);
    assert_eq!(world.durable.epoch.0, 1);
    world.request = Some(Request::Switchover { to: None });
    world.step();
    assert!(matches!(
        world.answers.last(),
        Some(Err(Refusal::NoStandby { .. }))
    ));
}

#[test]
fn a_switchover_moves_the_primary_and_records_its_phases() {
    let mut world = running(2, Durability::Preferred);
    world.request = Some(Request::Switchover { to: Some(name(2)) });
    world.step();
    world.settle();
    let op = world.durable.operations.last().unwrap();
    assert_eq!(
        (op.kind, &op.outcome),
        (OperationKind::Switchover, &Outcome::Succeeded)
    );
    assert_eq!((&op.from, &op.to), (&name(1), &name(2)));
    let phases: Vec<_> = op.phases.iter().map(|p| p.phase.as_str()).collect();
    assert_eq!(
        phases,
        [
            "prepare", "drain", "fence", "choose", "promote", "replay", "rejoin"
        ]
    );
    assert_eq!(world.durable.epoch.0, 2);
    assert_eq!(world.durable.fences.len(), 1);
}

/// Its standby loses its connection at every moment of a switchover: for a moment, which is waited
/// for, or for longer, in which case nobody waits on.
#[test]
fn a_switchover_waits_for_a_standby_that_comes_back_at_once() {
    let (mut waited, mut given_up) = (0, 0);
    for ticks in [20, 150, 400] {
        for delay in 0..12 {
            let mut world = running(2, Durability::Preferred);
            world.request = Some(Request::Switchover { to: Some(name(2)) });
            for _ in 0..=delay {
                world.step();
            }
            let Some(m) = world.durable.moving() else {
                continue;
            };
            let undone = matches!(m.step, Step::Prepare { .. } | Step::Drain { .. });
            world.disconnected = true;
            for _ in 0..ticks {
                world.step();
            }
            world.disconnected = false;
            world.settle();
            world.check_nothing_lost();
            let op = world.durable.operations.last().unwrap();
            match op.outcome {
                Outcome::Succeeded => waited += usize::from(undone),
                _ => given_up += 1,
            }
            // A tick is 10 ms.
            let grace = world.settings.standby_grace_ms / 10;
            let expected = !undone || ticks < grace;
            assert_eq!(op.outcome == Outcome::Succeeded, expected, "{ticks} {op:?}");
        }
    }
    assert!(waited > 0 && given_up > 0, "{waited} {given_up}");
}

/// How many ticks after a switchover's end the old primary is started again.
fn ticks_until_it_starts(durability: Durability) -> usize {
    let mut world = running(2, durability);
    world.request = Some(Request::Switchover { to: None });
    world.step();
    while world.durable.moving().is_some() {
        world.step();
    }
    let mut ticks = 0;
    while world.instances[&name(1)].role != Role::Standby {
        world.step();
        ticks += 1;
    }
    ticks
}

/// The old primary's start lets the clients' held statements go first, unless these wait for it.
#[test]
fn the_old_primary_comes_back_behind_the_clients_that_do_not_need_it() {
    // A tick is 10 ms.
    assert!(ticks_until_it_starts(Durability::Preferred) >= 10);
    assert!(ticks_until_it_starts(Durability::Required) < 5);
}

/// Asks for a switchover and says how the old primary was stopped, and whether everybody who may
/// confirm commits stopped receiving beside it. `None`: it came to no fence.
fn planned_fence(world: &mut World) -> Option<(StopMode, bool)> {
    let known = world.answers.len();
    world.request = Some(Request::Switchover { to: None });
    for _ in 0..50 {
        world.step();
        if matches!(world.answers.get(known), Some(Err(_))) {
            return None;
        }
        let moving = world.durable.moving();
        let Some(m) = moving.filter(|m| matches!(m.step, Step::Fence { .. })) else {
            continue;
        };
        let commands = m.todo.iter().filter_map(|action| match action {
            Action::Agent { instance, request } => Some((instance, &request.command)),
            Action::Proxy { .. } => None,
        });
        let (mut mode, mut stopped) = (None, BTreeSet::new());
        for (instance, command) in commands {
            match command {
                AgentCommand::Fence { mode: how } => mode = Some(*how),
                AgentCommand::StopReceiver => drop(stopped.insert(instance.clone())),
                _ => {}
            }
        }
        let mut confirm = world.durable.sync.possible.iter().flatten();
        let all = confirm.all(|name| stopped.contains(name)) && !stopped.is_empty();
        return Some((mode.unwrap(), all));
    }
    None
}

/// The old primary is halted only where everybody who may have confirmed a commit is there and
/// stops receiving; else it is stopped cleanly, so that its standbys get all of its WAL.
#[test]
fn a_planned_stop_is_clean_unless_nothing_acknowledged_needs_it() {
    for durability in [Durability::Preferred, Durability::Required] {
        for count in [2, 3] {
            let mut world = running(count, durability);
            assert_eq!(planned_fence(&mut world), Some((StopMode::Halt, true)));
            world.settle();
            world.check_nothing_lost();
        }
    }
    let asynchronous = Settings {
        synchronous: false,
        ..Settings::default()
    };
    let mut world = World::new(2, asynchronous);
    world.settle();
    assert_eq!(planned_fence(&mut world), Some((StopMode::Fast, false)));
    world.settle();
    world.check_nothing_lost();
    // A standby that comes back while commits may still rest on the primary alone.
    let mut seen = BTreeSet::new();
    for delay in 0..120 {
        let mut world = running(2, Durability::Preferred);
        world.stop(&name(2));
        for _ in 0..delay {
            world.step();
        }
        let Some((mode, stopped)) = planned_fence(&mut world) else {
            continue;
        };
        let alone = world.durable.sync.possible.iter().any(BTreeSet::is_empty);
        let expected = if alone {
            StopMode::Fast
        } else {
            StopMode::Halt
        };
        assert_eq!((mode, stopped), (expected, !alone), "{delay}");
        seen.insert(alone);
        world.settle();
        world.check_nothing_lost();
    }
    assert_eq!(seen.len(), 2, "only one of the two was met");
}

#[test]
fn requests_are_refused_with_a_reason() {
    let mut world = running(3, Durability::Preferred);
    let ask = |request: Request, world: &mut World| {
        world.request = Some(request);
        world.step();
        world.answers.last().cloned().unwrap()
    };
    let to = |n: usize| Request::Switchover { to: Some(name(n)) };
    assert!(matches!(
        ask(to(9), &mut world),
        Err(Refusal::Unknown { .. })
    ));
    assert!(matches!(
        ask(to(1), &mut world),
        Err(Refusal::AlreadyPrimary { .. })
    ));
    let fence = |n: usize| Request::Fence { instance: name(n) };
    assert!(matches!(
        ask(fence(1), &mut world),
        Err(Refusal::IsPrimary { .. })
    ));
    assert!(matches!(
        ask(fence(9), &mut world),
        Err(Refusal::Unknown { .. })
    ));
    assert!(matches!(ask(fence(2), &mut world), Ok(None)));
    assert!(matches!(
        ask(to(2), &mut world),
        Err(Refusal::NotReadyToTakeOver { .. })
    ));
    world.settle();
    assert_eq!(world.instances[&name(2)].role, Role::Stopped);
    let free = Request::Unfence { instance: name(2) };
    assert!(matches!(ask(free, &mut world), Ok(None)));
    world.settle();
    assert_eq!(world.instances[&name(2)].role, Role::Standby);
    assert!(matches!(ask(to(2), &mut world), Ok(Some(_))));
    assert!(matches!(ask(to(3), &mut world), Err(Refusal::UnderWay)));
    world.settle();
}

#[test]
fn a_lone_primary_that_had_gone_on_is_never_overtaken() {
    // The standby dies, commits go on without it, then the primary dies while the standby is on
    // its way back: it lacks commits, so the primary is started again instead.
    for delay in 0..60 {
        let mut world = running(2, Durability::Preferred);
        world.stop(&name(2));
        for _ in 0..delay {
            world.step();
        }
        world.stop(&name(1));
        world.step();
        world.settle();
        world.check_nothing_lost();
    }
}

/// Commits wait for nobody: what a crash loses must be marked, what it does not lose need not be.
#[test]
fn asynchronous_failovers_say_what_they_may_have_lost() {
    let asynchronous = || Settings {
        synchronous: false,
        ..Settings::default()
    };
    let run = |at: Option<u64>, fault: Fault, idle: bool| {
        let mut world = World::new(2, asynchronous());
        world.settle();
        for _ in 0..5 {
            world.step();
        }
        world.faults = at
            .map(|at| (world.points + at, fault))
            .into_iter()
            .collect();
        world.idle = idle;
        if idle {
            (0..10).for_each(|_| world.step());
        } else {
            world.hold_back = true;
            (0..3).for_each(|_| world.step());
        }
        let base = world.points;
        world.stop(&name(1));
        world.step();
        world.hold_back = false;
        world.settle();
        (world.points - base, world)
    };
    for fault in [
        Fault::Controller,
        Fault::Postmaster(1),
        Fault::Postmaster(2),
        Fault::Machine(1),
        Fault::Machine(2),
    ] {
        let (points, _) = run(None, fault, false);
        for at in 0..points + 30 {
            run(Some(at), fault, false);
        }
    }
    // The model itself checks that nothing is lost without the mark; here both ends of it.
    let (_, world) = run(None, Fault::Controller, false);
    assert_eq!(world.durable.primary_name(), Some(&name(2)));
    assert_eq!(world.durable.fences[0].lost, LostCommits::Possible);
    let (_, world) = run(None, Fault::Controller, true);
    assert_eq!(world.durable.fences[0].lost, LostCommits::None);
    let record = world.durable.operations.last().unwrap();
    assert_eq!(record.lost, LostCommits::None);
}

#[test]
fn a_primary_whose_data_are_gone_is_replaced_by_a_standby_that_must_hold_everything() {
    // Also when the standby was stopped as well: it is started without anybody to follow.
    for stopped in [false, true] {
        for at in 0..40 {
            let mut world = running(2, Durability::Preferred);
            let base = world.points;
            world.faults = vec![(base + at, Fault::Controller)];
            world.wipe(&name(1));
            if stopped {
                world.stop(&name(2));
            }
            world.step();
            world.settle();
            assert_eq!(world.durable.primary_name(), Some(&name(2)));
            world.check_nothing_lost();
        }
    }
}

#[test]
fn what_nobody_can_prove_takes_a_persons_word() {
    for at in 0..60 {
        let mut world = running(2, Durability::Preferred);
        let ask = |request: Request, world: &mut World| {
            world.request = Some(request);
            world.step();
            world.answers.last().cloned().unwrap()
        };
        assert!(matches!(
            ask(Request::Failover, &mut world),
            Err(Refusal::PrimaryUp { .. })
        ));
        // Commits go on without the standby; then the primary's data are gone.
        let fence = Request::Fence { instance: name(2) };
        assert!(ask(fence, &mut world).is_ok());
        for _ in 0..400 {
            world.step();
        }
        assert!(world.durable.sync.target().is_empty());
        world.wipe(&name(1));
        for _ in 0..50 {
            world.step();
        }
        let none = ask(Request::Failover, &mut world);
        assert!(matches!(none, Err(Refusal::NoStandby { .. })), "{none:?}");
        let unfence = Request::Unfence { instance: name(2) };
        assert!(ask(unfence, &mut world).is_ok());
        for _ in 0..2_000 {
            world.step();
        }
        // Nothing happens without a word, however long it takes.
        assert_eq!(world.durable.primary_name(), Some(&name(1)));
        let before = world.acknowledged.clone();
        let base = world.points;
        world.faults = vec![(base + at, Fault::Controller)];
        // An executor that dies before the word is durable is asked again.
        world.request = Some(Request::Failover);
        world.step();
        world.step();
        assert!(matches!(world.answers.last(), Some(Ok(Some(_)))));
        world.settle();
        assert_eq!(world.durable.primary_name(), Some(&name(2)));
        assert_eq!(world.durable.fences[0].lost, LostCommits::Possible);
        let lost = |id: &u64| !world.acknowledged.contains(id);
        assert!(before.iter().any(lost), "nothing could be lost");
        let record = world.durable.operations.last().unwrap();
        assert_eq!(record.lost, LostCommits::Possible);
        assert!(record.cause.starts_with("forced"), "{}", record.cause);
    }
}

#[test]
fn lists_stay_bounded() {
    let mut world = running(2, Durability::Preferred);
    for _ in 0..80 {
        world.request = Some(Request::Switchover { to: None });
        world.step();
        world.settle();
    }
    assert_eq!(world.durable.fences.len(), 64);
    assert_eq!(world.durable.operations.len(), 10);
    assert_eq!(world.durable.epoch.0, 81);
}

/// A cluster whose primaries hold a lease.
fn leasing(count: usize, settings: Settings) -> World {
    let settings = Settings {
        lease_ms: Some(3_000),
        ..settings
    };
    let mut world = World::new(count, settings);
    world.settle();
    for _ in 0..200 {
        world.step();
    }
    world
}

/// The primary is cut off from everybody, and the controller, or another machine, fails at every
/// point of what follows: the model checks that there are never two writable servers, although
/// clocks run at other rates and guards come late.
#[test]
fn a_primary_that_is_cut_off_is_replaced_when_its_lease_has_ended() {
    for (count, synchronous) in [(2, true), (3, true), (2, false), (3, false)] {
        let settings = Settings {
            synchronous,
            ..Settings::default()
        };
        let mut faults = vec![None, Some(Fault::Controller)];
        faults.extend((2..=count).map(|n| Some(Fault::Postmaster(n))));
        faults.extend((2..=count).map(|n| Some(Fault::Machine(n))));
        for fault in faults {
            for at in (0..1_600).step_by(if fault.is_some() { 61 } else { 1_600 }) {
                let mut world = leasing(count, settings.clone());
                let base = world.points;
                world.faults.push((base, Fault::Network(1)));
                world.faults.extend(fault.map(|f| (base + at, f)));
                world.step();
                for _ in 0..2_000 {
                    world.step();
                }
                world.settle();
                if synchronous {
                    world.check_nothing_lost();
                }
                if fault.is_none() {
                    let op = world.durable.operations.last().unwrap();
                    assert_eq!(op.kind, OperationKind::Failover, "{op:?}");
                    assert_eq!(op.outcome, Outcome::Succeeded, "{op:?}");
                    assert_ne!(op.to, name(1));
                    // From the cut on: the silence, the lease and its margin.
                    let micros: u64 = op.phases.iter().map(|p| p.micros).sum();
                    println!("{count} {synchronous}: {op:?} {micros}");
                }
            }
        }
    }
}

/// A short cut demotes nobody.
#[test]
fn a_primary_that_is_back_within_its_lease_goes_on() {
    let mut world = leasing(2, Settings::default());
    let base = world.points;
    world.cut_ticks = 200;
    world.faults.push((base, Fault::Network(1)));
    for _ in 0..600 {
        world.step();
    }
    world.settle();
    assert!(world.durable.operations.is_empty());
    assert_eq!(world.durable.primary_name(), Some(&name(1)));
}

/// The controller cannot reach the primary, whose standby can: or there is no controller at all.
#[test]
fn a_primary_that_its_standby_confirms_goes_on() {
    for away in [false, true] {
        for count in [2, 3] {
            let mut world = leasing(count, Settings::default());
            let until = world.tick + 3_000;
            if away {
                world.away_until = until;
            } else {
                world.instances.get_mut(&name(1)).unwrap().unheard_until = until;
            }
            let before = world.acknowledged.len();
            for _ in 0..3_000 {
                world.step();
                assert_eq!(world.instances[&name(1)].role, Role::Primary);
            }
            assert!(world.acknowledged.len() > before + 500);
            world.settle();
            assert!(
                world.durable.operations.is_empty(),
                "{:?}",
                world.durable.operations
            );
        }
    }
}

/// Where nobody could take over there is nothing to be gained by stopping.
#[test]
fn a_primary_that_nobody_can_replace_goes_on() {
    let mut world = leasing(2, Settings::default());
    world.stop(&name(2));
    world.instances.get_mut(&name(2)).unwrap().silent_until = world.tick + 4_000;
    // Commits have stopped waiting for it, and the primary knows of that.
    for _ in 0..400 {
        world.step();
    }
    world.instances.get_mut(&name(1)).unwrap().cut_until = world.tick + 1_000;
    for _ in 0..1_000 {
        world.step();
        assert_eq!(world.instances[&name(1)].role, Role::Primary);
    }
}

/// With a delay, a primary that has crashed is tried where it is first.
#[test]
fn a_delay_tries_the_old_primary_first() {
    let settings = Settings {
        failover_delay_ms: 5_000,
        ..Settings::default()
    };
    let mut world = World::new(2, settings);
    world.settle();
    world.stop(&name(1));
    world.step();
    world.settle();
    world.check_nothing_lost();
    let op = world.durable.operations.last().unwrap();
    assert_eq!((op.kind, &op.to), (OperationKind::Restart, &name(1)));
}
