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

/// How long one label may take; the next round tries again.
const LIMIT: Duration = Duration::from_secs(2);

/// Labels each Pod that has not the label of its role.
pub(super) async fn label(
    client: &Client,
    cluster: &ValidCluster,
    state: &ClusterState,
    pods: &[Arc<Pod>],
) {
    let Some(primary) = state.primary_name() else {
        return;
    };
    let api: Api<Pod> = Api::namespaced(client.clone(), &cluster.namespace);
    for pod in pods {
        let Some(instance) = pod.labels().get(names::INSTANCE) else {
            continue;
        };
        let role = if instance == primary.as_str() {
            "primary"
        } else {
            "replica"
        };
        if pod.labels().get(names::ROLE).map(String::as_str) == Some(role) {
            continue;
        }
        let patch = json!({"metadata": {"labels": {names::ROLE: role}}});
        let (name, params) = (pod.name_any(), PatchParams::default());
        let patch = Patch::Merge(&patch);
        let labelled = tokio::time::timeout(LIMIT, api.patch(&name, &params, &patch)).await;
        if !matches!(labelled, Ok(Ok(_))) {
            tracing::debug!(pod = name, role, "Pod could not be labelled; tried again");
        }
    }
}
