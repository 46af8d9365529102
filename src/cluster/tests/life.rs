//! What happens to a cluster that is up: instances are set aside, fenced, removed, told settings.
//!
//! In the model of `world`, which checks in every round that one instance at most is writable and
//! that nothing acknowledged is lost.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on has failed

#[allow(dead_code, reason = "faults are injected by the other file")]
mod world;

use helios_api::agent::ServerSettings;
use helios_cluster::{Durability, Mode, Refusal, Request, Settings, elect};
use world::{Role, World, name};

fn running(count: usize, durability: Durability) -> World {
    let settings = Settings {
        durability,
        ..Settings::default()
    };
    let mut world = World::new(count, settings);
    world.settle();
    steps(&mut world, 5);
    world
}

fn steps(world: &mut World, count: usize) {
    for _ in 0..count {
        world.step();
    }
}

fn ask(world: &mut World, request: Request) -> Result<Option<u64>, Refusal> {
    world.request = Some(request);
    world.step();
    world.answers.last().cloned().unwrap()
}

#[test]
fn nobody_waits_for_a_standby_that_is_set_aside_and_nobody_moves_to_it() {
    let mut world = running(3, Durability::Preferred);
    world.aside = [name(2)].into();
    steps(&mut world, 300);
    assert_eq!(world.durable.sync.target(), [name(3)].into());
    assert!(world.durable.sync.is_settled());
    // It goes on streaming: stopping it is somebody else's business.
    assert_eq!(world.instances[&name(2)].role, Role::Standby);
    let to = Request::Switchover { to: Some(name(2)) };
    let refused = ask(&mut world, to);
    assert!(matches!(refused, Err(Refusal::NotReadyToTakeOver { .. })));
    ask(&mut world, Request::Switchover { to: None }).unwrap();
    steps(&mut world, 600);
    assert_eq!(world.durable.primary_name(), Some(&name(3)));
    world.aside.clear();
    world.settle();
    world.check_nothing_lost();
}

#[test]
fn commits_that_must_wait_for_somebody_go_on_waiting_for_the_last_one() {
    let mut world = running(2, Durability::Required);
    world.aside = [name(2)].into();
    steps(&mut world, 300);
    assert_eq!(world.durable.sync.target(), [name(2)].into());
}

#[test]
fn a_removed_instance_is_stopped_then_its_slot_dropped_then_it_is_forgotten() {
    let mut world = running(3, Durability::Preferred);
    world.removed = [name(3)].into();
    let forget = || Request::Forget { instance: name(3) };
    let early = ask(&mut world, forget());
    assert!(
        matches!(early, Err(Refusal::StillCounts { .. })),
        "{early:?}"
    );
    steps(&mut world, 400);
    assert_eq!(world.instances[&name(3)].role, Role::Stopped);
    assert_eq!(world.durable.sync.target(), [name(2)].into());
    assert_eq!(world.dropped, [name(3)]);
    assert!(world.durable.members[&name(3)].slot_dropped);
    assert_eq!(ask(&mut world, forget()), Ok(None));
    world.instances.remove(&name(3));
    world.removed.clear();
    steps(&mut world, 50);
    assert!(!world.durable.members.contains_key(&name(3)));
    world.check_nothing_lost();
}

#[test]
fn one_that_is_wanted_again_comes_back() {
    let mut world = running(3, Durability::Preferred);
    world.removed = [name(3)].into();
    steps(&mut world, 400);
    assert_eq!(world.instances[&name(3)].role, Role::Stopped);
    world.removed.clear();
    steps(&mut world, 600);
    assert_eq!(world.instances[&name(3)].role, Role::Standby);
    assert!(!world.durable.members[&name(3)].slot_dropped);
    assert!(world.durable.sync.target().contains(&name(3)));
}

#[test]
fn the_primary_is_not_forgotten_and_is_moved_before_it_is_stopped() {
    let mut world = running(3, Durability::Preferred);
    world.removed = [name(1)].into();
    steps(&mut world, 300);
    assert_eq!(world.instances[&name(1)].role, Role::Primary);
    let refused = ask(&mut world, Request::Forget { instance: name(1) });
    assert!(matches!(refused, Err(Refusal::IsPrimary { .. })));
    ask(&mut world, Request::Switchover { to: None }).unwrap();
    steps(&mut world, 900);
    assert_eq!(world.instances[&name(1)].role, Role::Stopped);
    assert_eq!(world.dropped, [name(1)]);
    world.check_nothing_lost();
}

#[test]
fn a_fenced_primary_stays_stopped_and_comes_back_in_an_epoch_of_its_own() {
    for count in [1, 3] {
        let mut world = running(count, Durability::Preferred);
        let epoch = world.durable.epoch;
        let fence = Request::FencePrimary { instance: name(1) };
        assert_eq!(ask(&mut world, fence), Ok(None));
        steps(&mut world, 2_000);
        assert_eq!(world.instances[&name(1)].role, Role::Stopped);
        assert_eq!(world.durable.primary_name(), Some(&name(1)));
        assert_eq!(world.durable.mode, Mode::Steady);
        let free = Request::Unfence { instance: name(1) };
        assert_eq!(ask(&mut world, free), Ok(None));
        world.settle();
        assert!(world.durable.epoch > epoch);
        steps(&mut world, 20);
        world.check_nothing_lost();
    }
}

