//! What the operator shows to Prometheus of its clusters: their status as numbers.
//!
//! Touches nothing but its registry. Invariant: what can be counted is there with 0 from the first
//! look at a cluster on, for an increase from nothing to 1 is invisible to Prometheus; and a
//! cluster that is gone is not shown.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use helios_api::v1alpha1::HeliosClusterStatus;
use helios_telemetry::metrics::names;
use prometheus::core::Collector;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// Kinds and outcomes of operations, as the status has them.
const KINDS: [&str; 3] = ["switchover", "failover", "restart"];
const OUTCOMES: [&str; 3] = ["succeeded", "aborted", "diverted"];
/// From 10 ms to a minute, dense where the limits lie (250 ms, 1 s, 5 s).
const PAUSE_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
];

/// Namespace and name of a cluster.
type Key = (String, String);

/// All metrics of this operator; a cheap handle.
#[derive(Debug, Clone)]
pub(crate) struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    leading: IntGauge,
    ready: IntGaugeVec,
    instances: IntGaugeVec,
    instances_ready: IntGaugeVec,
    confirming: IntGaugeVec,
    lag: IntGaugeVec,
    expiry: IntGaugeVec,
    operations: IntCounterVec,
    pause: HistogramVec,
    failures: IntCounterVec,
    /// Instances that have a lag shown.
    lagging: Mutex<BTreeSet<(Key, String)>>,
}

impl Metrics {
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let r = Registry::new();
        let of_cluster = ["namespace", "cluster"];
        let gauges = |name: &str, labels: &[&str]| {
            register(
                &r,
                IntGaugeVec::new(Opts::new(name, names::help(name)), labels)?,
            )
        };
        let counters = |name: &str, labels: &[&str]| {
            register(
                &r,
                IntCounterVec::new(Opts::new(name, names::help(name)), labels)?,
            )
        };
        let pause = HistogramOpts::new(
            names::CLUSTER_PAUSE_SECONDS,
            names::help(names::CLUSTER_PAUSE_SECONDS),
        )
        .buckets(PAUSE_BUCKETS.to_vec());
        let leading = IntGauge::new(
            names::OPERATOR_LEADING,
            names::help(names::OPERATOR_LEADING),
        )?;
        Ok(Self(Arc::new(Inner {
            leading: register(&r, leading)?,
            ready: gauges(names::CLUSTER_READY, &of_cluster)?,
            instances: gauges(names::CLUSTER_INSTANCES, &of_cluster)?,
            instances_ready: gauges(names::CLUSTER_INSTANCES_READY, &of_cluster)?,
            confirming: gauges(names::CLUSTER_CONFIRMING, &of_cluster)?,
            lag: gauges(
                names::CLUSTER_LAG_BYTES,
                &["namespace", "cluster", "instance"],
            )?,
            expiry: gauges(names::CLUSTER_CERTIFICATE_EXPIRY, &of_cluster)?,
            operations: counters(
                names::CLUSTER_OPERATIONS,
                &["namespace", "cluster", "kind", "outcome"],
            )?,
            pause: register(
                &r,
                HistogramVec::new(pause, &["namespace", "cluster", "kind"])?,
            )?,
            failures: counters(names::RECONCILE_FAILURES, &of_cluster)?,
            lagging: Mutex::default(),
            registry: r,
        })))
    }

    /// This replica leads.
    pub(crate) fn lead(&self) {
        self.0.leading.set(1);
    }

    /// A cluster as its status has it.
    pub(crate) fn observe(&self, (namespace, name): (&str, &str), status: &HeliosClusterStatus) {
        let labels = [namespace, name];
        let ready = status.phase.as_deref() == Some("Ready");
        let this = &self.0;
        this.ready.with_label_values(&labels).set(ready.into());
        let set = |gauge: &IntGaugeVec, value: i32| {
            gauge.with_label_values(&labels).set(value.into());
        };
        set(&this.instances, status.instances_total);
        set(&this.instances_ready, status.instances_ready);
        let primary = status.current_primary.as_deref();
        let confirms = |i: &&helios_api::v1alpha1::InstanceStatus| {
            i.ready && i.synchronous && primary != Some(&*i.name)
        };
        let confirming = status.instances.iter().filter(confirms).count();
        set(&this.confirming, confirming.try_into().unwrap_or(i32::MAX));
        for kind in KINDS {
            for outcome in OUTCOMES {
                let all = [namespace, name, kind, outcome];
                this.operations.with_label_values(&all);
            }
            this.pause.with_label_values(&[namespace, name, kind]);
        }
        this.failures.with_label_values(&labels);
        self.observe_lag((namespace, name), status);
    }

    fn observe_lag(&self, (namespace, name): (&str, &str), status: &HeliosClusterStatus) {
        let key = (namespace.to_owned(), name.to_owned());
        let mut shown = self
            .0
            .lagging
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut lost: BTreeSet<_> = shown.iter().filter(|(k, _)| *k == key).cloned().collect();
        for instance in &status.instances {
            if let Some(bytes) = instance.lag_bytes {
                let labels = [namespace, name, &*instance.name];
                self.0.lag.with_label_values(&labels).set(bytes);
                let this = (key.clone(), instance.name.clone());
                lost.remove(&this);
                shown.insert(this);
            }
        }
        // A lag of somebody who does not follow is not zero, it is none.
        for (key, instance) in lost {
            let _ = self
                .0
                .lag
                .remove_label_values(&[namespace, name, &*instance]);
            shown.remove(&(key, instance));
        }
    }

    /// An operation has ended.
    pub(crate) fn ended(
        &self,
        (namespace, name): (&str, &str),
        (kind, outcome): (&str, &str),
        pause_micros: u64,
    ) {
        let labels = [namespace, name, kind, outcome];
        self.0.operations.with_label_values(&labels).inc();
        #[expect(clippy::cast_precision_loss, reason = "a bucket is coarser")]
        let seconds = pause_micros as f64 / 1e6;
        let pause = self.0.pause.with_label_values(&[namespace, name, kind]);
        pause.observe(seconds);
    }

    /// When the first of a cluster's certificates ends, in seconds since the Unix epoch.
    pub(crate) fn certificates(&self, (namespace, name): (&str, &str), end: i64) {
        let gauge = self.0.expiry.with_label_values(&[namespace, name]);
        gauge.set(end);
    }

    /// A reconciliation has failed and is tried again.
    pub(crate) fn failed(&self, (namespace, name): (&str, &str)) {
        self.0.failures.with_label_values(&[namespace, name]).inc();
    }

    /// The cluster is gone.
    pub(crate) fn forget(&self, (namespace, name): (&str, &str)) {
        let labels = [namespace, name];
        let this = &self.0;
        // An error says that it was never there, which is what was asked for.
        for gauge in [
            &this.ready,
            &this.instances,
            &this.instances_ready,
            &this.confirming,
            &this.expiry,
        ] {
            let _ = gauge.remove_label_values(&labels);
        }
        let _ = this.failures.remove_label_values(&labels);
        for kind in KINDS {
            for outcome in OUTCOMES {
                let _ = this
                    .operations
                    .remove_label_values(&[namespace, name, kind, outcome]);
            }
            let _ = this.pause.remove_label_values(&[namespace, name, kind]);
        }
        self.observe_lag((namespace, name), &HeliosClusterStatus::default());
    }

    /// Everything in Prometheus' text format (version 0.0.4).
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        let all = self.0.registry.gather();
        if let Err(error) = TextEncoder::new().encode_utf8(&all, &mut text) {
            tracing::warn!(%error, "could not render metrics");
        }
        text
    }
}

