//! `report`: what somebody needs who was not there, in a folder of text files.
//!
//! Invariant: no value of a Secret is read, not to speak of written: of Secrets the names are
//! listed, through an API that sends nothing else. Logs are as the containers wrote them.

use std::path::{Path, PathBuf};

use helios_api::v1alpha1::{HeliosCluster, names};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Event, PersistentVolumeClaim, Pod, Secret, Service,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{ListParams, LogParams, ObjectList, PartialObjectMeta};
use kube::core::{NamespaceResourceScope, Resource};
use kube::{Api, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::args::ReportArgs;
use super::logs;
use super::place::{Place, limited};
use crate::failure::Failure;
use crate::out;

/// Events of the namespace that are taken, the newest of them last.
const EVENTS: u32 = 2000;
/// The annotation that kubectl keeps a copy of the object in.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// A folder that is being filled, and what could not be had.
struct Folder {
    path: PathBuf,
    /// What could not be had.
    missing: Vec<String>,
    /// What could not be had either, because it was being deleted: nobody's fault.
    gone: Vec<String>,
}

/// `kubectl helios report`.
pub(super) async fn run(place: &Place, args: &ReportArgs) -> Result<(), Failure> {
    let name = &args.cluster.cluster;
    let cluster = place.cluster(name).await?;
    let path = args
        .to
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("helios-report-{name}")));
    let mut folder = Folder::create(path)?;
    folder.yaml("heliosclusters", &clean(cluster.clone())?)?;
    objects(place, name, &mut folder).await?;
    events(place, name, &cluster, &mut folder).await?;
    let selector = format!("{}={name}", names::CLUSTER);
    pods(place.pods(), &selector, args.tail, &mut folder).await?;
    // Whoever may not look into the operator's namespace leaves that to somebody who may.
    let operator = "app.kubernetes.io/name=helios-operator";
    let theirs = Api::namespaced(place.client.clone(), &args.operator_namespace);
    pods(theirs, operator, args.tail, &mut folder).await?;
    folder.finish()
}

async fn objects(place: &Place, name: &str, folder: &mut Folder) -> Result<(), Failure> {
    folder
        .list::<StatefulSet>(place, name, "statefulsets")
        .await?;
    folder
        .list::<Deployment>(place, name, "deployments")
        .await?;
    folder
        .list::<ReplicaSet>(place, name, "replicasets")
        .await?;
    folder.list::<Service>(place, name, "services").await?;
    folder.list::<Endpoints>(place, name, "endpoints").await?;
    folder.list::<ConfigMap>(place, name, "configmaps").await?;
    folder
        .list::<PersistentVolumeClaim>(place, name, "persistentvolumeclaims")
        .await?;
    folder
        .list::<NetworkPolicy>(place, name, "networkpolicies")
        .await?;
    // Metadata alone: the API server sends no content.
    folder
        .list::<PartialObjectMeta<Secret>>(place, name, "secrets")
        .await
}

/// The Events about the cluster and about what belongs to it.
async fn events(
    place: &Place,
    name: &str,
    cluster: &HeliosCluster,
    folder: &mut Folder,
) -> Result<(), Failure> {
    let api: Api<Event> = Api::namespaced(place.client.clone(), &place.namespace);
    let listed = limited(api.list(&ListParams::default().limit(EVENTS))).await;
    let Some(mut events) = folder.had("events", listed) else {
        return Ok(());
    };
    let prefix = format!("{name}-");
    let uid = cluster.uid();
    events.items.retain(|e| {
        let about = &e.involved_object;
        let named = about.name.as_deref().unwrap_or_default();
        about.uid == uid || named == name || named.starts_with(&prefix)
    });
    events.items.sort_by_key(event_time);
    folder.yaml("events", &clean_all(events)?)
}

fn event_time(event: &Event) -> String {
    let first = event.event_time.as_ref().map(|t| t.0.to_string());
    let last = event.last_timestamp.as_ref().map(|t| t.0.to_string());
    last.or(first).unwrap_or_default()
}

/// Pods with their containers' logs, those of the runs before included.
async fn pods(
    api: Api<Pod>,
    selector: &str,
    tail: i64,
    folder: &mut Folder,
) -> Result<(), Failure> {
    let what = format!("pods ({selector})");
    let listed = limited(api.list(&ListParams::default().labels(selector))).await;
    let Some(list) = folder.had(&what, listed) else {
        return Ok(());
    };
    for pod in &list.items {
        let name = pod.name_any();
        folder.yaml(&format!("pod-{name}"), &clean(pod.clone())?)?;
        let statuses = pod
            .status
            .iter()
            .flat_map(|s| s.container_statuses.iter().flatten());
        let restarted = statuses.into_iter().any(|s| s.restart_count > 0);
        let runs: &[bool] = if restarted { &[false, true] } else { &[false] };
        for previous in runs {
            let params = LogParams {
                container: logs::container(pod),
                previous: *previous,
                tail_lines: Some(tail),
                timestamps: true,
                ..LogParams::default()
            };
            let suffix = if *previous { "-previous" } else { "" };
            let file = format!("{name}{suffix}.log");
            match limited(api.logs(&name, &params)).await {
                // On its way out: its containers may have ended already.
                Err(why) if pod.metadata.deletion_timestamp.is_some() => {
                    folder
                        .gone
                        .push(format!("{file}: {why} (its Pod is being deleted)"));
                }
                text => {
                    if let Some(text) = folder.had(&file, text) {
                        folder.write(&file, &text)?;
                    }
                }
            }
        }
    }
    Ok(())
}