#[test]
fn every_agent_is_told_new_settings_once() {
    let mut world = running(3, Durability::Preferred);
    let mut server = ServerSettings::default();
    server.parameters.insert("work_mem".into(), "8MB".into());
    world.settings.server = Some(server.clone());
    // One of an earlier version knows nothing of settings, and is left alone.
    world.instances.get_mut(&name(3)).unwrap().told.clear();
    steps(&mut world, 20);
    for (instance, told) in [
        (1, server.fingerprint()),
        (2, server.fingerprint()),
        (3, String::new()),
    ] {
        assert_eq!(world.instances[&name(instance)].told, told);
    }
    let told = |line: &&String| line.contains("Configure");
    assert_eq!(world.trace.iter().filter(told).count(), 2);
}

/// A cluster of three whose primary has moved away from its first instance, with commits; and the
/// numbers of its primary and of the third one.
fn moved() -> (World, usize, usize) {
    let mut world = running(3, Durability::Preferred);
    ask(&mut world, Request::Switchover { to: None }).unwrap();
    steps(&mut world, 600);
    world.settle();
    match world.durable.primary_name() {
        Some(primary) if *primary == name(2) => (world, 2, 3),
        Some(primary) if *primary == name(3) => (world, 3, 2),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_cluster_made_again_goes_on_where_the_data_are_furthest() {
    for with in [&[1, 2, 3][..], &[1], &[2, 3], &[]] {
        let (mut world, primary, _) = moved();
        let kept: Vec<usize> = with.iter().copied().chain([primary]).collect();
        world.made_again(&kept);
        let epoch = world.instances[&name(primary)].epoch;
        world.settle();
        // It was the primary, and holds as much as anybody.
        assert_eq!(
            world.durable.primary_name(),
            Some(&name(primary)),
            "{kept:?}"
        );
        assert!(world.durable.epoch > epoch);
        world.check_nothing_lost();
    }
}

#[test]
fn a_standby_takes_over_where_it_is_all_that_is_left() {
    for with_first in [true, false] {
        let (mut world, _, other) = moved();
        let kept = match with_first {
            true => vec![1, other],
            false => vec![other],
        };
        world.made_again(&kept);
        // A commit is confirmed by one of the two: with one volume left the last ones may be gone.
        let log = |n: &usize| world.instances[&name(*n)].log.len();
        let most = kept.iter().map(log).max().unwrap();
        world.settle();
        let primary = world.durable.primary_name().unwrap().clone();
        let holds = kept.iter().any(|n| name(*n) == primary);
        assert!(holds, "{kept:?} {primary}");
        assert!(world.instances[&primary].log.len() >= most);
    }
}

#[test]
fn nothing_is_initialised_while_somebody_may_hold_data() {
    let (mut world, primary, _) = moved();
    world.made_again(&[primary]);
    let log = world.instances[&name(primary)].log.clone();
    let silent = world.tick + 500;
    world
        .instances
        .get_mut(&name(primary))
        .unwrap()
        .silent_until = silent;
    steps(&mut world, 400);
    assert_eq!(world.durable.mode, Mode::Bootstrap);
    assert_eq!(world.instances[&name(1)].role, Role::Empty);
    world.settle();
    assert_eq!(world.durable.primary_name(), Some(&name(primary)));
    assert!(world.instances[&name(primary)].log.starts_with(&log));
}

#[test]
fn the_one_that_fell_behind_is_not_chosen() {
    let mut world = running(3, Durability::Preferred);
    // The first one, the primary, is gone for a while, and another one takes over.
    world.stop(&name(1));
    let silent = world.tick + 100_000;
    world.instances.get_mut(&name(1)).unwrap().silent_until = silent;
    steps(&mut world, 1_000);
    let primary = world.durable.primary_name().unwrap().clone();
    assert_ne!(primary, name(1));
    world.made_again(&[1, 2, 3]);
    world.instances.get_mut(&name(1)).unwrap().silent_until = 0;
    world.settle();
    assert_eq!(world.durable.primary_name(), Some(&primary));
    world.check_nothing_lost();
}

/// Who would be promoted is one of those that confirm commits, and the same one as long as that holds.
#[test]
fn the_heir_is_one_that_could_be_promoted() {
    let mut world = running(3, Durability::Preferred);
    let heir = |world: &World, before: Option<&_>| {
        elect::heir(&world.settings, &world.durable, &world.observe(), before)
    };
    assert_eq!(world.durable.primary_name(), Some(&name(1)));
    let first = heir(&world, None).unwrap();
    assert_ne!(first, name(1));
    for before in [name(2), name(3)] {
        assert_eq!(heir(&world, Some(&before)), Some(before));
    }
    assert_eq!(heir(&world, Some(&name(1))), Some(first));
    // One that nobody waits for may be promoted, but it is not counted on.
    world.aside = [name(2)].into();
    steps(&mut world, 300);
    assert_eq!(heir(&world, Some(&name(2))), Some(name(3)));
    ask(&mut world, Request::Switchover { to: None }).unwrap();
    assert_eq!(heir(&world, Some(&name(3))), None);
}
