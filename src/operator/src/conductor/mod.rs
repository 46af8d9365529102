//! One task a cluster: observes its agents and proxies, asks for a decision, saves it, acts on it,
//! and says in the status how things are.
//!
//! Invariant: what `helios_cluster` decides is durable in the object's status before any action
//! that follows from it is begun.

mod act;
mod agents;
mod dying;
mod first;
mod lease;
mod life;
mod plan;
mod proxies;
mod report;
mod roles;
mod sql;
mod store;
mod together;
mod verdicts;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helios_api::InstanceName;
use helios_api::agent::ServerSettings;
use helios_api::v1alpha1::ConditionType;
use helios_api::v1alpha1::names;
use helios_api::v1alpha1::valid::ValidCluster;
use helios_cluster::{Action, Decision, Finished, Mode, Observation, Request, decide};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::runtime::events::{Event, EventType};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::OperatorError;
use crate::reconcile::World;
use crate::secret::Secrets;
use act::Actor;
use agents::{Agents, Place};
use proxies::Proxies;
pub(crate) use report::{Verdict, report_invalid};
use store::{Saved, Store};
use view::{instance_place, leaves, log_end, now, proxy_place, settings, takes_clients, unasked};

/// Pause between rounds when nothing happens.
const IDLE: Duration = Duration::from_millis(500);
/// The same while the primary changes: back-offs and patience are looked at so often.
const MOVING: Duration = Duration::from_millis(20);
/// How long the first look at all agents and proxies may take; who has not answered then is silent.
const FIRST_LOOK: Duration = Duration::from_secs(3);
/// Pause after the API server could not be had.
const OUTAGE: Duration = Duration::from_millis(500);

/// What a conductor is told by the reconciliation.
#[derive(Debug, Clone)]
pub(crate) struct Input {
    pub(crate) cluster: ValidCluster,
    pub(crate) secrets: Arc<Secrets>,
    pub(crate) verdicts: Vec<Verdict>,
    /// Value of the annotation that asks for a switchover.
    pub(crate) request: Option<String>,
    pub(crate) paused: bool,
    /// Value of the annotation that fences.
    pub(crate) fenced: Option<String>,
    /// What of the spec instances' Pods are built from.
    pub(crate) template: String,
    /// PostgreSQL's settings.
    pub(crate) server: ServerSettings,
    /// Instances that may hold the data of an earlier cluster.
    pub(crate) kept: BTreeSet<InstanceName>,
}

/// The reconciliation's end of a conductor.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) uid: String,
    pub(crate) poke: Arc<Notify>,
    pub(crate) stop: CancellationToken,
    input: watch::Sender<Input>,
}

impl Handle {
    /// A new spec. What is asked for stays as it was. New certificates count from the next
    /// connection on, whether or not anything else has changed.
    pub(crate) fn change(&self, mut input: Input) {
        self.input.send_if_modified(|now| {
            input.secrets = Arc::new(now.secrets.renewed(&input.secrets));
            input.request.clone_from(&now.request);
            input.paused = now.paused;
            input.fenced.clone_from(&now.fenced);
            let changed = now.cluster != input.cluster
                || now.verdicts != input.verdicts
                || now.template != input.template
                || now.server != input.server;
            if changed {
                *now = input;
            }
            changed
        });
    }

    /// What the annotations say.
    pub(crate) fn request(&self, request: Option<String>, fenced: Option<String>, paused: bool) {
        self.input.send_if_modified(|now| {
            let changed = now.request != request || now.paused != paused || now.fenced != fenced;
            (now.request, now.fenced, now.paused) = (request, fenced, paused);
            changed
        });
    }

    /// Replaces one condition; whether it is another one than before.
    pub(crate) fn verdict(&self, verdict: &Verdict) -> bool {
        self.input.send_if_modified(|now| {
            let same = |v: &&mut Verdict| v.kind == verdict.kind;
            match now.verdicts.iter_mut().find(same) {
                Some(old) if old == verdict => false,
                Some(old) => {
                    old.clone_from(verdict);
                    true
                }
                None => {
                    now.verdicts.push(verdict.clone());
                    true
                }
            }
        })
    }
}

