//! A running local cluster, as an application holds it.

use std::sync::Arc;
use std::time::Duration;

use helios_api::InstanceName;
use helios_api::agent::InstanceState;
use helios_api::control::{MigrationEvent, SessionInfo};
use helios_api::protection::ProtectionReport;
use helios_cluster::{ClusterState, Member, Mode, OperationRecord, Outcome, Request};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::agents::Agents;
use crate::controller::{Ask, Controller, ProxySlot};
use crate::credentials::Credentials;
use crate::error::LocalError;
use crate::layout::Layout;
use crate::lock::Lock;
use crate::options::{AgentMode, LocalBuilder, LocalOptions, ProxyAuth};
use crate::proxy::{self, LocalProxy};
use crate::status::{LocalStatus, MaintenanceReport, Progress};
use crate::{control, setup};

/// Requests that may wait for the controller.
const ASKS: usize = 16;
/// Progress that a slow follower may fall behind.
const PROGRESS: usize = 256;
/// How long sessions get at a shutdown.
const GRACE: Duration = Duration::from_secs(2);
/// Failures in a row, some seconds apart in the end, after which a new cluster is given up.
const HOPELESS: u32 = 5;
/// How long a request may wait for its answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A cluster that runs until [`Self::shutdown`], or until it is dropped.
#[derive(Debug)]
pub struct LocalCluster {
    inner: Arc<Inner>,
    control: Option<control::Server>,
    _lock: Lock,
}

/// What the control socket shares with the owner.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) layout: Layout,
    pub(crate) credentials: Credentials,
    pub(crate) auth: ProxyAuth,
    pub(crate) agents: Arc<Agents>,
    pub(crate) proxy: ProxySlot,
    asks: mpsc::Sender<Ask>,
    pub(crate) state: watch::Receiver<ClusterState>,
    progress: broadcast::Sender<Progress>,
    /// Somebody asked for a stop.
    pub(crate) stop: CancellationToken,
    /// Everything but the control socket has stopped.
    pub(crate) stopped: CancellationToken,
    /// Ends all tasks.
    cancel: CancellationToken,
    /// Ends the controller.
    controller: CancellationToken,
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        self.inner.cancel.cancel();
    }
}

impl LocalCluster {
    /// Options, call by call.
    #[must_use]
    pub fn builder() -> LocalBuilder {
        LocalBuilder::default()
    }

    /// Creates the cluster, or resumes it from what is durable; returns when clients can connect
    /// and, for a new cluster, all standbys follow.
    ///
    /// # Errors
    /// See [`LocalError`]: each names what to do. Whatever was started has been stopped.
    pub async fn start(options: LocalOptions) -> Result<Self, LocalError> {
        let prepared = setup::prepare(&options)?;
        let config = proxy::write_config(&options, &prepared.layout, &prepared.names, setup::PORT)?;
        // Read before anything is started: a typo costs no initdb.
        let config = proxy::load(&config)?;
        setup::await_old_agents(&prepared).await?;
        let is_new = prepared.state.primary.is_none();
        let cancel = CancellationToken::new();
        let parent_watch = matches!(options.agents, AgentMode::Process(_));
        let configs = setup::agent_configs(&prepared, &options, parent_watch)?;
        let agents = Arc::new(Agents::start(configs, &options.agents, &cancel)?);
        let inner = Inner::new(&options, &config, &prepared, agents, cancel);
        let control = match control::serve(Arc::clone(&inner)) {
            Ok(control) => control,
            Err(error) => {
                inner.tear_down().await;
                return Err(error);
            }
        };
        let cluster = Self {
            inner: Arc::clone(&inner),
            control: Some(control),
            _lock: prepared.lock,
        };
        let limit = options.start_timeout;
        let up = Box::pin(inner.come_up(&options, config, is_new, limit));
        if let Err(error) = up.await {
            cluster.shutdown().await;
            return Err(error);
        }
        Ok(cluster)
    }

