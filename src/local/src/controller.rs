//! Executes what `helios_cluster` decides: observes, saves, acts, hands results back.
//!
//! Invariant: the state is on disk before any action that follows from it is begun, and before
//! anybody is told of it. What a step has learned, and nothing follows from yet, is saved with the
//! next state that something follows from: the pause of a move is made of such waits for the disk.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use helios_agent::AgentConfig;
use helios_agent::record::RecordFile;
use helios_api::Endpoint;
use helios_api::control::{Backend, LostCommits, ProxyStatus};
use helios_cluster::{
    Action, ClusterState, Decision, Failure, Finished, Mode, Observation, ProxyCommand, Reply,
    Request, Settings, Time, decide, elect,
};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::agents::Agents;
use crate::error::LocalError;
use crate::flush::Flush;
use crate::sessions::MoveSessions;
use crate::status::Progress;

/// Name of the only proxy in observations.
const PROXY: &str = "proxy";
/// Pause between rounds when nothing happens.
const IDLE: Duration = Duration::from_millis(250);
/// The same while the primary changes: back-offs and patience are looked at so often.
const MOVING: Duration = Duration::from_millis(20);
/// A proxy's status is asked for anew after so long.
const STATUS_AGE: Duration = Duration::from_millis(200);
/// A proxy that does not answer by then is taken for silent.
const STATUS_LIMIT: Duration = Duration::from_secs(2);
/// Beyond the drain's own limit.
const PROXY_LIMIT: Duration = Duration::from_secs(90);

/// A request with the place for its answer.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) request: Request,
    pub(crate) answer: Answer,
}

/// Takes the number of the operation that was begun, or why none was.
type Answer = oneshot::Sender<Result<Option<u64>, String>>;

/// Where the proxy is found once it runs.
pub(crate) type ProxySlot = Arc<OnceLock<Arc<dyn MoveSessions>>>;

/// The controller's task.
#[derive(Debug)]
pub(crate) struct Controller {
    pub(crate) settings: Settings,
    pub(crate) state_file: PathBuf,
    pub(crate) record: Arc<Mutex<RecordFile>>,
    pub(crate) agents: Arc<Agents>,
    pub(crate) proxy: ProxySlot,
    pub(crate) asks: mpsc::Receiver<Ask>,
    pub(crate) published: watch::Sender<ClusterState>,
    pub(crate) progress: broadcast::Sender<Progress>,
}

/// What a round starts from.
struct Round {
    state: ClusterState,
    /// Since when `state` has not been on disk.
    unsaved: Option<Instant>,
    running: Vec<Action>,
    finished: Vec<Finished>,
    status: Option<(Instant, ProxyStatus)>,
    done: mpsc::Sender<Finished>,
    flush: Arc<Flush>,
    /// Who the proxy was told is to be promoted should the primary fail.
    heir: Option<Backend>,
}

