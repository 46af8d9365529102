//! What is next, as tables: state and observation in, one step out.

use super::*;
use helios_api::agent::{SettingsReport, StandbyPosition};
use helios_api::{Endpoint, Epoch, Host, Lsn, Timeline};
use helios_cluster::{Contact, InstanceView, Member, Primary, SyncState};

fn name(n: u32) -> InstanceName {
    format!("pg-{n}").parse().unwrap()
}

/// A cluster that is up, with everything as it should be: pg-1 is the primary.
struct Scene {
    given: Given,
    state: ClusterState,
    obs: Observation,
}

impl Scene {
    fn new(count: u32) -> Self {
        let mut scene = Self {
            given: Given {
                synchronous: true,
                ..Given::default()
            },
            state: ClusterState {
                epoch: Epoch(1),
                mode: Mode::Steady,
                primary: Some(Primary {
                    name: name(1),
                    timeline: Timeline(1),
                }),
                sync: SyncState::settled((2..=count).map(name).collect()),
                ..ClusterState::default()
            },
            obs: Observation::default(),
        };
        for n in 1..=count {
            scene.given.wanted.insert(name(n));
            let pod = PodView {
                name: format!("pg-{n}-0"),
                uid: format!("uid-{n}"),
                ready: true,
                ..PodView::default()
            };
            scene.given.pods.insert(name(n), pod);
            let member = Member {
                followed: Some(Timeline(1)),
                ..Member::default()
            };
            scene.state.members.insert(name(n), member);
            scene.says(n, standing(n == 1));
        }
        scene
    }

    fn says(&mut self, n: u32, instance: InstanceState) {
        let agent = AgentState {
            revision: 1,
            name: name(n),
            epoch: Epoch(1),
            fenced: false,
            instance,
            leaving: false,
            settings: SettingsReport::default(),
        };
        let view = InstanceView {
            endpoint: Endpoint {
                host: Host::Tcp("10.0.0.1".to_owned()),
                port: 5432,
            },
            contact: Contact::Answers(Box::new(agent)),
            lease: helios_cluster::Leased::default(),
        };
        self.obs.instances.insert(name(n), view);
    }

    fn settings(&mut self, n: u32, change: impl FnOnce(&mut SettingsReport)) {
        let view = self.obs.instances.get_mut(&name(n)).unwrap();
        match &mut view.contact {
            Contact::Answers(agent) => change(&mut agent.settings),
            Contact::Silent { .. } => panic!("silent"),
        }
    }

    fn pod(&mut self, n: u32) -> &mut PodView {
        self.given.pods.get_mut(&name(n)).unwrap()
    }

    fn outdated(&mut self, numbers: &[u32]) {
        for n in numbers {
            self.pod(*n).outdated = true;
        }
    }

    /// Commits rest on these.
    fn sync(&mut self, numbers: &[u32]) {
        self.state.sync = SyncState::settled(numbers.iter().map(|n| name(*n)).collect());
    }

    fn plan(&self) -> Plan {
        plan(&self.given, &self.state, &self.obs)
    }
}

fn standing(primary: bool) -> InstanceState {
    match primary {
        true => InstanceState::Primary {
            timeline: Timeline(1),
            position: Lsn(9),
            standbys: Vec::<StandbyPosition>::new(),
        },
        false => InstanceState::Standby {
            timeline: Timeline(1),
            received: Lsn(9),
            replayed: Lsn(9),
            heard_ms: Some(3),
        },
    }
}

fn stopped() -> InstanceState {
    InstanceState::Stopped {
        crashed: false,
        clean: true,
        timeline: Timeline(1),
    }
}

fn replaces(plan: &Plan) -> Option<InstanceName> {
    match &plan.act {
        Some(Act::Replace { instance, pod }) => {
            assert!(pod.uid.ends_with(&number(instance).to_string()));
            Some(instance.clone())
        }
        _ => None,
    }
}

fn request(plan: &Plan) -> Option<Request> {
    plan.request.as_ref().map(|(request, _)| request.clone())
}

const AWAY: Request = Request::Switchover { to: None };

#[test]
fn where_nothing_is_to_be_done_nothing_is() {
    for count in [1, 2, 3] {
        let plan = Scene::new(count).plan();
        assert_eq!((request(&plan), plan.act), (None, None));
        assert_eq!((plan.progress, plan.aside.len()), (Progress::Done, 0));
    }
}