    /// For libpq, with the password when one is asked for.
    #[must_use]
    pub fn connection_string(&self) -> String {
        self.inner.connection_string(true)
    }

    /// What happens to sessions from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<MigrationEvent> {
        self.inner.subscribe()
    }

    /// Steps of operations from now on.
    #[must_use]
    pub fn progress(&self) -> broadcast::Receiver<Progress> {
        self.inner.progress.subscribe()
    }

    /// The cluster at a glance.
    pub async fn status(&self) -> LocalStatus {
        self.inner.status().await
    }

    /// The proxy's sessions.
    pub async fn sessions(&self) -> Vec<SessionInfo> {
        self.inner.sessions().await
    }

    /// What was protected, and what was not and why, since the proxy started.
    pub async fn protection(&self) -> ProtectionReport {
        self.inner.protection().await
    }

    /// Moves the primary, to `to` or to the best standby.
    ///
    /// # Errors
    /// [`LocalError::Refused`] when nothing was started, [`LocalError::Aborted`] when it ended
    /// elsewhere than asked for.
    pub async fn switchover(
        &self,
        to: Option<InstanceName>,
    ) -> Result<OperationRecord, LocalError> {
        judged(self.inner.operate(Request::Switchover { to }).await?)
    }

    /// Replaces a primary that does not come back by the most advanced standby, although that one
    /// may lack acknowledged commits; [`OperationRecord::lost`] says whether it does.
    ///
    /// # Errors
    /// [`LocalError::Refused`] while the primary is up or nobody can take over.
    pub async fn failover_accepting_loss(&self) -> Result<OperationRecord, LocalError> {
        self.inner.operate(Request::Failover).await
    }

    /// Moves all sessions away from the primary so that it can be worked on.
    ///
    /// # Errors
    /// As [`Self::switchover`].
    pub async fn migrate_for_maintenance(&self) -> Result<MaintenanceReport, LocalError> {
        let operation = self.switchover(None).await?;
        let failed = operation.resumed.failed.values().sum();
        let all = operation.drained.idle + operation.drained.frozen + operation.drained.unprotected;
        Ok(MaintenanceReport {
            moved: all.saturating_sub(failed),
            failed,
            pause_micros: operation.pause_micros(),
            operation,
        })
    }

    /// Stops an instance and keeps it stopped.
    ///
    /// # Errors
    /// [`LocalError::Refused`] with the reason.
    pub async fn fence(&self, name: InstanceName) -> Result<(), LocalError> {
        let request = Request::Fence { instance: name };
        self.inner.ask(request).await.map(drop)
    }

    /// Lets an instance come back.
    ///
    /// # Errors
    /// [`LocalError::Refused`] with the reason.
    pub async fn unfence(&self, name: InstanceName) -> Result<(), LocalError> {
        let request = Request::Unfence { instance: name };
        self.inner.ask(request).await.map(drop)
    }

    /// Returns when somebody asked for a stop over the control socket; call [`Self::shutdown`] then.
    pub async fn stop_requested(&self) {
        self.inner.stop.cancelled().await;
    }

    /// Stops proxy, servers and agents, in that order, each within a limit.
    pub async fn shutdown(mut self) {
        self.inner.tear_down().await;
        if let Some(control) = self.control.take() {
            control.close().await;
        }
    }
}

