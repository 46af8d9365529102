//! The durable state, in the object's status.
//!
//! Invariant: a state is saved only over the one that this process saved before it, or loaded; the
//! object's version in each write makes sure. Whoever finds another one there has been overtaken.

use helios_api::v1alpha1::HeliosCluster;
use helios_api::v1alpha1::valid::ValidCluster;
use helios_cluster::ClusterState;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::OperatorError;

/// How often a write is tried that others' changes of the object got ahead of.
const ATTEMPTS: u32 = 8;

/// What is durable.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    /// The decisions' own.
    pub(super) cluster: ClusterState,
    /// Whether the annotation that asks for a switchover was taken, and is still to be removed.
    #[serde(default)]
    pub(super) consumed: bool,
    /// Whether the application's role and database were made.
    #[serde(default)]
    pub(super) database: bool,
}

/// The state of one cluster and the way to its object.
#[derive(Debug)]
pub(super) struct Store {
    api: Api<HeliosCluster>,
    name: String,
    uid: String,
    version: Option<String>,
    saved: Saved,
    /// As it stands in the status.
    text: Option<String>,
    conditions: Vec<Condition>,
}

impl Store {
    /// Reads it; `None`: the object is gone.
    pub(super) async fn load(
        client: &Client,
        cluster: &ValidCluster,
    ) -> Result<Option<Self>, OperatorError> {
        let api: Api<HeliosCluster> = Api::namespaced(client.clone(), &cluster.namespace);
        let Some(object) = api.get_opt(&cluster.name).await? else {
            return Ok(None);
        };
        if object.metadata.uid.as_ref() != Some(&cluster.uid) {
            return Ok(None);
        }
        let status = object.status.unwrap_or_default();
        let wrong = |why: String| OperatorError::State {
            cluster: cluster.name.clone(),
            why,
        };
        let saved: Saved = match &status.state {
            None => Saved::default(),
            Some(text) => serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?,
        };
        if saved.cluster.format != helios_cluster::state::FORMAT {
            return Err(wrong(format!(
                "format {} is not known to this version",
                saved.cluster.format
            )));
        }
        Ok(Some(Self {
            api,
            name: cluster.name.clone(),
            uid: cluster.uid.clone(),
            version: object.metadata.resource_version,
            saved,
            text: status.state,
            conditions: status.conditions,
        }))
    }

    /// The conditions that were there at the start.
    pub(super) fn conditions(&self) -> Vec<Condition> {
        self.conditions.clone()
    }

    /// What is durable now.
    pub(super) fn now(&self) -> &Saved {
        &self.saved
    }

    /// Makes it durable, if it is another one; `false`: the object is gone.
    pub(super) async fn save(&mut self, next: Saved) -> Result<bool, OperatorError> {
        if next == self.saved {
            return Ok(true);
        }
        let text = serde_json::to_string(&next)?;
        let there = self.write(json!({"state": text}), Some(&text)).await?;
        if there {
            self.saved = next;
        }
        Ok(there)
    }

    /// Writes fields of the status; `false`: the object is gone. With `state`, that is what the
    /// write makes durable.
    pub(super) async fn write(
        &mut self,
        status: Value,
        state: Option<&str>,
    ) -> Result<bool, OperatorError> {
        for _ in 0..ATTEMPTS {
            let patch = json!({
                "metadata": {"resourceVersion": self.version},
                "status": status,
            });
            let written = self
                .api
                .patch_status(&self.name, &PatchParams::default(), &Patch::Merge(&patch))
                .await;
            match written {
                Ok(object) => {
                    self.version = object.metadata.resource_version;
                    if let Some(state) = state {
                        self.text = Some(state.to_owned());
                    }
                    return Ok(true);
                }
                Err(kube::Error::Api(answer)) if answer.code == 404 => return Ok(false),
                Err(kube::Error::Api(answer)) if answer.code == 409 => {
                    if !self.look(state).await? {
                        return Ok(false);
                    }
                }
                Err(error) => {
                    return Err(error.into());
                }
            }
        }
        Err(OperatorError::Overtaken(self.name.clone()))
    }

    /// Somebody has changed the object. Anybody may, but for the state; a write of ours whose
    /// answer was lost is ours.
    async fn look(&mut self, tried: Option<&str>) -> Result<bool, OperatorError> {
        let Some(object) = self.api.get_opt(&self.name).await? else {
            return Ok(false);
        };
        if object.metadata.uid.as_ref() != Some(&self.uid) {
            return Ok(false);
        }
        let state = object.status.and_then(|s| s.state);
        if state != self.text && (state.is_none() || state.as_deref() != tried) {
            return Err(OperatorError::Overtaken(self.name.clone()));
        }
        self.version = object.metadata.resource_version;
        Ok(true)
    }

    /// Removes an annotation.
    pub(super) async fn remove_annotation(&self, name: &str) -> Result<(), OperatorError> {
        let patch = json!({"metadata": {"annotations": {name: null}}});
        self.api
            .patch(&self.name, &PatchParams::default(), &Patch::Merge(&patch))
            .await?;
        Ok(())
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