/// Starts a conductor.
pub(crate) fn start(world: Arc<World>, input: Input) -> Handle {
    let uid = input.cluster.uid.clone();
    let (sender, receiver) = watch::channel(input);
    let poke = Arc::new(Notify::new());
    let stop = CancellationToken::new();
    let handle = Handle {
        uid,
        poke: Arc::clone(&poke),
        stop: stop.clone(),
        input: sender,
    };
    tokio::spawn(async move {
        let (namespace, name) = {
            let input = receiver.borrow();
            (input.cluster.namespace.clone(), input.cluster.name.clone())
        };
        tokio::select! {
            result = conduct(Arc::clone(&world), receiver, poke) => match result {
                Ok(()) => {
                    world.metrics.forget((&namespace, &name));
                    tracing::info!(cluster = name, "cluster is gone");
                }
                Err(error @ OperatorError::Overtaken(_)) => {
                    tracing::error!(cluster = name, %error, "ending");
                    world.fatal.cancel();
                }
                // The other clusters are none the worse for it.
                Err(error) => tracing::error!(cluster = name, %error, "nothing is decided"),
            },
            () = stop.cancelled() => {}
        }
        stop.cancel();
    });
    handle
}

struct Conductor {
    world: Arc<World>,
    input: watch::Receiver<Input>,
    changed: Arc<Notify>,
    agents: Agents,
    proxies: Proxies,
    store: Store,
    actor: Actor,
    reporter: report::Reporter,
    labels: roles::Labels,
    dying: dying::Dying,
    first: first::First,
    running: Vec<Action>,
    finished: Vec<Finished>,
    life: life::Life,
    /// Until when nothing is decided because not everybody has been asked.
    first_look: Option<Instant>,
}

/// Runs until the object is gone.
async fn conduct(
    world: Arc<World>,
    input: watch::Receiver<Input>,
    changed: Arc<Notify>,
) -> Result<(), OperatorError> {
    // The first look is at all Pods that there are.
    if world.pods.wait_until_ready().await.is_err() {
        return Ok(());
    }
    let first = input.borrow().clone();
    let Some(store) = load(&world, &first).await? else {
        return Ok(());
    };
    let (done, mut results) = mpsc::channel(64);
    let reporter = report::Reporter::new(&world, &first.cluster, store.conditions());
    let mut this = Conductor {
        world,
        input,
        changed,
        agents: Agents::default(),
        proxies: Proxies::default(),
        store,
        actor: Actor::new(done),
        reporter,
        labels: roles::Labels::default(),
        dying: dying::Dying::default(),
        first: first::First::default(),
        running: Vec::new(),
        finished: Vec::new(),
        life: life::Life::default(),
        first_look: Some(Instant::now() + FIRST_LOOK),
    };
    let mut pause = Duration::ZERO;
    loop {
        tokio::select! {
            Some(result) = results.recv() => this.finished.push(result),
            () = this.changed.notified() => {}
            Ok(()) = this.input.changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
        while let Ok(more) = results.try_recv() {
            this.finished.push(more);
        }
        pause = match this.round().await {
            Ok(Some(pause)) => pause,
            Ok(None) => return Ok(()),
            Err(error @ (OperatorError::Overtaken(_) | OperatorError::State { .. })) => {
                return Err(error);
            }
            Err(error) => {
                tracing::warn!(%error, "nothing can be decided now");
                OUTAGE
            }
        };
    }
}

/// Reads the durable state, for as long as it takes.
async fn load(world: &World, input: &Input) -> Result<Option<Store>, OperatorError> {
    loop {
        match Store::load(&world.client, &input.cluster).await {
            Err(error @ OperatorError::State { .. }) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "durable state could not be read");
                tokio::time::sleep(OUTAGE).await;
            }
            other => return other,
        }
    }
}