impl Inner {
    fn new(
        options: &LocalOptions,
        config: &helios_proxy::config::ProxyConfig,
        prepared: &setup::Prepared,
        agents: Arc<Agents>,
        cancel: CancellationToken,
    ) -> Arc<Self> {
        let (asks, inbox) = mpsc::channel(ASKS);
        let (published, state) = watch::channel(prepared.state.clone());
        let (progress, _) = broadcast::channel(PROGRESS);
        let proxy = ProxySlot::default();
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let controller = Controller {
            settings: helios_cluster::Settings {
                synchronous: options.synchronous,
                durability: options.durability,
                drain_timeout_ms: millis(options.drain_timeout),
                slow_interval_ms: millis(config.triggers.latency_interval),
                ..helios_cluster::Settings::default()
            },
            state_file: prepared.layout.state_file(),
            record: Arc::clone(&prepared.record),
            agents: Arc::clone(&agents),
            proxy: Arc::clone(&proxy),
            asks: inbox,
            published,
            progress: progress.clone(),
        };
        let stop_controller = cancel.child_token();
        tokio::spawn(controller.run(stop_controller.clone()));
        Arc::new(Self {
            layout: prepared.layout.clone(),
            credentials: prepared.credentials.clone(),
            auth: options.auth,
            agents,
            proxy,
            asks,
            state,
            progress,
            stop: CancellationToken::new(),
            stopped: CancellationToken::new(),
            cancel,
            controller: stop_controller,
        })
    }

