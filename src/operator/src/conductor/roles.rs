//! Labels of instances' Pods: Services follow the role.

use std::sync::Arc;
use std::time::Duration;

use helios_api::v1alpha1::names;
use helios_api::v1alpha1::valid::ValidCluster;
use helios_cluster::ClusterState;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::task::JoinHandle;

/// How long one label may take; the next round tries again.
const LIMIT: Duration = Duration::from_secs(2);

/// Labels Pods, one round of them at a time, beside everything else: a move does not wait for it.
#[derive(Debug, Default)]
pub(super) struct Labels {
    running: Option<JoinHandle<()>>,
}

impl Labels {
    /// Begins to label each Pod that has not the label of its role.
    pub(super) fn keep(
        &mut self,
        client: &Client,
        cluster: &ValidCluster,
        state: &ClusterState,
        pods: &[Arc<Pod>],
    ) {
        if self
            .running
            .as_ref()
            .is_some_and(|task| !task.is_finished())
        {
            return;
        }
        let Some(primary) = state.primary_name() else {
            return;
        };
        let wrong: Vec<_> = pods
            .iter()
            .filter_map(|pod| wrong(pod, primary.as_str()))
            .collect();
        if wrong.is_empty() {
            return;
        }
        let api: Api<Pod> = Api::namespaced(client.clone(), &cluster.namespace);
        self.running = Some(tokio::spawn(label(api, wrong)));
    }
}

/// The role that a Pod is to be labelled with, unless it is.
fn wrong(pod: &Pod, primary: &str) -> Option<(String, &'static str)> {
    let role = match pod.labels().get(names::INSTANCE)?.as_str() == primary {
        true => "primary",
        false => "replica",
    };
    let has = pod.labels().get(names::ROLE).map(String::as_str);
    (has != Some(role)).then(|| (pod.name_any(), role))
}

async fn label(api: Api<Pod>, wrong: Vec<(String, &'static str)>) {
    for (name, role) in wrong {
        let patch = Patch::Merge(json!({"metadata": {"labels": {names::ROLE: role}}}));
        let params = PatchParams::default();
        let labelled = tokio::time::timeout(LIMIT, api.patch(&name, &params, &patch)).await;
        if !matches!(labelled, Ok(Ok(_))) {
            tracing::debug!(pod = name, role, "Pod could not be labelled; tried again");
        }
    }
}