#[test]
fn a_change_goes_standbys_first_one_by_one_then_the_primary_moves() {
    let mut scene = Scene::new(3);
    scene.outdated(&[1, 2, 3]);
    // First nobody waits for it, then it is stopped.
    let plan = scene.plan();
    assert_eq!(
        (plan.aside.clone(), replaces(&plan)),
        ([name(3)].into(), None)
    );
    scene.sync(&[2]);
    assert_eq!(replaces(&scene.plan()), Some(name(3)));
    // While it is away, and until it confirms commits again, nothing else happens.
    scene.pod(3).going = true;
    let plan = scene.plan();
    assert!(matches!(plan.progress, Progress::Waiting(_)));
    assert_eq!((plan.aside, plan.act), ([name(3)].into(), None));
    scene.given.pods.remove(&name(3));
    assert_eq!(
        (replaces(&scene.plan()), request(&scene.plan())),
        (None, None)
    );
    let back = PodView {
        uid: "uid-3".to_owned(),
        ready: true,
        ..PodView::default()
    };
    scene.given.pods.insert(name(3), back);
    let plan = scene.plan();
    let waits = "instance \"pg-3\": it does not confirm commits yet".to_owned();
    assert_eq!(plan.progress, Progress::Waiting(waits));
    assert_eq!((replaces(&plan), plan.aside.len()), (None, 0));
    // The next one.
    scene.sync(&[2, 3]);
    assert_eq!(scene.plan().aside, [name(2)].into());
    scene.sync(&[3]);
    assert_eq!(replaces(&scene.plan()), Some(name(2)));
    scene.pod(2).outdated = false;
    scene.sync(&[2, 3]);
    // The primary is moved, and its Pod is replaced as a standby's.
    let plan = scene.plan();
    assert_eq!((request(&plan), replaces(&plan)), (Some(AWAY), None));
    scene.state.primary = Some(Primary {
        name: name(3),
        timeline: Timeline(2),
    });
    scene.says(3, standing(true));
    scene.says(1, standing(false));
    scene.sync(&[1, 2]);
    assert_eq!(scene.plan().aside, [name(1)].into());
    scene.sync(&[2]);
    assert_eq!(replaces(&scene.plan()), Some(name(1)));
}

#[test]
fn a_standby_that_does_not_serve_stops_the_change_unless_it_is_what_changes() {
    let mut scene = Scene::new(3);
    scene.outdated(&[1, 3]);
    scene.says(2, stopped());
    scene.sync(&[3]);
    let plan = scene.plan();
    assert_eq!((replaces(&plan), request(&plan)), (None, None));
    assert!(matches!(plan.progress, Progress::Waiting(_)));
    // An image that cannot be pulled is given up for the next one.
    let mut scene = Scene::new(2);
    scene.outdated(&[2]);
    scene.pod(2).ready = false;
    scene.pod(2).trouble = Some("ErrImagePull: no such image".to_owned());
    scene.sync(&[]);
    assert_eq!(replaces(&scene.plan()), Some(name(2)));
    scene.pod(2).outdated = false;
    scene.outdated(&[1]);
    let waits = "instance \"pg-2\": ErrImagePull: no such image".to_owned();
    assert_eq!(scene.plan().progress, Progress::Waiting(waits));
}

#[test]
fn where_commits_have_to_wait_for_somebody_the_last_standby_is_replaced_all_the_same() {
    let mut scene = Scene::new(2);
    scene.outdated(&[2]);
    assert_eq!(replaces(&scene.plan()), None);
    scene.given.required = true;
    assert_eq!(replaces(&scene.plan()), Some(name(2)));
}

#[test]
fn a_lone_primary_is_replaced_where_it_is() {
    let mut scene = Scene::new(1);
    scene.outdated(&[1]);
    let plan = scene.plan();
    assert_eq!((replaces(&plan), request(&plan)), (Some(name(1)), None));
}

#[test]
fn parameters_that_need_a_start_roll_and_refused_ones_do_not() {
    let mut scene = Scene::new(2);
    for n in [1, 2] {
        scene.settings(n, |s| s.restart = vec!["shared_buffers".to_owned()]);
    }
    scene.sync(&[]);
    // Not in the set yet: it has to confirm commits before anything else, but it is what changes.
    assert_eq!(replaces(&scene.plan()), Some(name(2)));
    scene.sync(&[2]);
    scene.settings(2, |s| {
        *s = SettingsReport {
            refused: Some("could not access file".to_owned()),
            ..SettingsReport::default()
        };
    });
    let plan = scene.plan();
    assert_eq!((replaces(&plan), request(&plan)), (None, None));
}