    /// Waits for a primary, makes the role, starts the proxy, waits for the standbys.
    async fn come_up(
        &self,
        options: &LocalOptions,
        config: helios_proxy::config::ProxyConfig,
        is_new: bool,
        limit: Duration,
    ) -> Result<(), LocalError> {
        let deadline = Instant::now() + limit;
        let topology = loop {
            self.wait("primary", deadline, limit, is_new, |inner, state| {
                let name = state.primary_name();
                let up = name.is_some_and(|name| inner.is_primary(name));
                state.mode == Mode::Steady && up
            })
            .await?;
            let obs = helios_cluster::Observation {
                instances: self.agents.views(),
                ..helios_cluster::Observation::default()
            };
            let Some(topology) = self.state.borrow().topology(&obs) else {
                return Err(LocalError::Control("the primary has gone again".to_owned()));
            };
            let made = setup::create_role(&topology.primary.endpoint, &self.credentials).await;
            match made {
                Ok(()) => break topology,
                Err(error) if Instant::now() >= deadline => return Err(error),
                // It may have failed in this moment; the controller sees to that.
                Err(error) => tracing::warn!(%error, "trying again"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        let proxy = LocalProxy::start(config, options.http_listen.as_deref(), topology).await?;
        // Set once: nobody else starts one.
        let _ = self.proxy.set(proxy);
        if is_new {
            let synchronous = options.synchronous;
            self.wait("standby", deadline, limit, is_new, |_, state| {
                settled(state, synchronous)
            })
            .await?;
        }
        Ok(())
    }

    fn is_primary(&self, name: &InstanceName) -> bool {
        let views = self.agents.views();
        let state = views.get(name).map(|view| &view.contact);
        matches!(state, Some(helios_cluster::Contact::Answers(agent))
            if matches!(agent.instance, InstanceState::Primary { .. }))
    }

    /// Waits until `done`; the error names the instance that holds things up, with its log's end.
    async fn wait(
        &self,
        role: &str,
        deadline: Instant,
        limit: Duration,
        is_new: bool,
        done: impl Fn(&Self, &ClusterState) -> bool,
    ) -> Result<(), LocalError> {
        let mut state = self.state.clone();
        let mut change = Box::pin(tokio::time::sleep(Duration::ZERO));
        loop {
            if done(self, &state.borrow_and_update()) {
                return Ok(());
            }
            if self.stop.is_cancelled() {
                return Err(LocalError::Control("stopped while it started".to_owned()));
            }
            // Nobody depends on a new cluster yet: what fails again and again is said at once.
            let hopeless = |m: &Member| m.failures >= HOPELESS;
            if is_new && state.borrow().members.values().any(hopeless) {
                return Err(self.not_up(role, None));
            }
            if Instant::now() >= deadline {
                return Err(self.not_up(role, Some(limit)));
            }
            change
                .as_mut()
                .reset(Instant::now() + Duration::from_millis(50));
            tokio::select! {
                _ = state.changed() => {}
                () = &mut change => {}
            }
        }
    }

    pub(crate) fn progress(&self) -> broadcast::Receiver<Progress> {
        self.progress.subscribe()
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<MigrationEvent> {
        match self.proxy.get() {
            Some(proxy) => proxy.subscribe(),
            // Closed: there is no proxy whose events could come.
            None => broadcast::channel(1).1,
        }
    }

    pub(crate) async fn sessions(&self) -> Vec<SessionInfo> {
        match self.proxy.get() {
            Some(proxy) => proxy.sessions().await,
            None => Vec::new(),
        }
    }

    pub(crate) async fn protection(&self) -> ProtectionReport {
        match self.proxy.get() {
            Some(proxy) => proxy.protection().await,
            None => ProtectionReport::default(),
        }
    }

    /// Has the controller decide on a request; the operation's number, when it began one.
    pub(crate) async fn ask(&self, request: Request) -> Result<Option<u64>, LocalError> {
        let (answer, answered) = oneshot::channel();
        let gone = || LocalError::Control("the cluster is stopping".to_owned());
        self.asks
            .send(Ask { request, answer })
            .await
            .map_err(|_| gone())?;
        match tokio::time::timeout(ANSWER_LIMIT, answered).await {
            Ok(Ok(Ok(id))) => Ok(id),
            Ok(Ok(Err(why))) => Err(LocalError::Refused(why)),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(LocalError::Control(
                "the controller did not answer".to_owned(),
            )),
        }
    }

    /// Begins an operation and waits for its record.
    pub(crate) async fn operate(&self, request: Request) -> Result<OperationRecord, LocalError> {
        let Some(id) = self.ask(request).await? else {
            return Err(LocalError::Control("no operation was begun".to_owned()));
        };
        let mut state = self.state.clone();
        let ended = state
            .wait_for(|state| state.operations.iter().any(|op| op.id == id))
            .await;
        let found = ended
            .ok()
            .and_then(|state| state.operations.iter().find(|op| op.id == id).cloned());
        found.ok_or_else(|| LocalError::Control("the cluster is stopping".to_owned()))
    }

    /// Stops everything but the control socket, in order.
    async fn tear_down(&self) {
        self.stop.cancel();
        if let Some(proxy) = self.proxy.get() {
            proxy.shutdown(GRACE).await;
        }
        self.controller.cancel();
        let state = self.state.borrow().clone();
        let primary = state.primary_name().cloned();
        // The primary first: it hands its last WAL to the standbys.
        if let Some(name) = &primary {
            self.agents.shut_down(name, state.epoch).await;
        }
        let others: Vec<_> = self
            .agents
            .views()
            .into_keys()
            .filter(|name| Some(name) != primary.as_ref())
            .collect();
        let stops = others
            .iter()
            .map(|name| self.agents.shut_down(name, state.epoch));
        futures_util::future::join_all(stops).await;
        self.agents.close().await;
        self.stopped.cancel();
    }
}

/// Whether all instances follow and, if they are to, confirm.
fn settled(state: &ClusterState, synchronous: bool) -> bool {
    let Some(primary) = &state.primary else {
        return false;
    };
    let mut others = state
        .members
        .iter()
        .filter(|(name, m)| **name != primary.name && !m.fenced);
    let target = state.sync.target();
    others.all(|(name, member)| {
        member.followed == Some(primary.timeline) && (!synchronous || target.contains(name))
    }) && state.sync.is_settled()
        && state.mode == Mode::Steady
}

/// Success only when the operation did what was asked for.
pub(crate) fn judged(operation: OperationRecord) -> Result<OperationRecord, LocalError> {
    match &operation.outcome {
        Outcome::Succeeded => Ok(operation),
        Outcome::Aborted { reason } => {
            Err(LocalError::Aborted(format!("switchover aborted: {reason}")))
        }
        Outcome::Diverted { reason } => Err(LocalError::Aborted(format!(
            "primary is now \"{}\": {reason}",
            operation.to
        ))),
    }
}
