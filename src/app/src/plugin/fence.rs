//! `fence` and `unfence`: the annotation lists the instances that are to stay stopped.
//!
//! Invariant: done is what the operator's status shows, not what was asked for.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::StreamExt as _;
use helios_api::v1alpha1::{HeliosCluster, names};
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use serde_json::json;

use super::args::FenceArgs;
use super::place::{Place, failure};
use crate::failure::Failure;
use crate::out;

/// How long the operator and the agent may take.
const LIMIT: Duration = Duration::from_secs(120);
/// How often the annotation is written again because the object has changed meanwhile.
const ATTEMPTS: usize = 10;

/// `kubectl helios fence` and `unfence`.
pub(super) async fn run(place: &Place, args: &FenceArgs, fence: bool) -> Result<(), Failure> {
    let name = &args.cluster.cluster;
    let asked: BTreeSet<String> = args.instances.iter().map(ToString::to_string).collect();
    check(&place.cluster(name).await?, &asked, fence)?;
    write(place, name, &asked, fence).await?;
    let stream = watcher::watch_object(place.clusters(), name).default_backoff();
    let mut stream = std::pin::pin!(stream);
    let seen = async {
        while let Some(event) = stream.next().await {
            match event {
                Ok(Some(cluster)) if is_done(&cluster, &asked, fence) => return Ok(()),
                Ok(None) => return Err(Failure::failed("the cluster was deleted")),
                Ok(Some(_)) | Err(_) => {}
            }
        }
        Err(Failure::unreachable("the API server ended the watch"))
    };
    let what = if fence { "fenced" } else { "no longer fenced" };
    match tokio::time::timeout(LIMIT, seen).await {
        Ok(result) => result?,
        Err(_) => {
            return Err(Failure::failed(format!(
                "it was asked for, but is not {what} after {LIMIT:?}; \"kubectl helios status \
                 {name}\" shows what stands in the way"
            )));
        }
    }
    for instance in &asked {
        out::print(&format!("{instance} is {what}"));
    }
    Ok(())
}

/// What can be said without asking.
fn check(cluster: &HeliosCluster, asked: &BTreeSet<String>, fence: bool) -> Result<(), Failure> {
    let known = instances(cluster);
    for instance in asked {
        // One that is gone may still stand in the annotation.
        if fence && !known.contains(instance) {
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            return Err(Failure::failed(format!(
                "there is no instance \"{instance}\", only {known}"
            )));
        }
    }
    Ok(())
}

/// Adds to the annotation, or takes away from it.
async fn write(
    place: &Place,
    name: &str,
    asked: &BTreeSet<String>,
    fence: bool,
) -> Result<(), Failure> {
    let (api, params) = (place.clusters(), PatchParams::default());
    for _ in 0..ATTEMPTS {
        let cluster = place.cluster(name).await?;
        let now = cluster.annotations().get(names::FENCED).map(String::as_str);
        let next = changed(now.unwrap_or_default(), &instances(&cluster), asked, fence);
        if next.as_deref() == now {
            return Ok(());
        }
        let patch = Patch::Merge(json!({"metadata": {
            "resourceVersion": cluster.resource_version(),
            "annotations": {names::FENCED: next},
        }}));
        match tokio::time::timeout(LIMIT, api.patch(name, &params, &patch)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(kube::Error::Api(answer))) if answer.code == 409 => {}
            Ok(Err(error)) => return Err(failure(&error)),
            Err(_) => return Err(Failure::unreachable("the API server does not answer")),
        }
    }
    Err(Failure::failed(format!(
        "the cluster changed {ATTEMPTS} times meanwhile; try again"
    )))
}

/// The instances that the status knows.
fn instances(cluster: &HeliosCluster) -> BTreeSet<String> {
    let all = cluster.status.iter().flat_map(|s| &s.instances);
    all.map(|i| i.name.clone()).collect()
}

/// The annotation's next value; `None`: it goes. `*` stands for all `known` instances.
fn changed(
    now: &str,
    known: &BTreeSet<String>,
    asked: &BTreeSet<String>,
    fence: bool,
) -> Option<String> {
    if now.trim() == "*" && fence {
        return Some(now.to_owned());
    }
    let mut all: BTreeSet<String> = match now.trim() {
        "*" => known.clone(),
        names => listed(names),
    };
    for instance in asked {
        if fence {
            all.insert(instance.clone());
        } else {
            all.remove(instance);
        }
    }
    let text = all.into_iter().collect::<Vec<_>>().join(",");
    (!text.is_empty()).then_some(text)
}

fn listed(text: &str) -> BTreeSet<String> {
    let names = text.split(',').map(str::trim).filter(|n| !n.is_empty());
    names.map(ToOwned::to_owned).collect()
}

/// Whether the status shows it.
fn is_done(cluster: &HeliosCluster, asked: &BTreeSet<String>, fence: bool) -> bool {
    let status = cluster.status.iter().flat_map(|s| &s.instances);
    let fenced: BTreeSet<&str> = status
        .filter(|i| i.role == "fenced")
        .map(|i| &*i.name)
        .collect();
    asked.iter().all(|name| fenced.contains(&**name) == fence)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_annotation_is_added_to_and_taken_from() {
        let two = set(&["pg-2"]);
        let known = set(&["pg-1", "pg-2", "pg-3"]);
        let changed = |now: &str, asked, fence| changed(now, &known, asked, fence);
        assert_eq!(changed("*", &two, true).as_deref(), Some("*"));
        assert_eq!(changed("*", &two, false).as_deref(), Some("pg-1,pg-3"));
        assert_eq!(changed("", &two, true).as_deref(), Some("pg-2"));
        assert_eq!(
            changed("pg-3, pg-2", &two, true).as_deref(),
            Some("pg-2,pg-3")
        );
        assert_eq!(changed("pg-3,pg-2", &two, false).as_deref(), Some("pg-3"));
        assert_eq!(changed("pg-2", &two, false), None);
        assert_eq!(changed("", &two, false), None);
    }

    #[test]
    fn done_is_what_the_status_shows() {
        let cluster = |role: &str| -> HeliosCluster {
            serde_json::from_value(json!({
                "apiVersion": "heliosdb.io/v1alpha1", "kind": "HeliosCluster",
                "metadata": {"name": "pg"},
                "spec": {"imageName": "postgres:17", "storage": {"size": "1Gi"}},
                "status": {"instances": [{"name": "pg-2", "role": role, "ready": false}]},
            }))
            .unwrap()
        };
        let two = set(&["pg-2"]);
        assert!(is_done(&cluster("fenced"), &two, true));
        assert!(!is_done(&cluster("replica"), &two, true));
        assert!(is_done(&cluster("replica"), &two, false));
        assert!(check(&cluster("replica"), &set(&["pg-9"]), true).is_err());
    }
}
