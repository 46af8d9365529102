//! `switchover`: asks by annotation, as a person would, and follows what the operator makes of it.
//!
//! Invariant: what this command did not see to its end it does not call done; a request that
//! nobody took is taken back, so that it is not carried out when nobody expects it any more.

use std::fmt::Write as _;
use std::time::Duration;

use futures_util::StreamExt as _;
use helios_api::v1alpha1::{ConditionType, FinishedOperation, HeliosCluster, names};
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use serde_json::json;
use tokio::time::Instant;

use super::args::MoveArgs;
use super::place::{Place, failure, limited};
use crate::failure::Failure;
use crate::out;

/// How long the operator may take to notice a request; its copy succeeds it after 8 s.
const TAKEN: Duration = Duration::from_secs(60);
/// An operation that was accepted shows in the status within that (it is held back for 2 s while
/// clients wait). The same refusal twice in a row changes nothing there.
const SHOWN: Duration = Duration::from_secs(5);

/// How often a request is written again because the status has changed meanwhile.
const ATTEMPTS: usize = 10;

/// What is known of a request.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Seen {
    /// The annotation is still there.
    Asked,
    /// The annotation is gone, and nothing says what became of it.
    Taken,
    /// The operator says no. `fresh`: it has not said so before.
    Refused { why: String, fresh: bool },
    /// It is at this step.
    Running { step: String },
    /// It has ended.
    Ended(Box<FinishedOperation>),
}

/// The status before the request, as far as it is compared.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Before {
    /// Number of the last operation, running or ended.
    last: i64,
    /// Message and time of the last refusal.
    refused: Option<(String, String)>,
}

impl Before {
    pub(super) fn of(cluster: &HeliosCluster) -> Self {
        let status = cluster.status.as_ref();
        Self {
            last: status
                .into_iter()
                .flat_map(|s| {
                    let ended = s.last_operations.iter().map(|o| o.id);
                    ended.chain(s.operation.as_ref().map(|o| o.id))
                })
                .max()
                .unwrap_or_default(),
            refused: refusal(cluster),
        }
    }

    /// What has become of a request since.
    pub(super) fn judge(&self, cluster: &HeliosCluster) -> Seen {
        const KIND: &str = "switchover";
        let empty = Default::default();
        let status = cluster.status.as_ref().unwrap_or(&empty);
        let ours = |o: &&FinishedOperation| o.id > self.last && o.kind == KIND;
        if let Some(ended) = status.last_operations.iter().find(ours) {
            return Seen::Ended(Box::new(ended.clone()));
        }
        if let Some(o) = status
            .operation
            .as_ref()
            .filter(|o| o.id > self.last && o.kind == KIND)
        {
            return Seen::Running {
                step: o.step.clone(),
            };
        }
        if cluster.annotations().contains_key(names::SWITCHOVER) {
            return Seen::Asked;
        }
        match refusal(cluster) {
            Some((why, since)) => {
                let fresh = self.refused.as_ref() != Some(&(why.clone(), since));
                Seen::Refused { why, fresh }
            }
            None => Seen::Taken,
        }
    }
}

/// Message and time of the refusal that the status has.
fn refusal(cluster: &HeliosCluster) -> Option<(String, String)> {
    let conditions = &cluster.status.as_ref()?.conditions;
    let kind = ConditionType::SwitchoverAccepted.as_str();
    let found = conditions
        .iter()
        .find(|c| c.type_ == kind && c.status == "False")?;
    Some((
        found.message.clone(),
        found.last_transition_time.0.to_string(),
    ))
}

