//! The status as people read it, and what makes it worth writing.
//!
//! Positions and numbers of sessions change all the time: they are written along with something
//! that matters, or once in a while.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use helios_api::agent::InstanceState;
use helios_api::control::ProxyStatus;
use helios_api::v1alpha1::valid::ValidCluster;
use helios_api::v1alpha1::{
    ConditionType, FinishedOperation, HeliosCluster, HeliosClusterStatus, InstanceStatus,
    PhaseMillis, ProxyReport, RunningOperation, names,
};
use helios_cluster::{
    ClusterState, Mode, Move, Observation, OperationKind, OperationRecord, Outcome, Phase, Time,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time as Stamp};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::EventType;
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use super::store::Store;
use super::{Input, event};
use crate::OperatorError;
use crate::reconcile::World;

/// How often figures are written that change nothing.
const FIGURES: Duration = Duration::from_secs(30);
/// Least pause between two writes.
const LEAST: Duration = Duration::from_millis(200);
/// A step that clients wait for is shown when it has lasted so long: most are over before.
const HELD_MS: u64 = 2_000;
/// Pause after a write that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(2);

/// A condition without its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) kind: ConditionType,
    pub(crate) good: bool,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Verdict {
    /// Each has a message: an empty one is null to API servers that were built with a recent Go
    /// and an old validation library, and null is refused.
    pub(crate) fn good(kind: ConditionType, reason: &'static str, message: &str) -> Self {
        Self {
            kind,
            good: true,
            reason,
            message: message.to_owned(),
        }
    }

    pub(crate) fn bad(kind: ConditionType, reason: &'static str, message: &str) -> Self {
        Self {
            kind,
            good: false,
            reason,
            message: message.to_owned(),
        }
    }

    /// The condition; its time is that of the last change of status.
    fn condition(&self, generation: i64, before: &[Condition]) -> Condition {
        let status = if self.good { "True" } else { "False" };
        let since = before
            .iter()
            .find(|c| c.type_ == self.kind.as_str() && c.status == status)
            .map_or_else(
                || Stamp(Timestamp::now()),
                |c| c.last_transition_time.clone(),
            );
        Condition {
            type_: self.kind.as_str().to_owned(),
            status: status.to_owned(),
            reason: self.reason.to_owned(),
            message: self.message.clone(),
            observed_generation: Some(generation),
            last_transition_time: since,
        }
    }
}

/// Says of an object that has no conductor that it is wrong; whether that is news.
pub(crate) async fn report_invalid(
    client: &Client,
    cluster: &HeliosCluster,
    verdict: &Verdict,
) -> Result<bool, OperatorError> {
    let status = cluster.status.clone().unwrap_or_default();
    let generation = cluster.metadata.generation.unwrap_or_default();
    let condition = verdict.condition(generation, &status.conditions);
    let mut conditions = status.conditions.clone();
    conditions.retain(|c| c.type_ != condition.type_);
    conditions.push(condition);
    if conditions == status.conditions {
        return Ok(false);
    }
    let patch = json!({"status": {"conditions": conditions, "phase": "Invalid"}});
    let api: Api<HeliosCluster> =
        Api::namespaced(client.clone(), &cluster.namespace().unwrap_or_default());
    api.patch_status(
        &cluster.name_any(),
        &PatchParams::default(),
        &Patch::Merge(&patch),
    )
    .await?;
    Ok(true)
}

/// Writes the status of one cluster.
pub(super) struct Reporter {
    world: Arc<World>,
    cluster: ValidCluster,
    conditions: Vec<Condition>,
    request: Option<Verdict>,
    /// What is said of the cluster's life.
    life: Vec<Verdict>,
    last: Option<(Instant, Value, Value)>,
    /// When a write last failed.
    failed: Option<Instant>,
    /// Number of the last operation that Events were published of.
    told: Option<u64>,
}

