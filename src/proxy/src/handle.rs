//! A running proxy: start, drain, resume, look, stop.
//!
//! The handle coordinates; sessions do the work. The invariant: phases of a move are published in
//! the order of design section 6, one move at a time, and a command of an older epoch is refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use helios_api::control::{Backend, MigrationEvent, Topology};
use helios_api::{Endpoint, Epoch, Host};
use helios_telemetry::metrics::{Metrics, Refusal};
use tokio::sync::{Mutex, broadcast};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::VerifierCache;
use crate::engine::gate::{Ending, Gate, Phase};
use crate::engine::latency::{self, Latency};
use crate::engine::registry::{CancelKey, lock};
use crate::engine::rehearsal::Rehearsals;
use crate::engine::session;
use crate::engine::shared::Shared;
use crate::engine::{counting, evidence, monitor};
use crate::engine::{heir, leaving, opening, temporary};
use crate::listener::{BindError, Incoming, Limits, Listener};
use crate::login::{self, Accepted, EdgeContext};
use crate::options::ProxyOptions;
use crate::tls::{ServerTls, TlsError};
use crate::workers::Workers;

mod barrier;
mod draining;
mod giving;
mod looking;
mod taking;

pub use giving::Given;
pub use taking::{Followed, TakeOverError, TakenOver};

/// Why a proxy did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A socket cannot be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A certificate or key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No threads for its sessions.
    #[error("could not start threads: {0}")]
    Threads(std::io::Error),
    /// The service user's password cannot be read.
    #[error("could not read the service user's password file: {0}")]
    Password(std::io::Error),
    /// No file can be made where large journals are to go.
    #[error("transaction_buffer_path \"{}\" cannot be used: {why}", folder.display())]
    Buffer {
        /// The folder that was configured.
        folder: std::path::PathBuf,
        /// What the system says.
        why: std::io::Error,
    },
}

/// A command that was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// It belongs to an epoch that is over.
    #[error("command of epoch {given}, but this proxy is at epoch {current}")]
    Stale {
        /// Epoch of the command.
        given: Epoch,
        /// Epoch of the proxy.
        current: Epoch,
    },
    /// A drain that a later command has ended.
    #[error("the drain was ended by a later command")]
    Superseded,
    /// It is to go on in an epoch that it has not been gathered in.
    #[error("this proxy does not wait in epoch {0}")]
    NotGathered(Epoch),
}

/// The proxy.
#[derive(Debug)]
pub struct Proxy;

/// A running proxy. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ProxyHandle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    verifiers: Arc<VerifierCache>,
    limits: Arc<Limits>,
    /// What clients are shown.
    tls: Option<ServerTls>,
    port: u16,
    /// Where it listens, for a process that takes over from this one.
    place: giving::Place,
    /// No more clients are taken.
    closed: CancellationToken,
    /// What watches the primary ends.
    stop: CancellationToken,
    /// The listener and the sessions.
    tasks: TaskTracker,
    leaving: AtomicBool,
    reachable: Arc<AtomicBool>,
    latency: Latency,
    /// One move at a time.
    moving: Mutex<()>,
    /// Ends the drain that is under way: whoever says what comes next does not wait for it.
    drain: std::sync::Mutex<CancellationToken>,
    /// Sessions stand behind a change of primary, and wait for those of other proxies.
    waiting: std::sync::Mutex<Option<barrier::Waiting>>,
}

impl Proxy {
    /// Starts a proxy in front of `topology.primary`.
    ///
    /// # Errors
    /// A socket cannot be had.
    pub async fn start(
        options: ProxyOptions,
        topology: Topology,
    ) -> Result<ProxyHandle, StartError> {
        Self::start_at(options, topology, Phase::Open).await
    }

    /// Starts one whose gate is in `phase`.
    pub(crate) async fn start_at(
        options: ProxyOptions,
        topology: Topology,
        phase: Phase,
    ) -> Result<ProxyHandle, StartError> {
        let dir = options.unix_socket_dir.as_deref();
        let listener = Listener::bind(&options.host, options.port, dir).await?;
        Self::start_on(options, topology, phase, listener, None)
    }

