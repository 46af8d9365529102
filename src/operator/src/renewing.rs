//! Renewal of certificates as a part of a reconciliation: what is asked for, whose programs read
//! their files again, and what is told about it.
//!
//! Invariant: what cannot be renewed is said in a condition and an Event, and keeps nothing else
//! from being done.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use helios_api::v1alpha1::valid::ValidCluster;
use helios_api::v1alpha1::{ConditionType, HeliosCluster, names};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use crate::OperatorError;
use crate::conductor::Verdict;
use crate::reconcile::World;
use crate::renewal::DAY;
use crate::secret::{self, Peer, Renewed, Secrets, Wanted};

/// How long the Pods may take to be known, after a start.
const PODS_LIMIT: Duration = Duration::from_secs(5);
/// A certificate that is not ours is spoken of when so much of its time is left.
const LAST_DAYS: i64 = 14 * DAY;
/// The longest note of an Event is 1 kB.
const NOTE: usize = 900;

/// What a reconciliation goes on with.
pub(crate) struct Kept {
    pub(crate) secrets: Secrets,
    pub(crate) verdict: Verdict,
    /// In how long to look again.
    pub(crate) again: Duration,
}

/// Sees to all Secrets, and tells what has changed.
pub(crate) async fn keep(
    cluster: &HeliosCluster,
    valid: &ValidCluster,
    world: &World,
) -> Result<Kept, OperatorError> {
    let now = now();
    let ask = cluster.annotations().get(names::RENEW);
    let pods = pods(world, valid).await;
    let mut wanted = Wanted {
        now,
        unchanging: unchanging(valid, pods.as_deref()),
        peers: peers(pods.as_deref().unwrap_or_default()),
        ..Wanted::default()
    };
    let refused = ask.and_then(|text| asked(text, &mut wanted));
    let (secrets, renewed) = secret::ensure(&world.client, valid, &wanted).await?;
    let key = (&*valid.namespace, &*valid.name);
    world.metrics.certificates(key, renewed.first_end);
    for event in events(&renewed, refused) {
        world.event(valid, event).await;
    }
    if ask.is_some() {
        let api: Api<HeliosCluster> = Api::namespaced(world.client.clone(), &valid.namespace);
        let patch = json!({"metadata": {"annotations": {names::RENEW: null}}});
        api.patch(&valid.name, &PatchParams::default(), &Patch::Merge(&patch))
            .await?;
    }
    Ok(Kept {
        secrets,
        verdict: verdict(&renewed, &wanted.unchanging, now),
        again: Duration::from_secs(u64::try_from(renewed.again - now).unwrap_or(1)),
    })
}

/// Seconds since the Unix epoch.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(since.unwrap_or_default().as_secs()).unwrap_or(i64::MAX)
}

/// The cluster's Pods; `None` when they are not known yet.
async fn pods(world: &World, cluster: &ValidCluster) -> Option<Vec<Arc<Pod>>> {
    let known = tokio::time::timeout(PODS_LIMIT, world.pods.wait_until_ready()).await;
    // An inner error: nobody watches them, because this process is about to end.
    known
        .ok()
        .map(|_| world.pods_of(&cluster.namespace, &cluster.name))
}

/// Takes what the annotation asks for; why not, if it asks for nothing that is known.
fn asked(text: &str, wanted: &mut Wanted) -> Option<String> {
    match text {
        "certificates" => wanted.all = true,
        "authority" => {
            wanted.all = true;
            wanted.authority = true;
        }
        other => {
            let key = names::RENEW;
            return Some(format!(
                "{key} must be \"certificates\" or \"authority\", but is \"{other}\""
            ));
        }
    }
    None
}

/// Holders of whose Pods one is of an operator that did not renew anything: its program reads its
/// files once. Where the Pods are not known, everybody.
fn unchanging(cluster: &ValidCluster, pods: Option<&[Arc<Pod>]>) -> BTreeSet<String> {
    let proxy = names::proxy(&cluster.name);
    let Some(pods) = pods else {
        let instances = cluster.instances.iter().map(ToString::to_string);
        return instances.chain([proxy]).collect();
    };
    let old = pods
        .iter()
        .filter(|pod| !pod.annotations().contains_key(names::RELOADS));
    let holder = |pod: &Arc<Pod>| match pod.labels().get(names::COMPONENT).map(String::as_str) {
        Some("proxy") => Some(proxy.clone()),
        _ => pod.labels().get(names::INSTANCE).cloned(),
    };
    old.filter_map(holder).collect()
}