/// `kubectl helios switchover`.
pub(super) async fn run(place: &Place, args: &MoveArgs) -> Result<(), Failure> {
    let name = &args.cluster.cluster;
    let cluster = place.cluster(name).await?;
    check(&cluster, args)?;
    let before = Before::of(&cluster);
    let to = args.to.as_ref().map_or("auto", |to| to.as_str());
    ask(place, &cluster, to).await?;
    let ended = Follow::new(place, name, before, Duration::from_secs(args.timeout))
        .end()
        .await?;
    if args.json {
        let text = serde_json::to_string(&ended)
            .map_err(|e| Failure::failed(format!("could not write JSON: {e}")))?;
        out::print(&text);
    } else if ended.outcome == "succeeded" {
        out::print(&describe(&ended));
    }
    if ended.outcome == "succeeded" {
        return Ok(());
    }
    let why = ended.reason.as_deref().unwrap_or("no reason is given");
    Err(Failure::failed(format!(
        "switchover {} was {}: {why}",
        ended.id, ended.outcome
    )))
}

/// What can be said without asking.
fn check(cluster: &HeliosCluster, args: &MoveArgs) -> Result<(), Failure> {
    let status = cluster.status.clone().unwrap_or_default();
    waiting(cluster)?;
    let Some(to) = &args.to else { return Ok(()) };
    let known: Vec<&str> = status.instances.iter().map(|i| &*i.name).collect();
    if !known.is_empty() && !known.contains(&to.as_str()) {
        let known = known.join(", ");
        return Err(Failure::failed(format!(
            "there is no instance \"{to}\", only {known}"
        )));
    }
    Ok(())
}

/// Writes the annotation, unless somebody has written one since it was looked at.
async fn ask(place: &Place, cluster: &HeliosCluster, to: &str) -> Result<(), Failure> {
    let (api, params, name) = (place.clusters(), PatchParams::default(), cluster.name_any());
    let mut version = cluster.resource_version();
    for _ in 0..ATTEMPTS {
        let patch = Patch::Merge(json!({"metadata": {
            "resourceVersion": version, "annotations": {names::SWITCHOVER: to},
        }}));
        match tokio::time::timeout(TAKEN, api.patch(&name, &params, &patch)).await {
            Ok(Ok(_)) => return Ok(()),
            // The status is part of the object and changes by itself.
            Ok(Err(kube::Error::Api(answer))) if answer.code == 409 => {
                let now = place.cluster(&name).await?;
                waiting(&now)?;
                version = now.resource_version();
            }
            Ok(Err(error)) => return Err(failure(&error)),
            Err(_) => {
                return Err(Failure::unreachable(format!(
                    "the API server did not answer within {TAKEN:?}; it may have taken the request"
                )));
            }
        }
    }
    Err(Failure::failed(format!(
        "the cluster changed {ATTEMPTS} times while a switchover was being requested; try again"
    )))
}

/// A request that nobody has taken yet.
fn waiting(cluster: &HeliosCluster) -> Result<(), Failure> {
    match cluster.annotations().get(names::SWITCHOVER) {
        None => Ok(()),
        Some(to) => Err(Failure::failed(format!(
            "a switchover to {to} has been requested already and is not taken yet"
        ))),
    }
}

/// Follows one request.
struct Follow<'a> {
    place: &'a Place,
    name: &'a str,
    before: Before,
    started: Instant,
    limit: Duration,
    /// Since when the annotation is gone.
    taken: Option<Instant>,
    said: String,
}

impl<'a> Follow<'a> {
    fn new(place: &'a Place, name: &'a str, before: Before, limit: Duration) -> Self {
        Self {
            place,
            name,
            before,
            started: Instant::now(),
            limit,
            taken: None,
            said: String::new(),
        }
    }

    async fn end(mut self) -> Result<FinishedOperation, Failure> {
        let stream = watcher::watch_object(self.place.clusters(), self.name).default_backoff();
        let mut stream = std::pin::pin!(stream);
        let mut last = Seen::Asked;
        self.say("requested");
        loop {
            let deadline = self.deadline(&last);
            tokio::select! {
                event = stream.next() => match event {
                    Some(Ok(Some(cluster))) => last = self.before.judge(&cluster),
                    Some(Ok(None)) => return Err(Failure::failed("the cluster was deleted")),
                    Some(Err(error)) => {
                        self.say(&format!("the API server does not answer: {error}"));
                        continue;
                    }
                    None => return Err(Failure::unreachable("the API server ended the watch")),
                },
                () = tokio::time::sleep_until(deadline) => return self.late(last).await,
                _ = tokio::signal::ctrl_c() => {
                    out::note("the request stands; \"kubectl helios status\" shows what becomes of it");
                    return Err(Failure::interrupted());
                }
            }
            match &last {
                Seen::Ended(ended) => {
                    self.say("done");
                    return Ok((**ended).clone());
                }
                Seen::Refused { why, fresh: true } => return Err(refused(why)),
                Seen::Running { step } => {
                    let step = step.clone();
                    self.say(&step);
                }
                Seen::Taken | Seen::Refused { .. } => {
                    self.taken.get_or_insert_with(Instant::now);
                }
                Seen::Asked => {}
            }
        }
    }