    /// Starts one that listens here, and takes sessions that arrive from another process.
    fn start_on(
        options: ProxyOptions,
        topology: Topology,
        phase: Phase,
        listener: Listener,
        arrivals: Option<taking::Arrivals>,
    ) -> Result<ProxyHandle, StartError> {
        let place = giving::Place::of(&options, &listener).map_err(StartError::Threads)?;
        let port = listener.port();
        let patience = options.engine.outage_limit;
        let verifiers = Arc::new(VerifierCache::new(
            options.service.clone(),
            options.backend_tls.clone(),
            patience,
        ));
        verifiers.set_endpoint(Some(topology.primary.endpoint.clone()));
        let workers = Workers::start(options.engine.threads).map_err(StartError::Threads)?;
        let limits = Limits::new(options.max_connections, options.max_connections_per_user);
        let shared = Shared::new(
            Gate::at(topology, phase),
            options.engine,
            options.backend_tls,
            options.service,
            options.metrics,
        );
        let edge = Arc::new(EdgeContext {
            auth: options.auth,
            tls: options.tls.clone(),
            tls_required: options.tls_required,
            verifiers: Arc::clone(&verifiers),
            limits: Arc::clone(&limits),
            login_timeout: options.login_timeout,
        });
        let inner = Inner {
            shared,
            verifiers,
            limits: Arc::clone(&limits),
            tls: options.tls,
            port,
            place,
            closed: CancellationToken::new(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            leaving: AtomicBool::new(false),
            reachable: Arc::new(AtomicBool::new(true)),
            latency: Latency::default(),
            moving: Mutex::new(()),
            drain: std::sync::Mutex::default(),
            waiting: std::sync::Mutex::default(),
        };
        let handle = ProxyHandle(Arc::new(inner));
        handle.spawn_listener(listener, edge, workers, arrivals);
        handle.spawn_monitor(options.health_check_interval, options.health_check_timeout);
        handle.spawn_watch_latency();
        let shared = || Arc::clone(&handle.0.shared);
        handle.spawn_beside(evidence::watch_log(shared()));
        handle.spawn_beside(counting::look_at_statements(shared()));
        if shared().options.keep_ahead {
            handle.spawn_beside(heir::keep(shared()));
        }
        Ok(handle)
    }
}

async fn client(shared: Arc<Shared>, edge: Arc<EdgeContext>, incoming: Incoming) {
    let peer = incoming.peer.clone();
    match login::accept(incoming, &edge).await {
        Ok(Accepted::Cancel { key, stream }) => {
            let key = CancelKey {
                pid: key.pid,
                secret: key.secret.to_vec(),
            };
            if let Err(stream) = shared.registry.cancel(&key, stream) {
                shared.kin.pass_on(key, stream);
            }
        }
        Ok(Accepted::Session(login)) => {
            shared.metrics.connections.inc();
            Box::pin(session::serve(shared, *login)).await;
        }
        Err(login::LoginError::Closed) => {}
        Err(error) => {
            shared.metrics.connection_refused(refusal(&error));
            tracing::info!(peer, %error, "client was not let in");
        }
    }
}

fn refusal(error: &login::LoginError) -> Refusal {
    match error {
        login::LoginError::Closed | login::LoginError::Io(_) => Refusal::Connection,
        login::LoginError::Timeout(_) => Refusal::Timeout,
        login::LoginError::Refused(fields) if fields.sqlstate.class() == *b"53" => Refusal::Limit,
        login::LoginError::Refused(_) => Refusal::Refused,
        login::LoginError::Protocol(_) => Refusal::Protocol,
    }
}

impl ProxyHandle {
    /// The listener owns the threads: they end with the runtime, or when all sessions have ended
    /// after it.
    fn spawn_listener(
        &self,
        listener: Listener,
        edge: Arc<EdgeContext>,
        workers: Workers,
        arrivals: Option<taking::Arrivals>,
    ) {
        let this = Arc::clone(&self.0);
        self.0.tasks.spawn(async move {
            let (tasks, stop) = (this.tasks.clone(), this.closed.clone());
            let limits = Arc::clone(&this.limits);
            let shared = Arc::clone(&this.shared);
            drop(this);
            // A runtime that is dropped takes the sessions with it.
            let unfinished = workers.stop_on_drop();
            let workers = Arc::new(workers);
            let on_client = |incoming: Incoming| {
                let (shared, edge) = (Arc::clone(&shared), Arc::clone(&edge));
                let keep = Arc::clone(&workers);
                let incoming = match incoming.detach() {
                    Ok(incoming) => incoming,
                    Err(error) => return tracing::warn!(%error, "could not take a connection"),
                };
                workers.spawn(&tasks, async move {
                    match incoming.attach() {
                        Ok(incoming) => client(shared, edge, incoming).await,
                        Err(error) => tracing::warn!(%error, "could not take a connection"),
                    }
                    drop(keep);
                });
            };
            let arriving = taking::settle(&shared, &workers, &tasks, &stop, arrivals);
            let listening = listener.run(limits, stop.clone(), on_client);
            futures_util::future::join(listening, arriving).await;
            unfinished.disarm();
        });
    }

    fn spawn_monitor(&self, interval: Duration, timeout: Duration) {
        let shared = Arc::clone(&self.0.shared);
        let reachable = Arc::clone(&self.0.reachable);
        self.spawn_beside(monitor::watch(shared, reachable, interval, timeout));
    }

    fn spawn_watch_latency(&self) {
        let shared = Arc::clone(&self.0.shared);
        let Some(rule) = shared.options.latency else {
            return;
        };
        let (latency, stop) = (Arc::clone(&self.0.latency), self.0.stop.clone());
        self.0.tasks.spawn(async move {
            tokio::select! {
                () = latency::watch(shared, rule, latency) => {}
                () = stop.cancelled() => {}
            }
        });
    }

