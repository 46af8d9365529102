//! What is known of each proxy, and orders to it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use helios_api::control::{
    AbortRequest, AdvanceRequest, GatherRequest, Gathered, HeirRequest, PrepareRequest, ProxyError,
    ProxyStatus, ResumeReport, Stage, Topology,
};
use helios_api::v1alpha1::names;
use helios_cluster::barrier::{self, Order};
use helios_cluster::{ClusterState, Failure, Observation, ProxyCommand, Reply, Settings, elect};
use helios_control::{ControlClient, Live};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::OperatorError;

/// How often a proxy is asked how it is. It tells nothing by itself.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long its answer may take.
const STATUS_LIMIT: Duration = Duration::from_secs(2);
/// So often a proxy is told who is to be promoted should the primary fail: it may have been restarted.
const HEIR_AGAIN: Duration = Duration::from_secs(10);
/// How long an order may take, beyond a drain's own limit.
const ORDER_LIMIT: Duration = Duration::from_secs(90);

/// A turn ends so long before it must be over: what was set back is set forward again.
const TURN_ENDS_MS: u64 = 500;

/// What a proxy answers to an order of [`Way::together`].
#[derive(Debug)]
pub(super) enum Said {
    /// It stands.
    Gathered(Gathered),
    /// It has gone on.
    Report(ResumeReport),
}

/// What a proxy last said; outer `None`: it was not asked to the end yet.
type Known = Arc<Mutex<Option<Option<ProxyStatus>>>>;

/// Who is to be promoted should the primary fail; `None`: not known yet.
type Heir = Arc<Mutex<Option<HeirRequest>>>;

#[derive(Debug)]
struct Entry {
    ip: IpAddr,
    way: Way,
    _watch: DropGuard,
}

/// How a proxy is reached, and what it last said.
#[derive(Debug, Clone)]
pub(super) struct Way {
    client: ControlClient,
    known: Known,
    heir: Heir,
}

/// All proxies of a cluster.
#[derive(Debug, Default)]
pub(super) struct Proxies {
    entries: BTreeMap<String, Entry>,
    heir: Heir,
}

impl Proxies {
    /// Takes note of which proxies there are.
    pub(super) fn place(
        &mut self,
        there: &BTreeMap<String, IpAddr>,
        certificates: &Live,
        changed: &Arc<Notify>,
    ) -> Result<(), OperatorError> {
        self.entries
            .retain(|name, entry| there.get(name) == Some(&entry.ip));
        for (name, ip) in there {
            if self.entries.contains_key(name) {
                continue;
            }
            let address = SocketAddr::new(*ip, names::CONTROL_PORT);
            let way = Way {
                client: ControlClient::new(address, names::PROXY_IDENTITY, certificates)?,
                known: Known::default(),
                heir: Arc::clone(&self.heir),
            };
            let stop = CancellationToken::new();
            let (watched, changed, stopped) = (way.clone(), Arc::clone(changed), stop.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = watch(watched, changed) => {}
                    () = stopped.cancelled() => {}
                }
            });
            let entry = Entry {
                ip: *ip,
                way,
                _watch: stop.drop_guard(),
            };
            self.entries.insert(name.clone(), entry);
        }
        Ok(())
    }

    /// What each last said; `None`: it does not answer.
    pub(super) fn views(&self) -> BTreeMap<String, Option<ProxyStatus>> {
        self.entries
            .iter()
            .map(|(name, entry)| (name.clone(), lock(&entry.way.known).clone().flatten()))
            .collect()
    }

    /// Has all be told who is to be promoted should the primary fail.
    pub(super) fn look_for_heir(
        &self,
        settings: &Settings,
        state: &ClusterState,
        obs: &Observation,
    ) {
        let mut told = lock(&self.heir);
        let before = told.as_ref().and_then(|told| told.heir.as_ref());
        let heir = elect::heir(settings, state, obs, before.map(|heir| &heir.name));
        *told = Some(HeirRequest {
            epoch: state.epoch,
            heir: heir.and_then(|name| obs.backend(&name)),
        });
    }

    /// Whether each has answered or failed to.
    pub(super) fn asked(&self) -> bool {
        let asked = |entry: &Entry| lock(&entry.way.known).is_some();
        self.entries.values().all(asked)
    }

    /// The way to one of them.
    pub(super) fn way(&self, name: &str) -> Option<Way> {
        self.entries.get(name).map(|entry| entry.way.clone())
    }
}