impl Conductor {
    /// One round; the pause until the next one, or `None` when the object is gone.
    async fn round(&mut self) -> Result<Option<Duration>, OperatorError> {
        let input = self.input.borrow_and_update().clone();
        let cluster = &input.cluster;
        let pods = self.world.pods_of(&cluster.namespace, &cluster.name);
        self.place(&input, &pods)?;
        if !self.has_looked() {
            return Ok(Some(MOVING));
        }
        let Some(ask) = self.take_request(&input).await? else {
            return Ok(None);
        };
        for end in &self.finished {
            log_end(end);
            self.first.note(end);
            self.running.retain(|action| *action != end.action);
        }
        let mut obs = self.observe(ask.as_ref(), input.paused);
        obs.kept.clone_from(&input.kept);
        let plan = self.plan(&input, &pods, &mut obs);
        let state = &self.store.now().cluster;
        let decision = match decide(&settings(cluster, &input.server), state, &obs, now()) {
            Ok(decision) => decision,
            Err(violation) => {
                // A bug; the last state stays in force and the next observation may be kinder.
                tracing::error!(%violation, "decision was not carried out");
                return Ok(Some(IDLE));
            }
        };
        let refused = match (&ask, &decision.answer) {
            (Some(Err(why)), _) => Some(why.clone()),
            (_, Some(Err(why))) => Some(why.to_string()),
            _ => None,
        };
        let planned = plan.as_ref().and_then(|plan| plan.request.as_ref());
        let unasked = unasked(state, &decision, planned.map(|(_, why)| *why));
        let next = Saved {
            cluster: decision.next.clone(),
            consumed: self.store.now().consumed || ask.is_some(),
            database: self.store.now().database || self.first.made(),
        };
        let before = self.store.now().cluster.clone();
        self.dying.before_save(&before, &next.cluster);
        match self.store.save(next).await {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(error) => {
                // Nothing was decided: what ended is absorbed again.
                self.finished = obs.finished;
                return Err(error);
            }
        }
        self.dying.after_save(&before, &self.store.now().cluster);
        if ask.is_some() {
            self.answer(&input, refused).await;
        } else if let Some(why) = unasked {
            self.event(cluster, EventType::Normal, "SwitchoverBegan", why);
        }
        self.follow_up(&input, plan, decision.answer.as_ref());
        self.agents.grant(view::duty(cluster, &decision.next));
        let moving = matches!(decision.next.mode, Mode::Moving(_));
        self.look_for_heir(&input, &decision, &obs);
        self.carry_out(&input, decision);
        let state = self.store.now().cluster.clone();
        self.labels.keep(&self.world.client, cluster, &state, &pods);
        let reachable = pods.iter().any(|pod| takes_clients(pod));
        self.reporter
            .publish(&input, &state, (&obs, reachable), &mut self.store, now())
            .await;
        Ok(Some(if moving { MOVING } else { IDLE }))
    }

    /// Has the proxies told who is to be promoted should the primary fail.
    fn look_for_heir(&self, input: &Input, decision: &Decision, obs: &Observation) {
        let settings = settings(&input.cluster, &input.server);
        self.proxies.look_for_heir(&settings, &decision.next, obs);
    }

    /// Whether everybody has been asked: whom a successor has not asked yet is neither silent nor
    /// gone.
    fn has_looked(&mut self) -> bool {
        let over = self.first_look.is_none_or(|until| {
            Instant::now() >= until || (self.agents.asked() && self.proxies.asked())
        });
        if over {
            self.first_look = None;
        }
        over
    }

    /// All that is known now, with what is asked for: by a person, or by a primary that is about
    /// to be ended.
    fn observe(&mut self, ask: Option<&Result<Request, String>>, paused: bool) -> Observation {
        let mut obs = Observation {
            instances: self.agents.views(),
            proxies: self.proxies.views(),
            running: self.running.clone(),
            finished: std::mem::take(&mut self.finished),
            request: ask.cloned().and_then(Result::ok),
            ..Observation::default()
        };
        if ask.is_none() && !paused && leaves(&self.store.now().cluster, &obs) {
            obs.request = Some(Request::Switchover { to: None });
        }
        obs
    }