    /// Runs something beside the sessions, until the proxy stops.
    fn spawn_beside(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.0.stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = work => {}
                () = stop.cancelled() => {}
            }
        });
    }

    /// Looks at the certificate files again, towards clients and towards servers: what they hold now
    /// counts from the next connection on. What cannot be used is warned about, and what was there
    /// before stays in use.
    pub fn look_at_certificates(&self) {
        if let Some(tls) = &self.0.tls {
            tls.look();
        }
        self.0.shared.tls.look();
    }

    /// The port that clients use.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.0.port
    }

    /// What it has been told last of the primary.
    #[must_use]
    pub fn topology(&self) -> Arc<Topology> {
        self.0.shared.gate.now().topology
    }

    /// The metrics registry.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.0.shared.metrics
    }

    fn check_epoch(&self, given: Epoch) -> Result<(), CommandError> {
        let current = self.0.shared.gate.now().topology.epoch;
        if given < current {
            Err(CommandError::Stale { given, current })
        } else {
            Ok(())
        }
    }

    /// Opens a backend on `candidate` for every session, ahead of a planned move, so that the pause
    /// does not hold their logins; where there are many, idle sessions then leave the old primary,
    /// so that it does not hold the end of their backends either. Best effort: a session without a
    /// backend logs in when it needs one.
    pub async fn prepare(&self, candidate: &Backend) {
        let shared = &self.0.shared;
        let many = leaving::watch(shared);
        let ahead = temporary::keep_ahead(shared);
        futures_util::future::join(self.open_ahead(candidate), ahead).await;
        if many {
            let limit = Duration::from_secs(20);
            let _ = tokio::time::timeout(limit, leaving::leave(shared)).await;
        }
    }

    /// The same, once sessions that cannot be moved have ended what they do, or `wait` is over.
    pub async fn prepare_after(&self, candidate: &Backend, wait: Duration) {
        if !wait.is_zero() {
            self.wait_beforehand(wait).await;
        }
        self.prepare(candidate).await;
    }

    async fn open_ahead(&self, candidate: &Backend) {
        let shared = &self.0.shared;
        let rehearsals = Rehearsals::collect(shared).await;
        let open = opening::ahead(shared).into_iter().map(|entry| {
            let (shared, at) = (Arc::clone(shared), candidate.endpoint.clone());
            let rehearsals = rehearsals.clone();
            let home = entry.home.clone();
            // On the session's own thread, where the connection will be used.
            home.spawn(async move {
                let Ok(_permit) = shared.logins.acquire().await else {
                    return;
                };
                if let Some(warm) = opening::open_ahead(&shared, &entry, &at, &rehearsals).await {
                    *lock(&entry.warm) = Some(warm);
                }
            })
        });
        let limit = Duration::from_secs(30);
        let _ = tokio::time::timeout(limit, futures_util::future::join_all(open)).await;
    }

    /// Says who is to be promoted should the primary fail. Where `restore_ahead` is `always`, sessions
    /// in a transaction get a backend there.
    pub fn set_heir(&self, heir: Option<Backend>) {
        *lock(&self.0.shared.heir) = heir;
    }

    /// Undoes a drain: sessions go on where they are.
    ///
    /// # Errors
    /// [`CommandError::Stale`].
    pub async fn abort(&self, epoch: Epoch) -> Result<(), CommandError> {
        let _one = self.next_step(epoch).await?;
        *lock(&self.0.waiting) = None;
        self.0.shared.gate.publish(Phase::Open, None, None);
        self.drop_warm();
        Ok(())
    }

    /// Backends that were opened ahead of time for another primary are of no use.
    fn drop_warm(&self) {
        let primary = self.0.shared.gate.now().topology.primary.endpoint.clone();
        for entry in self.0.shared.registry.all() {
            let mut warm = lock(&entry.warm);
            if warm
                .as_ref()
                .is_some_and(|warm| warm.conn.endpoint != primary)
            {
                *warm = None;
            }
        }
    }

    /// Migration events from now on. A subscriber that falls far behind misses the oldest.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<MigrationEvent> {
        self.0.shared.events.subscribe()
    }

    /// Says to whoever asks that clients had better go elsewhere.
    pub fn announce_leave(&self) {
        self.0.leaving.store(true, Ordering::Relaxed);
    }

    /// Whether that was said.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.0.leaving.load(Ordering::Relaxed)
    }

    /// Takes no more clients; sessions end where no transaction is open and nothing is in flight,
    /// within `grace`; then the rest is ended, and told what became of what it was doing.
    pub async fn shutdown(&self, grace: Duration) {
        self.announce_leave();
        self.0.closed.cancel();
        self.0.place.close();
        self.0.tasks.close();
        let gate = &self.0.shared.gate;
        gate.end(Ending::AtBoundary);
        if tokio::time::timeout(grace, self.0.tasks.wait())
            .await
            .is_err()
        {
            gate.end(Ending::Now);
            let _ = tokio::time::timeout(Duration::from_secs(5), self.0.tasks.wait()).await;
        }
        self.0.stop.cancel();
    }
}

/// The address that a client on this machine connects to.
#[must_use]
pub fn local_endpoint(host: &str, port: u16) -> Endpoint {
    let host = if host == "*" { "127.0.0.1" } else { host };
    Endpoint {
        host: Host::Tcp(host.to_owned()),
        port,
    }
}