impl Controller {
    /// Runs until it is cancelled; actions under way are left to end by themselves.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let (done, mut results) = mpsc::channel(64);
        let mut round = Round {
            state: self.published.borrow().clone(),
            unsaved: None,
            running: Vec::new(),
            finished: Vec::new(),
            status: None,
            done,
            flush: Arc::new(Flush::default()),
            heir: None,
        };
        let changed = self.agents.changed();
        loop {
            let pause = match round.state.mode {
                Mode::Moving(_) => MOVING,
                Mode::Steady | Mode::Bootstrap => IDLE,
            };
            let mut ask = None;
            tokio::select! {
                () = cancel.cancelled() => return,
                Some(finished) = results.recv() => round.finished.push(finished),
                () = changed.notified() => {}
                Some(asked) = self.asks.recv() => ask = Some(asked),
                () = tokio::time::sleep(pause) => {}
            }
            while let Ok(more) = results.try_recv() {
                round.finished.push(more);
            }
            self.round(&mut round, ask).await;
        }
    }

    async fn round(&self, round: &mut Round, ask: Option<Ask>) {
        let finished = std::mem::take(&mut round.finished);
        for end in &finished {
            log_end(end);
            round.running.retain(|action| *action != end.action);
            if matches!(end.action, Action::Proxy { .. }) {
                round.status = None;
            }
        }
        let (request, answer) = ask.map_or((None, None), |a| (Some(a.request), Some(a.answer)));
        let obs = self.observe(round, finished, request).await;
        let decision = match decide(&self.settings, &round.state, &obs, now()) {
            Ok(decision) => decision,
            Err(violation) => {
                // A bug; the last state stays in force and the next observation may be kinder.
                tracing::error!(%violation, "decision was not carried out");
                deny(answer, violation.to_string());
                return;
            }
        };
        self.tell_heir(round, &obs);
        let changed = decision.next != round.state;
        let overdue = round.unsaved.is_some_and(|since| since.elapsed() >= MOVING);
        if changed && may_wait(&round.state, &decision) && !overdue {
            round.unsaved.get_or_insert_with(Instant::now);
        } else if changed || round.unsaved.is_some_and(|_| overdue || acts(&decision)) {
            if let Err(error) = self.save(&decision.next).await {
                tracing::error!(%error, "cluster state could not be saved; nothing is done");
                let why = format!("the cluster's state could not be saved: {error}");
                deny(answer, why);
                round.finished = obs.finished;
                tokio::time::sleep(IDLE).await;
                return;
            }
            round.unsaved = None;
            self.tell(&round.state, &decision.next);
        }
        self.carry_out(round, decision, answer);
    }

    /// Tells the proxy who is to be promoted should the primary fail, when that is somebody else.
    fn tell_heir(&self, round: &mut Round, obs: &Observation) {
        let before = round.heir.as_ref().map(|heir| &heir.name);
        let heir = elect::heir(&self.settings, &round.state, obs, before);
        let heir = heir.and_then(|name| obs.backend(&name));
        if let Some(proxy) = self.proxy.get()
            && heir != round.heir
        {
            proxy.set_heir(heir.clone());
            round.heir = heir;
        }
    }

    fn carry_out(&self, round: &mut Round, decision: Decision, answer: Option<Answer>) {
        round.state = decision.next;
        self.published.send_if_modified(|published| {
            let changed = *published != round.state;
            if changed {
                published.clone_from(&round.state);
            }
            changed
        });
        if let (Some(to), Some(answer)) = (answer, decision.answer) {
            // Whoever asked may have gone; what was begun goes on.
            let _ = to.send(answer.map_err(|refusal| refusal.to_string()));
        }
        for action in decision.actions {
            round.running.push(action.clone());
            let (agents, proxy) = (Arc::clone(&self.agents), Arc::clone(&self.proxy));
            let (done, flush) = (round.done.clone(), Arc::clone(&round.flush));
            let name = round.state.primary_name();
            let primary = name
                .and_then(|name| agents.config(name))
                .map(AgentConfig::unix_endpoint);
            tokio::spawn(async move {
                let flush = (flush.as_ref(), primary.as_ref());
                let result = Box::pin(perform(&agents, &proxy, flush, &action)).await;
                // Nobody listens any more when the controller has ended.
                let _ = done.send(Finished { action, result }).await;
            });
        }
    }

    async fn observe(
        &self,
        round: &mut Round,
        finished: Vec<Finished>,
        request: Option<Request>,
    ) -> Observation {
        let fresh = round
            .status
            .as_ref()
            .is_some_and(|(at, _)| at.elapsed() < STATUS_AGE);
        let proxy = self.proxy.get();
        if let Some(proxy) = proxy
            && !fresh
        {
            let status = tokio::time::timeout(STATUS_LIMIT, proxy.status()).await;
            round.status = status.ok().map(|status| (Instant::now(), status));
        }
        let status = round.status.as_ref().map(|(_, status)| status.clone());
        Observation {
            instances: self.agents.views(),
            proxies: proxy
                .map(|_| (PROXY.to_owned(), status))
                .into_iter()
                .collect(),
            running: round.running.clone(),
            finished,
            request,
            ..Observation::default()
        }
    }

    async fn save(&self, state: &ClusterState) -> Result<(), LocalError> {
        let (record, state) = (Arc::clone(&self.record), state.clone());
        let write = move || {
            let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
            record.write(&state)
        };
        match tokio::task::spawn_blocking(write).await {
            Ok(result) => result.map_err(|e| LocalError::io("write", &self.state_file, e)),
            Err(error) => Err(LocalError::Control(error.to_string())),
        }
    }

    /// Tells whoever follows the progress what has changed.
    fn tell(&self, before: &ClusterState, after: &ClusterState) {
        let last = before.operations.last().map_or(0, |op| op.id);
        for operation in after.operations.iter().filter(|op| op.id > last) {
            tracing::info!(kind = ?operation.kind, from = %operation.from, to = %operation.to,
                epoch = %operation.epoch, outcome = ?operation.outcome,
                pause_ms = operation.pause_micros() / 1000, "operation ended");
            if operation.lost == LostCommits::Possible {
                tracing::warn!(epoch = %operation.epoch, to = %operation.to,
                    "commits that clients were told of may be lost");
            }
            let operation = Box::new(operation.clone());
            let _ = self.progress.send(Progress::Finished { operation });
        }
        let phase = |state: &ClusterState| state.moving().map(|m| (m.id, m.step.phase()));
        if let Some(m) = after.moving()
            && phase(before) != phase(after)
        {
            tracing::info!(kind = ?m.kind, phase = m.step.phase().as_str(), cause = m.cause, "phase");
            let _ = self.progress.send(Progress::Phase {
                phase: m.step.phase(),
                elapsed_micros: m.step_started.micros_since(m.started),
            });
        }
    }
}