impl Reporter {
    pub(super) fn new(
        world: &Arc<World>,
        cluster: &ValidCluster,
        conditions: Vec<Condition>,
    ) -> Self {
        Self {
            world: Arc::clone(world),
            cluster: cluster.clone(),
            conditions,
            request: None,
            life: Vec::new(),
            last: None,
            failed: None,
            told: None,
        }
    }

    /// What became of the last request.
    pub(super) fn set(&mut self, verdict: Verdict) {
        self.request = Some(verdict);
    }

    /// How far the changes of its life are.
    pub(super) fn say(&mut self, life: Vec<Verdict>) {
        self.life = life;
    }

    /// Writes the status if it is worth it: of what is known, and whether clients reach a proxy. A
    /// failure is made good by the next round.
    pub(super) async fn publish(
        &mut self,
        input: &Input,
        state: &ClusterState,
        (obs, reachable): (&Observation, bool),
        store: &mut Store,
        now: Time,
    ) {
        self.tell(state);
        // Clients wait: what people read can wait too, but not for long.
        let held = |m: &Move| {
            m.step.phase() != Phase::Prepare && now.millis_since(m.step_started) < HELD_MS
        };
        if state.moving().is_some_and(held) && self.last.is_some() {
            return;
        }
        if self.failed.is_some_and(|at| at.elapsed() < AFTER_FAILURE) {
            return;
        }
        let mut status = people(input, state, obs, reachable);
        let cluster = (&*self.cluster.namespace, &*self.cluster.name);
        self.world.metrics.observe(cluster, &status);
        status.conditions = self.conditions(input, &status);
        let mut value = json!(status);
        // A merge leaves alone what is not named.
        for field in [
            "targetPrimary",
            "operation",
            "currentPrimary",
            "timeline",
            "proxies",
        ] {
            if value.get(field).is_none() {
                value[field] = Value::Null;
            }
        }
        let essence = essence(&status);
        if let Some((at, written, essential)) = &self.last {
            let due = *essential != essence || at.elapsed() >= FIGURES;
            if *written == value || !due || at.elapsed() < LEAST {
                return;
            }
        }
        match store.write(value.clone(), None).await {
            Ok(_) => {
                self.conditions = status.conditions;
                self.last = Some((Instant::now(), value, essence));
                self.failed = None;
            }
            Err(error) => {
                tracing::warn!(%error, "status could not be written; tried again");
                self.failed = Some(Instant::now());
            }
        }
    }

    fn conditions(&self, input: &Input, status: &HeliosClusterStatus) -> Vec<Condition> {
        let total = status.instances_total;
        let phase = status.phase.as_deref().unwrap_or("Unknown");
        let text = format!(
            "{phase}: {} of {total} instances serve",
            status.instances_ready
        );
        let ready = match phase {
            "Ready" => Verdict::good(ConditionType::Ready, "Ready", &text),
            _ => Verdict::bad(ConditionType::Ready, "NotReady", &text),
        };
        let mut all = BTreeMap::new();
        let told = input.verdicts.iter().chain([&ready]);
        for verdict in told.chain(&self.life).chain(&self.request) {
            let condition = verdict.condition(input.cluster.generation, &self.conditions);
            all.insert(verdict.kind, condition);
        }
        // What an earlier operator said of a request stays.
        let earlier = ConditionType::SwitchoverAccepted;
        if let Some(old) = self.conditions.iter().find(|c| c.type_ == earlier.as_str()) {
            all.entry(earlier).or_insert_with(|| old.clone());
        }
        all.into_values().collect()
    }

