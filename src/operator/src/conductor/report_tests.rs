//! The exact requests of reports: when a status is written, and what Events are published.

use super::*;
use crate::build::tests::cluster;
use crate::mock::{Call, Mock};
use crate::reconcile::tests::{empty, world_with};
use crate::secret::{self, Wanted};
use helios_api::Epoch;
use helios_api::control::{DrainReport, ResumeReport};
use kube::runtime::reflector;

const STATUS: &str = "PATCH /apis/heliosdb.io/v1alpha1/namespaces/shop/heliosclusters/pg/status";
const EVENTS: &str = "POST /apis/events.k8s.io/v1/namespaces/shop/events";

/// An API server that has the object, and takes everything.
fn answer(call: &Call) -> (u16, Value) {
    if call.what.contains("/heliosclusters/pg") {
        let metadata = json!({"name": "pg", "namespace": "shop", "uid": "u-1",
            "resourceVersion": "1"});
        let spec = json!({"imageName": "postgres:17", "storage": {"size": "1Gi"}});
        return (200, json!({"metadata": metadata, "spec": spec}));
    }
    empty(call)
}

struct Scene {
    mock: Mock,
    input: Input,
    reporter: Reporter,
    store: Store,
    state: ClusterState,
    obs: Observation,
    before: usize,
}

impl Scene {
    async fn set() -> Self {
        let mock = Mock::start(answer).await;
        let spec = json!({"imageName": "postgres:17", "storage": {"size": "1Gi"}});
        let cluster = cluster(spec);
        let made = secret::ensure(&mock.client, &cluster, &Wanted::default()).await;
        let world = Arc::new(world_with(mock.client.clone(), reflector::store().0));
        let store = Store::load(&mock.client, &cluster).await.unwrap().unwrap();
        Self {
            before: mock.lines().len(),
            reporter: Reporter::new(&world, &cluster, Vec::new()),
            store,
            state: ClusterState::default(),
            obs: Observation::default(),
            input: Input {
                cluster,
                secrets: Arc::new(made.unwrap().0),
                verdicts: Vec::new(),
                request: None,
                paused: false,
                fenced: None,
                template: String::new(),
                server: helios_api::agent::ServerSettings::default(),
                kept: BTreeSet::new(),
            },
            mock,
        }
    }

    /// A round of the conductor; what it asked the API server.
    async fn round(&mut self) -> Vec<Call> {
        let (state, store) = (&self.state, &mut self.store);
        let seen = (&self.obs, false);
        let report = self
            .reporter
            .publish(&self.input, state, seen, store, Time(1));
        report.await;
        self.asked()
    }

    /// What was asked since this was called last.
    fn asked(&mut self) -> Vec<Call> {
        let all = self.mock.calls();
        let new = all[self.before..].to_vec();
        self.before = all.len();
        new
    }
}

fn lines(calls: &[Call]) -> Vec<&str> {
    calls.iter().map(|call| &*call.what).collect()
}

fn record(id: u64, outcome: Outcome) -> OperationRecord {
    OperationRecord {
        id,
        kind: OperationKind::Switchover,
        from: "pg-1".parse().unwrap(),
        to: "pg-2".parse().unwrap(),
        epoch: Epoch(2),
        started: Time(1),
        cause: "requested".into(),
        outcome,
        phases: Vec::new(),
        drained: DrainReport::default(),
        resumed: ResumeReport::default(),
        rejoin: None,
        lost: helios_api::control::LostCommits::None,
    }
}

