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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::tests::cluster;
    use crate::mock::Mock;
    use helios_api::Timeline;
    use helios_cluster::state::Primary;

    fn pod(instance: &str, role: Option<&str>) -> Arc<Pod> {
        let mut pod = Pod::default();
        pod.metadata.name = Some(format!("{instance}-0"));
        let labels = pod.metadata.labels.get_or_insert_default();
        labels.insert(names::INSTANCE.to_owned(), instance.to_owned());
        if let Some(role) = role {
            labels.insert(names::ROLE.to_owned(), role.to_owned());
        }
        Arc::new(pod)
    }

    /// What is asked of an API server for Pods with these roles, while pg-2 is primary.
    async fn asked(pods: &[Arc<Pod>], primary: bool) -> Vec<(String, serde_json::Value)> {
        let mock = Mock::start(|call| (200, call.body.clone())).await;
        let spec = json!({"imageName": "postgres:17", "storage": {"size": "1Gi"}});
        let primary = primary.then(|| Primary {
            name: "pg-2".parse().unwrap(),
            timeline: Timeline(1),
        });
        let state = ClusterState {
            primary,
            ..ClusterState::default()
        };
        let mut labels = Labels::default();
        labels.keep(&mock.client, &cluster(spec), &state, pods);
        if let Some(task) = labels.running {
            task.await.unwrap();
        }
        let calls = mock.calls().into_iter();
        calls.map(|call| (call.what, call.body)).collect()
    }

    #[tokio::test]
    async fn exactly_the_pods_with_a_wrong_label_get_another() {
        let path = "PATCH /api/v1/namespaces/shop/pods";
        let call = |pod: &str, role: &str| {
            let body = json!({"metadata": {"labels": {names::ROLE: role}}});
            (format!("{path}/{pod}"), body)
        };
        let moved = [pod("pg-1", Some("primary")), pod("pg-2", Some("replica"))];
        let wanted = [call("pg-1-0", "replica"), call("pg-2-0", "primary")];
        assert_eq!(asked(&moved, true).await, wanted);
        let new = [pod("pg-2", Some("primary")), pod("pg-3", None)];
        assert_eq!(asked(&new, true).await, [call("pg-3-0", "replica")]);
        let right = [pod("pg-1", Some("replica")), pod("pg-2", Some("primary"))];
        assert_eq!(asked(&right, true).await, []);
        assert_eq!(asked(&moved, false).await, [], "there is no primary yet");
    }
}