    /// An Event for each operation that has ended since the last round.
    fn tell(&mut self, state: &ClusterState) {
        let newest = state.operations.last().map_or(0, |op| op.id);
        let told = *self.told.get_or_insert(newest);
        for operation in state.operations.iter().filter(|op| op.id > told) {
            let (type_, reason, outcome) = match operation.outcome {
                Outcome::Succeeded => (EventType::Normal, "Completed", "succeeded"),
                Outcome::Aborted { .. } => (EventType::Warning, "Aborted", "aborted"),
                Outcome::Diverted { .. } => (EventType::Warning, "Diverted", "diverted"),
            };
            let kind = kind(operation.kind);
            let cluster = (&*self.cluster.namespace, &*self.cluster.name);
            let metrics = &self.world.metrics;
            metrics.ended(cluster, (kind, outcome), operation.pause_micros());
            let note = format!(
                "{kind} from {} to {}: pause {} ms, {} sessions replayed, epoch {}",
                operation.from,
                operation.to,
                operation.pause_micros() / 1000,
                operation.resumed.replayed,
                operation.epoch
            );
            tracing::info!(cluster = self.cluster.name, outcome = ?operation.outcome, "{note}");
            let event = event(
                type_,
                &format!("{}{reason}", capital(kind)),
                &capital(kind),
                Some(note),
            );
            let (world, cluster) = (Arc::clone(&self.world), self.cluster.clone());
            tokio::spawn(async move { world.event(&cluster, event).await });
        }
        self.told = Some(newest);
    }
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

/// What makes a write worth it.
fn essence(status: &HeliosClusterStatus) -> Value {
    let mut status = status.clone();
    for instance in &mut status.instances {
        instance.position = None;
        instance.lag_bytes = None;
    }
    for proxy in &mut status.proxies {
        proxy.sessions = 0;
        proxy.protected = 0;
        proxy.held = 0;
    }
    json!(status)
}

fn count(value: impl TryInto<i64>) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}

fn few(value: usize) -> i32 {
    value.try_into().unwrap_or(i32::MAX)
}

fn stamp(time: Time) -> Stamp {
    let micros = i64::try_from(time.0).unwrap_or(0);
    Stamp(Timestamp::from_microsecond(micros).unwrap_or_default())
}

fn kind(kind: OperationKind) -> &'static str {
    match kind {
        OperationKind::Switchover => "switchover",
        OperationKind::Failover => "failover",
        OperationKind::Restart => "restart",
    }
}

/// The status but for its conditions and the state. It is ready when a client that comes now is
/// served: a proxy answers us seconds before Kubernetes sends it clients.
fn people(
    input: &Input,
    state: &ClusterState,
    obs: &Observation,
    reachable: bool,
) -> HeliosClusterStatus {
    let cluster = &input.cluster;
    let instances = instances(cluster, state, obs);
    let proxies: Vec<ProxyReport> = obs
        .proxies
        .iter()
        .map(|(name, status)| proxy(name, status.as_ref()))
        .collect();
    let ready = instances.iter().filter(|i| i.ready).count();
    let served = reachable
        && obs
            .proxies
            .values()
            .flatten()
            .any(|p| p.epoch == state.epoch && p.phase == "running" && p.primary_reachable);
    let phase = match &state.mode {
        _ if input.paused => "Paused",
        Mode::Moving(m) => match m.kind {
            OperationKind::Switchover => "Switchover",
            OperationKind::Failover => "Failover",
            OperationKind::Restart => "Restart",
        },
        Mode::Bootstrap => "Creating",
        Mode::Steady if ready == instances.len() && served => "Ready",
        Mode::Steady if state.operations.is_empty() && ready < instances.len() => "Creating",
        Mode::Steady => "Degraded",
    };
    HeliosClusterStatus {
        observed_generation: Some(cluster.generation),
        phase: Some(phase.to_owned()),
        conditions: Vec::new(),
        current_primary: state.primary_name().map(ToString::to_string),
        target_primary: state
            .moving()
            .and_then(|m| m.wanted.as_ref())
            .map(ToString::to_string),
        epoch: count(state.epoch.0),
        timeline: state.primary.as_ref().map(|p| i64::from(p.timeline.0)),
        instances_total: few(instances.len()),
        instances_ready: few(ready),
        selector: Some(format!(
            "{}={},{}=instance",
            names::CLUSTER,
            cluster.name,
            names::COMPONENT
        )),
        instances,
        proxies,
        operation: state.moving().map(|m| RunningOperation {
            id: count(m.id),
            kind: kind(m.kind).to_owned(),
            step: m.step.phase().as_str().to_owned(),
            cause: m.cause.clone(),
            started: stamp(m.started),
        }),
        last_operations: state.operations.iter().map(operation).collect(),
        state: None,
    }
}

