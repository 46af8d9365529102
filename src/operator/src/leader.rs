//! Who leads: a Lease, as Kubernetes' own controllers use it.
//!
//! Invariant: the holder stops believing in its lease before anybody else may take it. Clocks are
//! not compared: a candidate waits until the lease has not changed for its whole duration, by its
//! own clock (as client-go does).

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease as Object, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::time::Instant;

use crate::Options;

/// Name of the lease.
const NAME: &str = "helios-operator";
/// For how long it holds.
const DURATION_SECONDS: i32 = 8;
/// The same.
const DURATION: Duration = Duration::from_secs(8);
/// A holder that could not renew for so long gives up.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often it is renewed, or looked at.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long one request may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(2);

/// This replica's way to the lease.
#[derive(Debug)]
pub(crate) struct Lease {
    api: Api<Object>,
    identity: String,
    /// Name of the Pod, where this runs in one.
    pod: Option<String>,
}

impl Lease {
    pub(crate) fn new(client: Client, options: &Options) -> Self {
        Self {
            api: Api::namespaced(client, &options.lease_namespace),
            // A restarted container has its Pod's name, but nothing of what its forerunner knew.
            identity: format!("{}-{:08x}", options.identity, rand::random::<u32>()),
            pod: options.in_pod.then(|| options.identity.clone()),
        }
    }

    /// Returns when this replica leads.
    pub(crate) async fn acquire(&self) {
        let mut seen: (Option<String>, Instant) = (None, Instant::now());
        loop {
            match tokio::time::timeout(REQUEST_LIMIT, self.try_acquire(&mut seen)).await {
                Ok(Ok(true)) => return,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::warn!(%error, "lease could not be taken"),
                Err(_) => tracing::warn!("API server does not answer"),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    async fn try_acquire(&self, seen: &mut (Option<String>, Instant)) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.api.get_opt(NAME).await? else {
            let metadata = ObjectMeta {
                name: Some(NAME.to_owned()),
                ..ObjectMeta::default()
            };
            let spec = Some(self.spec(None));
            let lease = Object { metadata, spec };
            return created(self.api.create(&PostParams::default(), &lease).await);
        };
        let version = lease.metadata.resource_version.clone();
        if seen.0 != version {
            *seen = (version, Instant::now());
        }
        let holder = lease.spec.as_ref().and_then(|s| s.holder_identity.clone());
        let free = holder.is_none_or(|h| h.is_empty() || self.is_forerunner(&h));
        if !free && seen.1.elapsed() < DURATION {
            return Ok(false);
        }
        lease.spec = Some(self.spec(lease.spec.as_ref()));
        // The version in the object makes this fail when anybody was faster.
        created(self.api.replace(NAME, &PostParams::default(), &lease).await)
    }

    /// Whether the holder was an earlier container of this Pod: it has ended, because a kubelet starts
    /// the next one of a Pod only then, and need not be waited for.
    fn is_forerunner(&self, holder: &str) -> bool {
        let pod = holder.rsplit_once('-').map(|(pod, _)| pod);
        pod.is_some() && pod == self.pod.as_deref()
    }

    /// Renews until it cannot, and returns then.
    pub(crate) async fn keep(&self) {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(INTERVAL).await;
            let began = Instant::now();
            match tokio::time::timeout(REQUEST_LIMIT, self.renew()).await {
                Ok(Ok(true)) => renewed = began,
                Ok(Ok(false)) => return,
                Ok(Err(error)) => tracing::warn!(%error, "lease could not be renewed"),
                Err(_) => tracing::warn!("lease could not be renewed in time"),
            }
            if renewed.elapsed() > DEADLINE {
                return;
            }
        }
    }

    /// `false`: somebody else holds it.
    async fn renew(&self) -> Result<bool, kube::Error> {
        let mut lease = self.api.get(NAME).await?;
        let holder = lease.spec.as_ref().and_then(|s| s.holder_identity.as_ref());
        if holder != Some(&self.identity) {
            return Ok(false);
        }
        if let Some(spec) = &mut lease.spec {
            spec.renew_time = Some(MicroTime(Timestamp::now()));
        }
        created(self.api.replace(NAME, &PostParams::default(), &lease).await)
    }

    /// Gives it back, so that another replica need not wait.
    pub(crate) async fn release(&self) {
        let work = async {
            let mut lease = self.api.get(NAME).await?;
            if let Some(spec) = &mut lease.spec
                && spec.holder_identity.as_ref() == Some(&self.identity)
            {
                spec.holder_identity = None;
                self.api
                    .replace(NAME, &PostParams::default(), &lease)
                    .await?;
            }
            Ok::<_, kube::Error>(())
        };
        if !matches!(tokio::time::timeout(REQUEST_LIMIT, work).await, Ok(Ok(()))) {
            tracing::debug!("lease was not given back");
        }
    }

    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let transitions = before.and_then(|s| s.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(DURATION_SECONDS),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: Some(transitions.saturating_add(1)),
            ..LeaseSpec::default()
        }
    }
}

/// A conflict means that somebody else was faster; it is no failure.
fn created(result: Result<Object, kube::Error>) -> Result<bool, kube::Error> {
    match result {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::Mock;
    use serde_json::json;

    fn options(pod: &str, in_pod: bool) -> Options {
        Options {
            namespace: None,
            lease_namespace: "helios-system".to_owned(),
            identity: pod.to_owned(),
            in_pod,
            image: "helios:1".to_owned(),
            http: ([127, 0, 0, 1], 0).into(),
        }
    }

    /// Whether this one takes a lease that `holder` has renewed just now; and what it asked.
    async fn takes(options: &Options, holder: &str) -> (bool, Vec<String>) {
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": NAME, "namespace": "helios-system", "resourceVersion": "7"},
            "spec": {"holderIdentity": holder},
        });
        let mock = Mock::start(move |_| (200, lease.clone())).await;
        let lease = Lease::new(mock.client.clone(), options);
        let took = lease.try_acquire(&mut (None, Instant::now())).await;
        (took.unwrap(), mock.lines())
    }

    #[tokio::test]
    async fn a_restarted_container_has_its_lease_at_once_and_nobody_else_has() {
        let (get, put) = ("GET", "PUT");
        let path = "/apis/coordination.k8s.io/v1/namespaces/helios-system/leases/helios-operator";
        for (pod, in_pod, holder, taken) in [
            ("operator-a", true, "operator-a-0a1b2c3d", true),
            ("operator-a", true, "", true),
            ("operator-b", true, "operator-a-0a1b2c3d", false),
            ("operator", true, "operator-a-0a1b2c3d", false),
            ("operator-a-0a1b2c3d", true, "operator-a-0a1b2c3d", false),
            // Anybody may be called so who does not run in a Pod.
            ("operator-a", false, "operator-a-0a1b2c3d", false),
        ] {
            let (took, calls) = takes(&options(pod, in_pod), holder).await;
            assert_eq!(took, taken, "{pod}, {in_pod}, {holder}");
            let wanted = if taken { vec![get, put] } else { vec![get] };
            let wanted: Vec<_> = wanted.iter().map(|verb| format!("{verb} {path}")).collect();
            assert_eq!(calls, wanted);
        }
    }
}