/// Whether anybody is told or commanded anything.
fn acts(decision: &Decision) -> bool {
    !decision.actions.is_empty() || decision.answer.is_some()
}

/// Whether the decision only takes note of something within a step: an executor that dies without
/// having saved it is succeeded by one that gives the step's commands again.
fn may_wait(before: &ClusterState, decision: &Decision) -> bool {
    let step = |state: &ClusterState| state.moving().map(|m| (m.id, m.step.phase()));
    let within = step(before).is_some() && step(before) == step(&decision.next);
    // Who is primary, and whom commits rest on, is more than a note.
    let same = before.primary == decision.next.primary
        && before.epoch == decision.next.epoch
        && before.sync == decision.next.sync;
    within && same && !acts(decision)
}

/// Says why nothing comes of a request.
fn deny(answer: Option<Answer>, why: String) {
    if let Some(answer) = answer {
        // Whoever asked may have gone.
        let _ = answer.send(Err(why));
    }
}

fn now() -> Time {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Time(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

fn log_end(end: &Finished) {
    match &end.result {
        Ok(reply) => tracing::debug!(action = ?end.action, ?reply, "action ended"),
        Err(error) => tracing::warn!(action = ?end.action, %error, "action failed"),
    }
}

async fn perform(
    agents: &Agents,
    proxy: &ProxySlot,
    flush: (&Flush, Option<&Endpoint>),
    action: &Action,
) -> Result<Reply, Failure> {
    match action {
        Action::Agent { instance, request } => agents
            .command(instance, request.clone())
            .await
            .map(Reply::Agent),
        Action::Proxy { command, .. } => {
            let Some(proxy) = proxy.get() else {
                return Err(Failure::Failed("the proxy does not run".to_owned()));
            };
            let limit = match command {
                ProxyCommand::Drain(request) => {
                    PROXY_LIMIT + Duration::from_millis(request.timeout_ms)
                }
                _ => PROXY_LIMIT,
            };
            match tokio::time::timeout(limit, command_proxy(proxy.as_ref(), flush, command)).await {
                Ok(result) => result.map_err(Failure::Failed),
                Err(_) => Err(Failure::Failed(format!("no answer within {limit:?}"))),
            }
        }
    }
}

async fn command_proxy(
    proxy: &dyn MoveSessions,
    (flush, primary): (&Flush, Option<&Endpoint>),
    command: &ProxyCommand,
) -> Result<Reply, String> {
    match command {
        ProxyCommand::Prepare {
            epoch, candidate, ..
        } => {
            let sessions = proxy.prepare(*epoch, candidate.clone());
            let connect = async {
                if let Some(primary) = primary {
                    flush.prepare(primary).await;
                }
            };
            tokio::join!(sessions, connect).0.map(|()| Reply::Done)
        }
        ProxyCommand::Drain(request) => {
            let report = proxy.drain(request.clone()).await?;
            if let Some(primary) = primary {
                flush.run(primary).await?;
            }
            Ok(Reply::Drained(report))
        }
        // There is one proxy.
        ProxyCommand::Resume(topology)
        | ProxyCommand::Together { topology, .. }
        | ProxyCommand::Join(topology) => proxy.resume(topology.clone()).await.map(Reply::Resumed),
        ProxyCommand::Abort { epoch } => proxy.abort(*epoch).await.map(|()| Reply::Done),
    }
}