    /// Takes note of where everything runs.
    fn place(&mut self, input: &Input, pods: &[Arc<Pod>]) -> Result<(), OperatorError> {
        let material = &input.secrets.operator;
        let known = self.store.now().cluster.members.keys().cloned();
        let all = input
            .cluster
            .instances
            .iter()
            .cloned()
            .chain(known)
            .collect();
        self.agents.retain(&all);
        for name in &all {
            let labelled = |pod: &&Arc<Pod>| {
                pod.labels().get(names::INSTANCE).map(String::as_str) == Some(name.as_str())
            };
            let place = pods.iter().find(labelled).map_or(
                Place {
                    ip: None,
                    ended: false,
                },
                |pod| instance_place(pod),
            );
            self.agents.place(name, place, material, &self.changed)?;
        }
        let proxies: BTreeMap<String, IpAddr> =
            pods.iter().filter_map(|pod| proxy_place(pod)).collect();
        self.proxies.place(&proxies, material, &self.changed)
    }

    /// What the annotation asks for, if it is to be answered in this round. `None`: the object is
    /// gone. An annotation that was taken before is only removed.
    #[allow(clippy::type_complexity, reason = "gone, nothing, wrong, or a request")]
    async fn take_request(
        &mut self,
        input: &Input,
    ) -> Result<Option<Option<Result<Request, String>>>, OperatorError> {
        let Some(text) = &input.request else {
            if self.store.now().consumed {
                let saved = Saved {
                    consumed: false,
                    ..self.store.now().clone()
                };
                if !self.store.save(saved).await? {
                    return Ok(None);
                }
            }
            return Ok(Some(None));
        };
        if self.store.now().consumed {
            self.store.remove_annotation(names::SWITCHOVER).await?;
            return Ok(Some(None));
        }
        let to = match text.as_str() {
            "auto" => Ok(None),
            name => name
                .parse::<InstanceName>()
                .map(Some)
                .map_err(|e| e.to_string()),
        };
        Ok(Some(Some(to.map(|to| Request::Switchover { to }))))
    }

    /// Says what became of a request, and removes it.
    async fn answer(&mut self, input: &Input, refused: Option<String>) {
        let event = match &refused {
            None => event(EventType::Normal, "SwitchoverBegan", "Switchover", None),
            Some(why) => event(
                EventType::Warning,
                "SwitchoverRefused",
                "Switchover",
                Some(why.clone()),
            ),
        };
        self.reporter.set(match refused {
            None => Verdict::good(
                ConditionType::SwitchoverAccepted,
                "Began",
                "the switchover has begun",
            ),
            Some(why) => Verdict::bad(ConditionType::SwitchoverAccepted, "Refused", &why),
        });
        // Neither may hold the switchover up.
        let (world, cluster) = (Arc::clone(&self.world), input.cluster.clone());
        tokio::spawn(async move { world.event(&cluster, event).await });
        if let Err(error) = self.store.remove_annotation(names::SWITCHOVER).await {
            tracing::warn!(%error, "annotation could not be removed; tried again");
        }
    }

    fn carry_out(&mut self, input: &Input, decision: Decision) {
        if input.paused && matches!(decision.next.mode, Mode::Steady | Mode::Bootstrap) {
            return;
        }
        let primary = decision.next.primary_name().and_then(|name| {
            let endpoint = self.agents.endpoint(name)?;
            Some((name.clone(), endpoint))
        });
        self.running.extend(decision.actions.iter().cloned());
        let (together, rest) = together::split(decision.actions, &self.proxies);
        if let Some(together) = together {
            self.actor.go_on(together);
        }
        for action in rest {
            let agents = (&self.agents, &self.changed);
            self.actor
                .start(input, agents, &self.proxies, primary.clone(), action);
        }
        let serves = matches!(decision.next.mode, Mode::Steady);
        if let (true, false, Some(primary)) = (serves, self.store.now().database, primary) {
            let client = &self.world.client;
            self.first
                .make_database(client, input, primary, &self.changed);
        }
    }
}

/// An Event of a cluster.
fn event(type_: EventType, reason: &str, action: &str, note: Option<String>) -> Event {
    Event {
        type_,
        reason: reason.to_owned(),
        note,
        action: action.to_owned(),
        secondary: None,
    }
}