/// Those that the spec wants, and those that are on their way out.
fn instances(
    cluster: &ValidCluster,
    state: &ClusterState,
    obs: &Observation,
) -> Vec<InstanceStatus> {
    let wanted = cluster.instances.iter();
    let all: BTreeSet<_> = wanted.chain(state.members.keys()).collect();
    all.into_iter()
        .map(|name| instance(name, state, obs))
        .collect()
}

fn instance(
    name: &helios_api::InstanceName,
    state: &ClusterState,
    obs: &Observation,
) -> InstanceStatus {
    let is_primary = state.primary_name() == Some(name);
    let end = state
        .primary_name()
        .and_then(|primary| obs.agent(primary))
        .and_then(|agent| match &agent.instance {
            InstanceState::Primary { position, .. } => Some(*position),
            _ => None,
        });
    // By a person's word; that it has stopped is what its agent says.
    let fenced = state.members.get(name).is_some_and(|m| m.fenced);
    let (role, ready, position) = match obs.agent(name).map(|a| &a.instance) {
        None => ("unknown", false, None),
        Some(InstanceState::Empty) => ("empty", false, None),
        Some(InstanceState::Stopped { .. }) if fenced => ("fenced", false, None),
        Some(InstanceState::Stopped { .. }) => ("stopped", false, None),
        Some(InstanceState::Starting { .. }) => ("starting", false, None),
        Some(InstanceState::Unresponsive { .. }) => ("unresponsive", false, None),
        Some(InstanceState::Primary { position, .. }) => ("primary", is_primary, Some(*position)),
        Some(InstanceState::Standby {
            replayed, heard_ms, ..
        }) => (
            "replica",
            !is_primary && heard_ms.is_some(),
            Some(*replayed),
        ),
    };
    let fenced = state.members.get(name).is_some_and(|m| m.fenced);
    let role = match role {
        "stopped" | "empty" | "unknown" if fenced => "fenced",
        other => other,
    };
    let lag = match (is_primary, end, position) {
        (false, Some(end), Some(at)) => Some(count(end.0.saturating_sub(at.0))),
        _ => None,
    };
    InstanceStatus {
        name: name.to_string(),
        role: role.to_owned(),
        ready,
        position: position.map(|p| p.to_string()),
        lag_bytes: lag,
        // Of every setting that may be in force: the one before may not be over yet.
        synchronous: state.sync.possible.iter().all(|set| set.contains(name)),
    }
}

fn proxy(name: &str, status: Option<&ProxyStatus>) -> ProxyReport {
    ProxyReport {
        name: name.to_owned(),
        phase: status.map_or("silent", |s| s.phase.as_str()).to_owned(),
        sessions: status.map_or(0, |s| count(s.sessions)),
        protected: status.map_or(0, |s| count(s.protected)),
        held: status.map_or(0, |s| count(s.held)),
    }
}

fn operation(record: &OperationRecord) -> FinishedOperation {
    let (outcome, reason) = match &record.outcome {
        Outcome::Succeeded => ("succeeded", None),
        Outcome::Aborted { reason } => ("aborted", Some(reason.clone())),
        Outcome::Diverted { reason } => ("diverted", Some(reason.clone())),
    };
    FinishedOperation {
        id: count(record.id),
        kind: kind(record.kind).to_owned(),
        from: record.from.to_string(),
        to: record.to.to_string(),
        epoch: count(record.epoch.0),
        cause: record.cause.clone(),
        outcome: outcome.to_owned(),
        reason,
        started: stamp(record.started),
        pause_ms: count(record.pause_micros() / 1000),
        phases: record
            .phases
            .iter()
            .map(|p| PhaseMillis {
                phase: p.phase.as_str().to_owned(),
                ms: count(p.micros / 1000),
            })
            .collect(),
        replayed: count(record.resumed.replayed),
        failed: count(record.resumed.failed.values().sum::<u64>()),
    }
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