fn lock<T>(known: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn watch(way: Way, changed: Arc<Notify>) {
    let mut told = None;
    loop {
        let before = lock(&way.known).clone();
        way.look().await;
        way.tell_heir(&mut told).await;
        // Numbers of sessions change all the time and decide nothing.
        let essence = |known: &Option<Option<ProxyStatus>>| {
            let one = |s: &ProxyStatus| (s.epoch, s.phase.clone(), s.primary_reachable);
            known.as_ref().map(|s| s.as_ref().map(one))
        };
        if essence(&before) != essence(&lock(&way.known)) {
            changed.notify_one();
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

impl Way {
    /// Tells the proxy who is to be promoted should the primary fail: when that is another one than
    /// it was told, and now and then. One that does not answer, or is of an earlier release and knows
    /// no such order, goes on without.
    async fn tell_heir(&self, told: &mut Option<(HeirRequest, Instant)>) {
        let now = lock(&self.heir).clone();
        let Some(request) = now.filter(|now| {
            told.as_ref()
                .is_none_or(|(before, at)| before != now || at.elapsed() > HEIR_AGAIN)
        }) else {
            return;
        };
        if let Err(error) = self
            .try_post::<()>("/v1/heir", &request, STATUS_LIMIT)
            .await
        {
            tracing::debug!(?error, "proxy was not told who is to be promoted");
        }
        *told = Some((request, Instant::now()));
    }

    async fn look(&self) {
        let answer = self
            .client
            .call(hyper::Method::GET, "/v1/status", Vec::new(), STATUS_LIMIT)
            .await;
        let status = match answer {
            Ok((status, body)) if status.is_success() => serde_json::from_slice(&body).ok(),
            _ => None,
        };
        *lock(&self.known) = Some(status);
    }

    /// Gives an order, waits for its end, and asks how the proxy is then.
    pub(super) async fn order(&self, command: &ProxyCommand) -> Result<Reply, Failure> {
        let result = match command {
            ProxyCommand::Prepare {
                epoch,
                candidate,
                wait_ms,
            } => {
                let request = PrepareRequest {
                    epoch: *epoch,
                    candidate: candidate.clone(),
                    wait_ms: *wait_ms,
                };
                let limit = ORDER_LIMIT + Duration::from_millis(*wait_ms);
                let done = self.post::<()>("/v1/prepare", &request, limit).await;
                done.map(|()| Reply::Done)
            }
            ProxyCommand::Drain(request) => {
                let limit = ORDER_LIMIT + Duration::from_millis(request.timeout_ms);
                self.post("/v1/drain", request, limit)
                    .await
                    .map(Reply::Drained)
            }
            ProxyCommand::Resume(topology) => self.resume(topology).await,
            // One that is told by itself does not know what others do.
            ProxyCommand::Join(topology) | ProxyCommand::Together { topology, .. } => {
                match self.try_post("/v1/join", topology, ORDER_LIMIT).await {
                    Ok(Some(report)) => Ok(Reply::Resumed(report)),
                    Ok(None) => self.resume(topology).await,
                    Err(failure) => Err(failure),
                }
            }
            ProxyCommand::Abort { epoch } => {
                let request = AbortRequest { epoch: *epoch };
                let done = self.post::<()>("/v1/abort", &request, ORDER_LIMIT).await;
                done.map(|()| Reply::Done)
            }
        };
        self.look().await;
        result
    }

    async fn resume(&self, topology: &Topology) -> Result<Reply, Failure> {
        let report = self.post("/v1/resume", topology, ORDER_LIMIT).await;
        report.map(Reply::Resumed)
    }

    /// One order behind a change of primary that all proxies go through together.
    pub(super) async fn together(&self, order: Order, topology: Topology) -> Result<Said, Failure> {
        let said = match order {
            Order::Gather => {
                let request = GatherRequest {
                    topology: topology.clone(),
                    patience_ms: barrier::PATIENCE_MS,
                };
                match self.try_post("/v1/gather", &request, ORDER_LIMIT).await? {
                    Some(gathered) => Ok(Said::Gathered(gathered)),
                    // One of an earlier release goes through all of it by itself.
                    None => {
                        let report = self.post("/v1/resume", &topology, ORDER_LIMIT).await;
                        report.map(Said::Report)
                    }
                }
            }
            Order::Advance(to) => {
                let request = AdvanceRequest {
                    epoch: topology.epoch,
                    to,
                    turn_ms: barrier::TURNS_MS - TURN_ENDS_MS,
                };
                let report = self.post("/v1/advance", &request, ORDER_LIMIT).await;
                report.map(Said::Report)
            }
        };
        // The end of its action, with a state that is not older.
        let ends = matches!(
            (order, &said),
            (_, Err(_)) | (Order::Advance(Stage::Open), _) | (Order::Gather, Ok(Said::Report(_)))
        );
        if ends {
            self.look().await;
        }
        said
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        request: &impl Serialize,
        limit: Duration,
    ) -> Result<T, Failure> {
        let answer = self.try_post(path, request, limit).await?;
        answer.ok_or_else(|| Failure::Failed(format!("the proxy does not know {path}")))
    }

    /// `None`: a proxy of an earlier release, which does not know the path.
    async fn try_post<T: DeserializeOwned>(
        &self,
        path: &str,
        request: &impl Serialize,
        limit: Duration,
    ) -> Result<Option<T>, Failure> {
        let failed = |e: &dyn std::fmt::Display| Failure::Failed(e.to_string());
        let body = serde_json::to_vec(request).map_err(|e| failed(&e))?;
        let (status, body) = self
            .client
            .call(hyper::Method::POST, path, body, limit)
            .await
            .map_err(|e| failed(&e))?;
        if status.is_success() {
            return serde_json::from_slice(&body)
                .map(Some)
                .map_err(|e| failed(&e));
        }
        if status == hyper::StatusCode::NOT_FOUND {
            return Ok(None);
        }
        match serde_json::from_slice::<ProxyError>(&body) {
            Ok(ProxyError::Stale { seen, .. }) => Err(Failure::Stale { seen }),
            Ok(error @ ProxyError::Failed { .. }) => Err(failed(&error)),
            Err(_) => Err(Failure::Failed(format!("status {status}"))),
        }
    }
}