fn register<C: Collector + Clone + 'static>(r: &Registry, c: C) -> Result<C, prometheus::Error> {
    r.register(Box::new(c.clone()))?;
    Ok(c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_cluster_is_shown_from_its_first_look_until_it_is_gone() {
        let metrics = Metrics::new().unwrap();
        let pg = ("shop", "pg");
        let status = |lag: serde_json::Value| -> HeliosClusterStatus {
            serde_json::from_value(json!({
                "phase": "Ready", "currentPrimary": "pg-1",
                "instancesTotal": 2, "instancesReady": 2,
                "instances": [
                    {"name": "pg-1", "role": "primary", "ready": true},
                    {"name": "pg-2", "role": "replica", "ready": true, "synchronous": true,
                     "lagBytes": lag},
                ],
            }))
            .unwrap()
        };
        metrics.observe(pg, &status(json!(96)));
        metrics.ended(pg, ("switchover", "succeeded"), 81_000);
        metrics.failed(pg);
        metrics.certificates(pg, 1_800_000_000);
        let text = metrics.render();
        let of = "cluster=\"pg\"";
        for line in [
            "helios_operator_leading 0".to_owned(),
            format!("helios_cluster_ready{{{of},namespace=\"shop\"}} 1"),
            format!("helios_cluster_instances_ready{{{of},namespace=\"shop\"}} 2"),
            format!("helios_cluster_confirming_standbys{{{of},namespace=\"shop\"}} 1"),
            format!("helios_cluster_lag_bytes{{{of},instance=\"pg-2\",namespace=\"shop\"}} 96"),
            format!(
                "helios_cluster_operations_total{{{of},kind=\"failover\",namespace=\"shop\",outcome=\"aborted\"}} 0"
            ),
            format!(
                "helios_cluster_operations_total{{{of},kind=\"switchover\",namespace=\"shop\",outcome=\"succeeded\"}} 1"
            ),
            format!(
                "helios_cluster_pause_seconds_bucket{{{of},kind=\"switchover\",namespace=\"shop\",le=\"0.1\"}} 1"
            ),
            format!("helios_operator_reconcile_failures_total{{{of},namespace=\"shop\"}} 1"),
            format!(
                "helios_cluster_certificate_expiry_timestamp_seconds{{{of},namespace=\"shop\"}} 1800000000"
            ),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} not in:\n{text}");
        }
        metrics.observe(pg, &status(json!(null)));
        assert!(!metrics.render().contains("helios_cluster_lag_bytes{"));
        metrics.forget(pg);
        metrics.lead();
        assert!(!metrics.render().contains("shop"));
        assert!(metrics.render().contains("helios_operator_leading 1"));
        assert!(!metrics.render().contains(names::NO_HELP));
    }
}