#[tokio::test]
async fn a_status_is_written_once_and_again_when_something_changes() {
    let mut scene = Scene::set().await;
    let first = scene.round().await;
    assert_eq!(lines(&first), [STATUS]);
    let status = &first[0].body["status"];
    assert_eq!(status["phase"], "Creating");
    assert_eq!(status["instancesTotal"], 2);
    // A merge takes away what it names as nothing, and leaves the state alone.
    for field in ["targetPrimary", "operation", "currentPrimary", "timeline"] {
        assert!(
            status[field].is_null() && status.get(field).is_some(),
            "{field}"
        );
    }
    assert_eq!(status.get("state"), None);
    assert_eq!(first[0].body["metadata"]["resourceVersion"], "1");
    assert!(scene.round().await.is_empty(), "nothing has changed");

    tokio::time::sleep(LEAST).await;
    scene.input.paused = true;
    let second = scene.round().await;
    assert_eq!(lines(&second), [STATUS]);
    assert_eq!(second[0].body["status"]["phase"], "Paused");
}

#[tokio::test]
async fn figures_alone_are_not_worth_a_write() {
    let mut scene = Scene::set().await;
    let status = ProxyStatus {
        epoch: Epoch(1),
        phase: "running".into(),
        sessions: 1,
        in_transaction: 0,
        protected: 1,
        held: 0,
        primary_reachable: true,
        journal_bytes: 0,
        slow: None,
    };
    let proxy = "pg-proxy-1".to_owned();
    scene
        .obs
        .proxies
        .insert(proxy.clone(), Some(status.clone()));
    assert_eq!(lines(&scene.round().await), [STATUS]);
    tokio::time::sleep(LEAST).await;
    let more = ProxyStatus {
        sessions: 2,
        ..status
    };
    scene.obs.proxies.insert(proxy.clone(), Some(more));
    assert!(scene.round().await.is_empty());
    // One that is silent is more than a figure.
    scene.obs.proxies.insert(proxy, None);
    assert_eq!(lines(&scene.round().await), [STATUS]);
}

#[tokio::test]
async fn each_operation_that_ends_is_one_event() {
    let mut scene = Scene::set().await;
    let aborted = Outcome::Aborted { reason: "x".into() };
    scene.state.operations.push(record(1, Outcome::Succeeded));
    // What was there at the start has been told by somebody else.
    assert_eq!(lines(&scene.round().await), [STATUS]);
    tokio::time::sleep(LEAST).await;
    scene.state.operations.push(record(2, Outcome::Succeeded));
    scene.state.operations.push(record(3, aborted));
    let mut asked = scene.round().await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while asked.len() < 3 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
        asked.extend(scene.asked());
    }
    let mut what = lines(&asked);
    what.sort_unstable();
    assert_eq!(what, [STATUS, EVENTS, EVENTS]);
    let events = asked.iter().filter(|call| call.what == EVENTS);
    let mut told: Vec<_> = events
        .map(|call| {
            let part = |name: &str| call.body[name].as_str().unwrap_or_default().to_owned();
            assert_eq!(call.body["regarding"]["uid"], "u-1");
            assert!(part("note").starts_with("switchover from pg-1 to pg-2"));
            format!("{} {} {}", part("type"), part("reason"), part("action"))
        })
        .collect();
    told.sort();
    let normal = "Normal SwitchoverCompleted Switchover";
    assert_eq!(told, [normal, "Warning SwitchoverAborted Switchover"]);
    assert!(scene.round().await.is_empty());
}

#[tokio::test]
async fn an_object_that_is_wrong_is_told_so_once() {
    let mock = Mock::start(answer).await;
    let mut object = crate::reconcile::tests::object("1Gi");
    let why = Verdict::bad(ConditionType::Ready, "Invalid", "spec.instances: 0");
    assert!(report_invalid(&mock.client, &object, &why).await.unwrap());
    assert_eq!(mock.lines(), [STATUS]);
    let status = &mock.calls()[0].body["status"];
    assert_eq!(status["phase"], "Invalid");
    assert_eq!(status["conditions"][0]["message"], "spec.instances: 0");
    let conditions = serde_json::from_value(status["conditions"].clone()).unwrap();
    object.status = Some(HeliosClusterStatus {
        conditions,
        ..HeliosClusterStatus::default()
    });
    assert!(!report_invalid(&mock.client, &object, &why).await.unwrap());
    assert_eq!(mock.lines(), [STATUS]);
}
