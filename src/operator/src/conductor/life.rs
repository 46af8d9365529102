//! The conductor's hands for what [`super::plan`] decides: Pods and StatefulSets are deleted, and
//! conditions say how far it is.
//!
//! Invariant: one act at a time, and on exactly the Pod that the decision was made about.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use helios_api::InstanceName;
use helios_api::v1alpha1::valid::ValidCluster;
use helios_api::v1alpha1::{DataDurability, OnDeletion, names};
use helios_cluster::{ClusterState, Observation, Refusal};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{DeleteParams, Preconditions};
use kube::runtime::events::EventType;
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::plan::{Act, Fenced, Given, Plan, plan};
use super::view::pod_view;
use super::{Input, event, first, verdicts};
use crate::conductor::Verdict;
use crate::reconcile::World;
use crate::{OperatorError, build};

/// How long one act may take; the next round tries again.
const LIMIT: Duration = Duration::from_secs(10);

/// What is remembered between rounds; nothing of it has to outlive this process.
#[derive(Debug, Default)]
pub(super) struct Life {
    running: Option<JoinHandle<()>>,
    /// Instances whose objects were deleted.
    deleted: Arc<Mutex<BTreeSet<InstanceName>>>,
    /// Why what the last plan asked for was refused.
    refused: Option<String>,
    /// What was last said, so that an Event is published once.
    said: Vec<Verdict>,
}

impl Life {
    /// What is next, and what is to be said of it.
    pub(super) fn plan(
        &mut self,
        input: &Input,
        pods: &[Arc<Pod>],
        (state, obs): (&ClusterState, &Observation),
    ) -> (Plan, Vec<Verdict>) {
        let fenced = Fenced::parse(input.fenced.as_deref().unwrap_or_default());
        let given = self.given(input, pods, state, fenced.clone().ok());
        let plan = plan(&given, state, obs);
        let why = fenced.err().or_else(|| self.refused.clone());
        let said = verdicts::all(
            &verdicts::Said {
                given: &given,
                plan: &plan,
                state,
                obs,
                server: &input.server,
                asked: input.fenced.is_some(),
            },
            why.as_deref(),
        );
        (plan, said)
    }

    fn given(
        &self,
        input: &Input,
        pods: &[Arc<Pod>],
        state: &ClusterState,
        fenced: Option<Fenced>,
    ) -> Given {
        let cluster = &input.cluster;
        let wanted: BTreeSet<_> = cluster.instances.iter().cloned().collect();
        let view = |pod: &Arc<Pod>| {
            let name = pod.labels().get(names::INSTANCE)?.parse().ok()?;
            let image = &cluster.spec.image_name;
            Some((name, pod_view(pod, &input.template, image)))
        };
        let pods: BTreeMap<_, _> = pods.iter().filter_map(view).collect();
        let mut deleted = self.deleted.lock().unwrap_or_else(PoisonError::into_inner);
        deleted.retain(|name| !wanted.contains(name));
        // What cannot be understood changes nothing.
        let now = || {
            let fenced = state.members.iter().filter(|(_, m)| m.fenced);
            Fenced::These(fenced.map(|(name, _)| name.clone()).collect())
        };
        Given {
            pods,
            fenced: fenced.unwrap_or_else(now),
            deleted: deleted.clone(),
            synchronous: cluster.spec.postgresql.synchronous.number > 0,
            required: cluster.spec.postgresql.synchronous.data_durability
                == DataDurability::Required,
            wanted,
        }
    }

    /// Takes note of the answer to what the plan asked for.
    pub(super) fn answered(&mut self, refused: Option<String>) {
        self.refused = refused;
    }

    /// What is news of what is said.
    pub(super) fn news(&mut self, said: &[Verdict]) -> Vec<Verdict> {
        let new = said.iter().filter(|v| !self.said.contains(v)).cloned();
        let news = new.collect();
        self.said = said.to_vec();
        news
    }

    /// Begins an act, unless one is under way.
    pub(super) fn act(
        &mut self,
        world: &Arc<World>,
        cluster: &ValidCluster,
        act: Act,
        changed: &Arc<Notify>,
    ) {
        let busy = |task: &JoinHandle<()>| !task.is_finished();
        if self.running.as_ref().is_some_and(busy) {
            return;
        }
        let (world, cluster) = (Arc::clone(world), cluster.clone());
        let (deleted, changed) = (Arc::clone(&self.deleted), Arc::clone(changed));
        self.running = Some(tokio::spawn(async move {
            let done = tokio::time::timeout(LIMIT, carry_out(&world.client, &cluster, &act)).await;
            match done {
                Ok(Ok(())) => {
                    let (reason, note) = words(&act);
                    if let Act::Remove(name) = act {
                        let mut deleted = deleted.lock().unwrap_or_else(PoisonError::into_inner);
                        deleted.insert(name);
                    }
                    tracing::info!(cluster = cluster.name, note);
                    let event = event(EventType::Normal, reason, "Roll", Some(note));
                    world.event(&cluster, event).await;
                }
                Ok(Err(error)) => tracing::warn!(?act, %error, "tried again"),
                Err(_) => tracing::warn!(?act, "no answer within {LIMIT:?}, tried again"),
            }
            // Not at once: what was deleted is seen a moment later.
            tokio::time::sleep(Duration::from_millis(500)).await;
            changed.notify_one();
        }));
    }
}

