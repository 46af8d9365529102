//! From objects and the spec to what decisions are made from. Pure.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use helios_api::InstanceName;
use helios_api::agent::ServerSettings;
use helios_api::v1alpha1::DataDurability;
use helios_api::v1alpha1::names;
use helios_api::v1alpha1::valid::ValidCluster;
use helios_cluster::{
    ClusterState, Decision, Durability, Finished, Mode, Observation, OperationKind, Settings, Time,
};
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use kube::ResourceExt as _;

use super::agents::Place;
use super::lease::Duty;
use super::plan::PodView;

/// Whether the primary is about to be ended while nothing else is done.
pub(super) fn leaves(state: &ClusterState, obs: &Observation) -> bool {
    let primary = state.primary_name().and_then(|name| obs.agent(name));
    matches!(state.mode, Mode::Steady) && primary.is_some_and(|agent| agent.leaving)
}

/// Why a switchover has begun that nobody asked for.
pub(super) fn unasked(
    before: &ClusterState,
    decision: &Decision,
    planned: Option<&str>,
) -> Option<String> {
    if matches!(decision.answer, Some(Ok(Some(_)))) {
        return Some(
            planned
                .unwrap_or("the primary's Pod is on its way out")
                .to_owned(),
        );
    }
    let begun = decision.next.moving();
    let begun = begun.filter(|m| m.kind == OperationKind::Switchover && before.moving().is_none());
    begun.map(|m| m.cause.clone())
}

/// Where an instance's Pod is.
pub(super) fn instance_place(pod: &Pod) -> Place {
    let status = pod.status.as_ref();
    let container = status
        .and_then(|s| s.container_statuses.as_ref())
        .and_then(|all| all.iter().find(|c| c.name == "postgres"));
    let state = container.and_then(|c| c.state.as_ref());
    let waits_again = container.is_some_and(|c| c.restart_count > 0)
        && state.is_some_and(|s| s.waiting.is_some());
    Place {
        ip: status
            .and_then(|s| s.pod_ip.as_ref())
            .and_then(|ip| ip.parse().ok()),
        ended: state.is_some_and(|s| s.terminated.is_some()) || waits_again,
    }
}

/// The Pod of an instance, compared with what the spec asks for. One without a mark is of an earlier
/// operator, whose upgrade alone is no reason to replace it.
pub(super) fn pod_view(pod: &Pod, template: &str, image: &str) -> PodView {
    let spec = pod.spec.as_ref();
    let has = spec
        .and_then(|s| s.containers.iter().find(|c| c.name == "postgres"))
        .and_then(|c| c.image.as_deref());
    let outdated = match pod.annotations().get(names::TEMPLATE) {
        Some(mark) => mark != template,
        None => has != Some(image),
    };
    PodView {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        outdated,
        going: pod.metadata.deletion_timestamp.is_some(),
        ready: is_ready(pod),
        trouble: trouble(pod),
    }
}

/// Why a Pod does not run.
fn trouble(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let first = status.init_container_statuses.iter().flatten();
    let waiting = first
        .chain(status.container_statuses.iter().flatten())
        .filter_map(|c| c.state.as_ref()?.waiting.as_ref())
        .find(|w| {
            let reason = w.reason.as_deref().unwrap_or_default();
            !matches!(reason, "" | "ContainerCreating" | "PodInitializing")
        });
    if let Some(waiting) = waiting {
        let reason = waiting.reason.as_deref().unwrap_or_default();
        let message = waiting.message.as_deref().unwrap_or_default();
        return Some(format!("{reason}: {message}"));
    }
    let conditions = status.conditions.iter().flatten();
    let mut unscheduled = conditions.filter(|c| c.type_ == "PodScheduled" && c.status == "False");
    unscheduled.next().and_then(|c| c.message.clone())
}

/// A proxy that can be given orders: one that runs. One that is on its way out has clients as well,
/// who let their transactions end.
pub(super) fn proxy_place(pod: &Pod) -> Option<(String, IpAddr)> {
    let component = pod.labels().get(names::COMPONENT).map(String::as_str);
    if component != Some("proxy") {
        return None;
    }
    let status = pod.status.as_ref()?;
    if status.phase.as_deref() != Some("Running") {
        return None;
    }
    Some((pod.name_any(), status.pod_ip.as_ref()?.parse().ok()?))
}

/// Whether Kubernetes lets clients come to this proxy: it answers us some seconds before that.
pub(super) fn takes_clients(pod: &Pod) -> bool {
    let stays = pod.metadata.deletion_timestamp.is_none();
    stays && proxy_place(pod).is_some() && is_ready(pod)
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let ready =
        |all: &Vec<PodCondition>| all.iter().any(|c| c.type_ == "Ready" && c.status == "True");
    conditions.is_some_and(ready)
}

/// What decisions go by.
pub(super) fn settings(cluster: &ValidCluster, server: &ServerSettings) -> Settings {
    let spec = &cluster.spec;
    let millis = |value: i64| u64::try_from(value).unwrap_or_default();
    let synchronous = &spec.postgresql.synchronous;
    Settings {
        synchronous: synchronous.number > 0,
        durability: match synchronous.data_durability {
            DataDurability::Required => Durability::Required,
            DataDurability::Preferred => Durability::Preferred,
        },
        drain_timeout_ms: millis(spec.switchover.drain_timeout_secs).saturating_mul(1000),
        max_lag_bytes: millis(spec.failover.max_lag_bytes),
        unresponsive_ms: millis(spec.failover.unresponsive_ms),
        standby_grace_ms: millis(spec.failover.standby_grace_ms),
        restart_patience_ms: millis(spec.failover.restart_patience_ms),
        slow_interval_ms: crate::build::latency_interval_ms(cluster),
        server: Some(server.clone()),
        failover_delay_ms: millis(spec.failover.delay_ms),
        lease_ms: Some(millis(spec.failover.lease_ms)),
        ..Settings::default()
    }
}

/// What is granted, to whom.
pub(super) fn duty(cluster: &ValidCluster, state: &ClusterState) -> Option<(InstanceName, Duty)> {
    let (holder, epoch, terms) = helios_cluster::lease::duty(state)?;
    let every = u64::try_from(cluster.spec.failover.renew_ms).unwrap_or_default();
    let duty = Duty {
        epoch,
        terms,
        every: Duration::from_millis(every),
    };
    Some((holder, duty))
}

/// The time by this machine's clock.
pub(super) fn now() -> Time {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Time(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

/// Logs how an action ended.
pub(super) fn log_end(end: &Finished) {
    match &end.result {
        Ok(reply) => tracing::debug!(action = ?end.action, ?reply, "action ended"),
        Err(error) => tracing::warn!(action = ?end.action, %error, "action failed"),
    }
}