#[test]
fn nothing_begins_while_the_primary_moves() {
    let mut scene = Scene::new(2);
    scene.outdated(&[1, 2]);
    scene.given.fenced = Fenced::All;
    scene.state.mode = Mode::Bootstrap;
    let plan = scene.plan();
    assert_eq!((request(&plan), plan.act), (None, None));
}

#[test]
fn the_highest_standby_goes_first_and_the_primary_only_after_it_has_moved() {
    let mut scene = Scene::new(3);
    scene.given.wanted = [name(1)].into();
    let plan = scene.plan();
    assert_eq!(plan.removed, [name(2), name(3)].into());
    assert_eq!((request(&plan), plan.act), (None, None));
    // Nothing is deleted before its slot is gone and commits rest elsewhere.
    scene.says(3, stopped());
    scene.sync(&[]);
    assert_eq!(scene.plan().act, None);
    scene.state.members.get_mut(&name(3)).unwrap().slot_dropped = true;
    assert_eq!(scene.plan().act, Some(Act::Remove(name(3))));
    scene.given.deleted.insert(name(3));
    let plan = scene.plan();
    assert_eq!((request(&plan), plan.act), (None, None));
    scene.given.pods.remove(&name(3));
    let forget = Request::Forget { instance: name(3) };
    assert_eq!(request(&scene.plan()), Some(forget));
    scene.state.members.remove(&name(3));
    assert_eq!(scene.plan().removed, [name(2)].into());
    // A primary moves first.
    let mut scene = Scene::new(2);
    scene.state.primary = Some(Primary {
        name: name(2),
        timeline: Timeline(1),
    });
    scene.given.wanted = [name(1)].into();
    assert_eq!(request(&scene.plan()), Some(AWAY));
}

#[test]
fn fencing_takes_standbys_first_and_moves_the_primary_where_it_can() {
    let these = |numbers: &[u32]| Fenced::These(numbers.iter().map(|n| name(*n)).collect());
    let mut scene = Scene::new(3);
    scene.given.fenced = these(&[1, 3]);
    let fence = |n| Request::Fence { instance: name(n) };
    assert_eq!(request(&scene.plan()), Some(fence(3)));
    scene.state.members.get_mut(&name(3)).unwrap().fenced = true;
    assert_eq!(request(&scene.plan()), Some(AWAY));
    // Without the annotation it comes back.
    scene.given.fenced = Fenced::default();
    let free = Request::Unfence { instance: name(3) };
    assert_eq!(request(&scene.plan()), Some(free));
    // All of them: nobody is left to move to.
    scene.given.fenced = Fenced::All;
    assert_eq!(request(&scene.plan()), Some(fence(2)));
    scene.state.members.get_mut(&name(2)).unwrap().fenced = true;
    let stop = Request::FencePrimary { instance: name(1) };
    assert_eq!(request(&scene.plan()), Some(stop));
}

#[test]
fn a_fenced_instance_is_not_waited_for() {
    let mut scene = Scene::new(3);
    scene.given.fenced = Fenced::These([name(2)].into());
    scene.state.members.get_mut(&name(2)).unwrap().fenced = true;
    scene.says(2, stopped());
    scene.outdated(&[3]);
    scene.sync(&[]);
    assert_eq!(replaces(&scene.plan()), Some(name(3)));
}

#[test]
fn the_annotation_is_read_as_people_write_it() {
    let these = |numbers: &[u32]| Ok(Fenced::These(numbers.iter().map(|n| name(*n)).collect()));
    for (text, expected) in [
        ("", these(&[])),
        ("*", Ok(Fenced::All)),
        ("pg-1", these(&[1])),
        ("pg-1, pg-2", these(&[1, 2])),
        ("[\"pg-1\",\"pg-3\"]", these(&[1, 3])),
    ] {
        assert_eq!(Fenced::parse(text), expected, "{text}");
    }
    assert!(Fenced::parse("Not A Name!").is_err());
    assert!(Fenced::parse("pg-1,*").is_err());
}