    /// Until when the next change is waited for.
    fn deadline(&self, last: &Seen) -> Instant {
        let end = self.started + self.limit;
        match (last, self.taken) {
            (Seen::Asked, _) => end.min(self.started + TAKEN),
            (Seen::Refused { .. }, Some(taken)) => end.min(taken + SHOWN),
            _ => end,
        }
    }

    /// Nothing more has come.
    async fn late(self, last: Seen) -> Result<FinishedOperation, Failure> {
        match last {
            Seen::Refused { why, .. } => Err(refused(&why)),
            Seen::Asked => {
                let patch = json!({"metadata": {"annotations": {names::SWITCHOVER: null}}});
                let (api, params) = (self.place.clusters(), PatchParams::default());
                let patch = Patch::Merge(&patch);
                let now = limited(api.patch(self.name, &params, &patch)).await?;
                // It may have been taken at the last moment.
                let nothing = matches!(
                    self.before.judge(&now),
                    Seen::Taken | Seen::Refused { fresh: false, .. }
                );
                if nothing {
                    return Err(Failure::failed(
                        "no operator has taken the request; it is withdrawn. Is the operator up? \
                         If a move begins now, it had just been taken",
                    ));
                }
                Err(self.still_going())
            }
            _ => Err(self.still_going()),
        }
    }

    fn still_going(&self) -> Failure {
        Failure::failed(format!(
            "the switchover has not ended within {:?} and goes on; \"kubectl helios status {}\" \
             shows where it is",
            self.limit, self.name
        ))
    }

    /// A line of progress, once.
    fn say(&mut self, what: &str) {
        if self.said != what {
            what.clone_into(&mut self.said);
            out::note(&format!(
                "{:>7.1} s  {what}",
                self.started.elapsed().as_secs_f64()
            ));
        }
    }
}

fn refused(why: &str) -> Failure {
    Failure::failed(format!("the switchover was refused: {why}"))
}