/// Programs that serve and read their files again. One that does not serve reads them when it
/// starts, or is waited for by whoever needs it.
fn peers(pods: &[Arc<Pod>]) -> Vec<Peer> {
    let peer = |pod: &Arc<Pod>| {
        let status = pod.status.as_ref()?;
        let mut conditions = status.conditions.iter().flatten();
        let ready = conditions.any(|c| c.type_ == "Ready" && c.status == "True");
        let name = match pod.labels().get(names::COMPONENT).map(String::as_str) {
            Some("proxy") => names::PROXY_IDENTITY.to_owned(),
            _ => pod.labels().get(names::INSTANCE)?.clone(),
        };
        let ip = status.pod_ip.as_ref()?.parse().ok()?;
        (ready && pod.annotations().contains_key(names::RELOADS)).then(|| Peer {
            address: SocketAddr::new(ip, names::CONTROL_PORT),
            name,
            pod: pod.name_any(),
        })
    };
    pods.iter().filter_map(peer).collect()
}

fn events(renewed: &Renewed, refused: Option<String>) -> Vec<Event> {
    let event = |type_, reason: &str, notes: &[String]| Event {
        type_,
        reason: reason.to_owned(),
        note: Some(notes.join("; ").chars().take(NOTE).collect()),
        action: "Renew".to_owned(),
        secondary: None,
    };
    let Renewed { done, failed, .. } = renewed;
    let mut all = Vec::new();
    if !done.is_empty() {
        all.push(event(EventType::Normal, "CertificatesRenewed", done));
    }
    if !failed.is_empty() {
        all.push(event(EventType::Warning, "CertificatesNotRenewed", failed));
    }
    if let Some(why) = refused {
        all.push(event(EventType::Warning, "RenewalRefused", &[why]));
    }
    all
}

/// The condition.
fn verdict(renewed: &Renewed, unchanging: &BTreeSet<String>, now: i64) -> Verdict {
    let kind = ConditionType::CertificatesValid;
    let end = date(renewed.first_end);
    if !renewed.failed.is_empty() {
        let why = renewed.failed.join("; ");
        return Verdict::bad(
            kind,
            "CannotRenew",
            &format!("the first ends on {end}; {why}"),
        );
    }
    if !renewed.doubting.is_empty() {
        let who = renewed.doubting.join(", ");
        let why = format!("no certificates of the new authority yet, not believed by {who}");
        return Verdict::bad(
            kind,
            "NotBelieved",
            &format!("the first ends on {end}; {why}"),
        );
    }
    let mut others = renewed.others.iter();
    if let Some((secret, end)) = others.find(|(_, end)| *end - now <= LAST_DAYS) {
        let end = date(*end);
        let why = format!(
            "the certificate in \"{secret}\" ends on {end}; the operator did not make it and does \
             not renew it"
        );
        return Verdict::bad(kind, "NotOurs", &why);
    }
    if renewed.first_end <= now {
        return Verdict::bad(kind, "Ended", &format!("the first ended on {end}"));
    }
    if !unchanging.is_empty() {
        let who: Vec<&str> = unchanging.iter().map(String::as_str).collect();
        let why = format!(
            "the first ends on {end}; a Pod of {} is of an earlier operator and gets short ones \
             with its next replacement",
            who.join(", ")
        );
        return Verdict::good(kind, "OldPods", &why);
    }
    Verdict::good(kind, "Valid", &format!("the first ends on {end}"))
}

fn date(at: i64) -> String {
    Timestamp::from_second(at)
        .map(|time| time.strftime("%Y-%m-%d").to_string())
        .unwrap_or_default()
}

#[cfg(test)]
#[path = "renewing_tests.rs"]
mod tests;