fn words(act: &Act) -> (&'static str, String) {
    match act {
        Act::Replace { instance, .. } => {
            let note = format!("Pod of instance \"{instance}\" is replaced");
            ("Replacing", note)
        }
        Act::Remove(instance) => ("Removed", format!("instance \"{instance}\" was removed")),
    }
}

/// Deletes what is to go; that it has gone already is as good.
async fn carry_out(
    client: &Client,
    cluster: &ValidCluster,
    act: &Act,
) -> Result<(), OperatorError> {
    let space = &cluster.namespace;
    match act {
        Act::Replace { pod, .. } => {
            let pods: Api<Pod> = Api::namespaced(client.clone(), space);
            // Its successor has the same name.
            let params = DeleteParams::default().preconditions(Preconditions {
                uid: Some(pod.uid.clone()),
                ..Preconditions::default()
            });
            gone(pods.delete(&pod.name, &params).await)
        }
        Act::Remove(instance) => {
            let sets: Api<StatefulSet> = Api::namespaced(client.clone(), space);
            let params = DeleteParams::background();
            gone(sets.delete(instance.as_str(), &params).await)?;
            if cluster.spec.storage.on_deletion == OnDeletion::Delete {
                let volumes: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), space);
                // The data first: they are never there without their log.
                for claim in build::claims(cluster, instance).iter().rev() {
                    gone(volumes.delete(&claim.name, &params).await)?;
                }
            }
            Ok(())
        }
    }
}

fn gone<T>(answer: Result<T, kube::Error>) -> Result<(), OperatorError> {
    match answer {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl super::Conductor {
    /// What is next, put into the observation that the decision is made from. `None`: somebody has
    /// asked for something else, or nothing is to be changed.
    pub(super) fn plan(
        &mut self,
        input: &Input,
        pods: &[Arc<Pod>],
        obs: &mut Observation,
    ) -> Option<Plan> {
        if input.paused {
            return None;
        }
        let state = &self.store.now().cluster;
        let (plan, mut said) = self.life.plan(input, pods, (state, &*obs));
        said.push(
            self.first
                .verdict((state, &*obs), self.store.now().database),
        );
        let news = self.life.news(&said);
        for verdict in news
            .into_iter()
            .filter(|v| !v.good && !matches!(v.reason, "Fencing" | "Beginning"))
        {
            let kind = match verdict.reason {
                "Refused" | "UnknownInstance" | first::NO_PRIMARY | first::NO_DATABASE => {
                    EventType::Warning
                }
                _ => EventType::Normal,
            };
            self.event(&input.cluster, kind, verdict.reason, verdict.message);
        }
        self.reporter.say(said);
        obs.aside.clone_from(&plan.aside);
        obs.removed.clone_from(&plan.removed);
        if obs.request.is_some() {
            return None;
        }
        obs.request = plan.request.as_ref().map(|(request, _)| request.clone());
        Some(plan)
    }

    /// Takes note of what became of the plan, and acts on it.
    pub(super) fn follow_up(
        &mut self,
        input: &Input,
        plan: Option<Plan>,
        answer: Option<&Result<Option<u64>, Refusal>>,
    ) {
        let Some(plan) = plan else { return };
        if plan.request.is_none() || answer.is_some() {
            let refused = answer.and_then(|answer| answer.as_ref().err());
            self.life.answered(refused.map(ToString::to_string));
        }
        if let Some(act) = plan.act {
            self.life
                .act(&self.world, &input.cluster, act, &self.changed);
        }
    }

    /// Publishes an Event beside everything else.
    pub(super) fn event(
        &self,
        cluster: &ValidCluster,
        kind: EventType,
        reason: &str,
        note: String,
    ) {
        let event = event(kind, reason, reason, Some(note));
        let (world, cluster) = (Arc::clone(&self.world), cluster.clone());
        tokio::spawn(async move { world.event(&cluster, event).await });
    }
}

#[cfg(test)]
#[path = "life_tests.rs"]
mod tests;