fn describe(o: &FinishedOperation) -> String {
    let mut text = format!(
        "primary moved from \"{}\" to \"{}\", epoch {}\n",
        o.from, o.to, o.epoch
    );
    for phase in &o.phases {
        let _ = writeln!(text, "  {:<9}{:>8} ms", phase.phase, phase.ms);
    }
    let _ = writeln!(text, "  {:<9}{:>8} ms", "pause", o.pause_ms);
    let _ = writeln!(
        text,
        "{} transactions replayed, {} sessions got an error",
        o.replayed, o.failed
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn cluster(annotations: Value, status: Value) -> HeliosCluster {
        serde_json::from_value(json!({
            "apiVersion": "heliosdb.io/v1alpha1", "kind": "HeliosCluster",
            "metadata": {"name": "pg", "annotations": annotations},
            "spec": {"imageName": "postgres:17", "storage": {"size": "1Gi"}},
            "status": status,
        }))
        .unwrap()
    }

    fn refused_at(time: &str, why: &str) -> Value {
        json!([{"type": "SwitchoverAccepted", "status": "False", "reason": "Refused",
                "message": why, "lastTransitionTime": time}])
    }

    fn ended(id: i64, kind: &str) -> Value {
        json!({"id": id, "kind": kind, "from": "pg-1", "to": "pg-2", "epoch": 3, "cause": "",
               "outcome": "succeeded", "started": "2026-11-29T09:00:00Z", "pauseMs": 80,
               "phases": [{"phase": "drain", "ms": 12}], "replayed": 4})
    }

    #[test]
    fn a_request_is_followed_from_the_annotation_to_its_end() {
        let before = Before::of(&cluster(
            json!({}),
            json!({"lastOperations": [ended(2, "failover")]}),
        ));
        let asked = cluster(json!({names::SWITCHOVER: "auto"}), json!({}));
        assert_eq!(before.judge(&asked), Seen::Asked);
        let taken = cluster(json!({}), json!({"lastOperations": [ended(2, "failover")]}));
        assert_eq!(before.judge(&taken), Seen::Taken);
        let running = json!({"operation": {"id": 3, "kind": "switchover", "step": "drain",
            "cause": "", "started": "2026-11-29T09:00:00Z"}});
        let step = "drain".to_owned();
        assert_eq!(
            before.judge(&cluster(json!({}), running)),
            Seen::Running { step }
        );
        let done = cluster(
            json!({}),
            json!({"lastOperations": [ended(2, "failover"), ended(3, "switchover")]}),
        );
        let Seen::Ended(o) = before.judge(&done) else {
            panic!("not ended")
        };
        assert_eq!(
            describe(&o),
            "primary moved from \"pg-1\" to \"pg-2\", epoch 3\n  drain          12 ms\n  \
             pause          80 ms\n4 transactions replayed, 0 sessions got an error\n"
        );
    }

    #[test]
    fn somebody_elses_operation_is_not_ours() {
        let before = Before::of(&cluster(
            json!({}),
            json!({"lastOperations": [ended(2, "switchover")]}),
        ));
        let other = json!({"lastOperations": [ended(2, "switchover"), ended(3, "failover")]});
        assert_eq!(before.judge(&cluster(json!({}), other)), Seen::Taken);
    }

    #[test]
    fn what_was_running_already_is_not_ours() {
        let operation = |id: i64| {
            json!({"operation": {"id": id, "kind": "switchover", "step": "drain",
                "cause": "", "started": "2026-11-29T09:00:00Z"}})
        };
        let before = Before::of(&cluster(json!({}), operation(3)));
        assert_eq!(before.judge(&cluster(json!({}), operation(3))), Seen::Taken);
        let step = "drain".to_owned();
        let next = before.judge(&cluster(json!({}), operation(4)));
        assert_eq!(next, Seen::Running { step });
    }

    #[test]
    fn an_old_refusal_is_told_from_a_new_one() {
        let old = refused_at("2026-11-29T09:00:00Z", "pg-2 is behind");
        let before = Before::of(&cluster(json!({}), json!({"conditions": old})));
        let judge = |conditions: Value| {
            before.judge(&cluster(json!({}), json!({"conditions": conditions})))
        };
        let why = "pg-2 is behind".to_owned();
        assert_eq!(
            judge(old),
            Seen::Refused {
                why: why.clone(),
                fresh: false
            }
        );
        assert_eq!(
            judge(refused_at("2026-11-29T09:05:00Z", "pg-2 is behind")),
            Seen::Refused { why, fresh: true }
        );
        assert_eq!(
            judge(refused_at("2026-11-29T09:00:00Z", "pg-2 is fenced")),
            Seen::Refused {
                why: "pg-2 is fenced".to_owned(),
                fresh: true
            }
        );
    }

    #[test]
    fn what_cannot_work_is_not_asked_for() {
        let status = json!({"instances": [{"name": "pg-1", "role": "primary", "ready": true}]});
        let args = |to: &str| MoveArgs {
            cluster: super::super::args::ClusterArg {
                cluster: "pg".to_owned(),
            },
            to: Some(to.parse().unwrap()),
            timeout: 1,
            json: false,
        };
        let error = check(&cluster(json!({}), status.clone()), &args("pg-9")).unwrap_err();
        assert_eq!(error.message(), "there is no instance \"pg-9\", only pg-1");
        let asked = cluster(json!({names::SWITCHOVER: "pg-2"}), status);
        let error = check(&asked, &args("pg-1")).unwrap_err();
        assert!(error.message().contains("already"), "{error}");
    }
}