impl Folder {
    /// Makes it; one that is there already is left alone.
    fn create(path: PathBuf) -> Result<Self, Failure> {
        std::fs::create_dir(&path)
            .map_err(|e| Failure::failed(format!("could not make \"{}\": {e}", path.display())))?;
        Ok(Self {
            path,
            missing: Vec::new(),
            gone: Vec::new(),
        })
    }

    fn write(&self, file: &str, text: &str) -> Result<(), Failure> {
        let path = self
            .path
            .join(Path::new(file).file_name().unwrap_or_default());
        std::fs::write(&path, text)
            .map_err(|e| Failure::failed(format!("could not write \"{}\": {e}", path.display())))
    }

    fn yaml(&self, name: &str, value: &serde_json::Value) -> Result<(), Failure> {
        let text = serde_saphyr::to_string(value)
            .map_err(|e| Failure::failed(format!("could not write YAML: {e}")))?;
        self.write(&format!("{name}.yaml"), &text)
    }

    /// What was asked for, unless it could not be had: that is noted.
    fn had<T>(&mut self, what: &str, result: Result<T, Failure>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(why) => {
                self.missing.push(format!("{what}: {why}"));
                None
            }
        }
    }

    /// All objects of one kind that belong to the cluster.
    async fn list<K>(&mut self, place: &Place, cluster: &str, what: &str) -> Result<(), Failure>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + Serialize + DeserializeOwned,
        K: std::fmt::Debug,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(place.client.clone(), &place.namespace);
        let labels = format!("{}={cluster}", names::CLUSTER);
        let listed = limited(api.list(&ListParams::default().labels(&labels))).await;
        match self.had(what, listed) {
            Some(list) => self.yaml(what, &clean_all(list)?),
            None => Ok(()),
        }
    }

    fn finish(self) -> Result<(), Failure> {
        out::print(&self.path.display().to_string());
        let text = [&*self.missing, &*self.gone].concat().join("\n");
        if !text.is_empty() {
            self.write("MISSING.txt", &format!("{text}\n"))?;
            out::note(&text);
        }
        if self.missing.is_empty() {
            return Ok(());
        }
        Err(Failure::failed(
            "not everything could be had; MISSING.txt says what, and why",
        ))
    }
}

/// A list without its objects' ballast.
fn clean_all<K: Serialize + Clone>(list: ObjectList<K>) -> Result<serde_json::Value, Failure> {
    list.items
        .into_iter()
        .map(clean)
        .collect::<Result<_, _>>()
        .map(serde_json::Value::Array)
}

/// An object without what only the API server and kubectl need.
fn clean(object: impl Serialize) -> Result<serde_json::Value, Failure> {
    let mut value = serde_json::to_value(object)
        .map_err(|e| Failure::failed(format!("could not write an object: {e}")))?;
    if let Some(metadata) = value.get_mut("metadata").and_then(|m| m.as_object_mut()) {
        metadata.remove("managedFields");
        if let Some(all) = metadata
            .get_mut("annotations")
            .and_then(|a| a.as_object_mut())
        {
            all.remove(LAST_APPLIED);
        }
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_objects_are_left_out() {
        let cleaned = clean(serde_json::json!({
            "metadata": {"name": "a", "managedFields": [1],
                "annotations": {LAST_APPLIED: "password", "kept": "yes"}},
        }))
        .unwrap();
        assert_eq!(
            cleaned,
            serde_json::json!({"metadata": {"name": "a", "annotations": {"kept": "yes"}}})
        );
    }

    #[test]
    fn what_was_being_deleted_is_told_and_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report");
        let mut folder = Folder::create(path.clone()).unwrap();
        folder.gone.push("a.log: it has ended".into());
        assert!(folder.finish().is_ok());
        let missing = std::fs::read_to_string(path.join("MISSING.txt")).unwrap();
        assert_eq!(missing, "a.log: it has ended\n");
    }

    #[test]
    fn what_could_not_be_had_is_in_the_folder_and_in_the_status() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report");
        let mut folder = Folder::create(path.clone()).unwrap();
        assert_eq!(folder.had("services", Ok(1)), Some(1));
        assert_eq!(
            folder.had::<()>("events", Err(Failure::failed("not allowed"))),
            None
        );
        assert_eq!(folder.finish().unwrap_err().code(), 1);
        let missing = std::fs::read_to_string(path.join("MISSING.txt")).unwrap();
        assert_eq!(missing, "events: not allowed\n");
        assert!(
            Folder::create(path).is_err(),
            "a folder that is there is not written into"
        );
    }
}
