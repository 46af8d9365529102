//! Carries out what a plan says, at its times, and writes down what it did.

use std::sync::Arc;
use std::time::{Duration, Instant};

use helios_local::InstanceStatus;
use nix::sys::signal::Signal;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::network::Network;
use super::{Act, Mark, Strike};
use crate::Result;
use crate::chaos::cluster::Cluster;
use crate::chaos::plan::Step;
use crate::chaos::processes;

/// Limit on a planned move as such; its drain alone may take 30 s.
const MOVE_LIMIT: Duration = Duration::from_secs(90);

/// How long a second crash waits for a primary that runs.
const PRIMARY_LIMIT: Duration = Duration::from_secs(5);

/// How long a stopped session waits at most for a planned move that has begun.
const MOVE_AHEAD: Duration = Duration::from_millis(60);

/// What an act came to.
#[derive(Debug, Clone, Default)]
pub struct Done {
    /// In words, with its times.
    pub what: String,
    /// Whether it hit anything: a process, a connection, a full disk.
    pub hit: bool,
    /// The messages at which sessions were hit, by name.
    pub messages: Vec<String>,
}

impl Done {
    pub(super) fn new(what: String, hit: bool) -> Self {
        Self {
            what,
            hit,
            messages: Vec::new(),
        }
    }

    pub(super) fn at(mut self, messages: impl IntoIterator<Item = String>) -> Self {
        self.messages.extend(messages);
        self
    }
}

/// Carries out the acts of one experiment.
#[derive(Debug)]
pub struct Injector {
    cluster: Arc<Cluster>,
    clock: Instant,
    network: Network,
    moving: Vec<JoinHandle<Result<(String, bool)>>>,
    done: Vec<Done>,
}

impl Injector {
    /// For the experiment that began at `clock`.
    #[must_use]
    pub fn new(cluster: Arc<Cluster>, network: Network, clock: Instant) -> Self {
        Self {
            cluster,
            clock,
            network,
            moving: Vec::new(),
            done: Vec::new(),
        }
    }

    /// Carries out all steps; what was done, and what could not be.
    ///
    /// # Errors
    /// A planned move that hangs.
    pub async fn run(mut self, steps: &[Step]) -> Result<Vec<Done>> {
        for step in steps {
            let at = Duration::from_millis(step.at_ms);
            sleep(at.saturating_sub(self.clock.elapsed())).await;
            let began = self.clock.elapsed().as_millis();
            let mut done = match self.act(&step.act).await {
                Ok(done) => done,
                Err(error) => {
                    Done::new(format!("{:?} could not be done: {error}", step.act), false)
                }
            };
            let ended = self.clock.elapsed().as_millis();
            done.what = format!("{began}..{ended} ms: {}", done.what);
            self.done.push(done);
        }
        for moving in self.moving {
            // One that was undone by the other fault has met it; see `FaultKind::moves`.
            let (what, _) = moving.await??;
            let ended = self.clock.elapsed().as_millis();
            let what = format!("until {ended} ms: {what}");
            self.done.push(Done::new(what, true));
        }
        self.network.remove();
        Ok(self.done)
    }

    async fn act(&mut self, act: &Act) -> Result<Done> {
        match act {
            Act::Switchover => {
                let (what, hit) = self.cluster.switchover(MOVE_LIMIT).await?;
                Ok(Done::new(what, hit))
            }
            Act::BeginSwitchover => Ok(self.begin_switchover()),
            Act::CrashPrimary => self.crash().await,
            Act::KillPostmaster => {
                let primary = self.running_primary().await?;
                let pid = postmaster(&primary)?;
                let hit = processes::signal_all(&[pid], Signal::SIGKILL) > 0;
                let what = format!("killed postmaster {pid} of {}", primary.name);
                Ok(Done::new(what, hit))
            }
            Act::AtMessage { mark, strike } => self.at_message(*mark, *strike).await,
            Act::CrashStandby => {
                let (_, standbys) = self.cluster.roles().await?;
                let standby = standbys.first().ok_or("there is no standby")?;
                let killed = processes::kill_server(postmaster(standby)?)?;
                let what = format!("killed {}, {killed} processes", standby.name);
                Ok(Done::new(what, killed > 0))
            }
            Act::KillBackends { count, pick } => self.kill_backends(*count, *pick).await,
            Act::KillAgent => self.kill_agent().await,
            Act::Freeze { millis } => self.freeze(*millis).await,
            Act::CrashBehindLag { millis } => self.crash_behind_lag(*millis).await,
            Act::FillDisk { millis } => self.fill_disk(*millis).await,
            Act::Cut { .. } | Act::Hold { .. } | Act::Slow { .. } => {
                let (primary, _) = self.cluster.roles().await?;
                self.network.act(&primary.name, act).await
            }
        }
    }

    fn begin_switchover(&mut self) -> Done {
        let cluster = Arc::clone(&self.cluster);
        let moving = async move { cluster.switchover(MOVE_LIMIT).await };
        self.moving.push(tokio::spawn(moving));
        Done::new("switchover begun".to_owned(), true)
    }

    async fn crash(&self) -> Result<Done> {
        let primary = self.running_primary().await?;
        let killed = processes::kill_server(postmaster(&primary)?)?;
        let what = format!("killed {}, {killed} processes", primary.name);
        Ok(Done::new(what, killed > 0))
    }

    async fn kill_agent(&self) -> Result<Done> {
        let (primary, _) = self.cluster.roles().await?;
        let agent = self.cluster.agent(&primary.name).ok_or("no such agent")?;
        processes::kill_one(agent);
        let what = format!("killed agent of {}, process {agent}", primary.name);
        Ok(Done::new(what, true))
    }

    async fn freeze(&self, millis: u64) -> Result<Done> {
        let (primary, _) = self.cluster.roles().await?;
        let frozen = processes::tree(postmaster(&primary)?)?;
        let stopped = processes::signal_all(&frozen, Signal::SIGSTOP);
        sleep(Duration::from_millis(millis)).await;
        let alive = processes::signal_all(&frozen, Signal::SIGCONT);
        let name = &primary.name;
        let what = format!("{name} stood still, {alive} of {} went on", frozen.len());
        Ok(Done::new(what, stopped > 0))
    }

    /// What is done is done while a session stands behind the message; then that goes on, if there
    /// is anything left of its connection.
    async fn at_message(&mut self, mark: Mark, strike: Strike) -> Result<Done> {
        let primary = self.running_primary().await?;
        let order = self.network.stop_at(&primary.name, mark).await?;
        let Some(order) = order else {
            let what = format!("no session came to {mark:?}");
            return Ok(Done::new(what, false));
        };
        let struck = match strike {
            Strike::Crash => self.crash().await,
            Strike::KillBackend { pick } => self.kill_backends(1, pick).await,
            Strike::KillAgent => self.kill_agent().await,
            Strike::Freeze { millis } => self.freeze(millis).await,
            Strike::Switchover => {
                let begun = self.begin_switchover();
                sleep(MOVE_AHEAD).await;
                Ok(begun)
            }
        };
        order.release();
        self.network.forget_order(&primary.name);
        let mut struck = struck?;
        let names = order.hits().into_iter().map(|tag| mark.name(tag));
        struck = struck.at(names);
        struck.what = format!("behind {:?}: {}", struck.messages, struck.what);
        Ok(struck)
    }

    /// The primary, as soon as the cluster names one that runs: at a second crash it may not yet.
    async fn running_primary(&self) -> Result<InstanceStatus> {
        let deadline = Instant::now() + PRIMARY_LIMIT;
        loop {
            let (primary, _) = self.cluster.roles().await?;
            if postmaster(&primary).is_ok_and(processes::is_postgres) {
                return Ok(primary);
            }
            if Instant::now() > deadline {
                return Err(format!("{} does not run", primary.name).into());
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn kill_backends(&self, count: usize, pick: u64) -> Result<Done> {
        let (primary, _) = self.cluster.roles().await?;
        let target = self.cluster.target();
        // "postgres: CLUSTER_NAME: USER DATABASE CLIENT ..."
        let session = format!(": {} {} ", target.user, target.database);
        let mut backends = processes::titled(postmaster(&primary)?, &session)?;
        let mut killed = Vec::new();
        for _ in 0..count.min(backends.len()) {
            let at = usize::try_from(pick % u64::try_from(backends.len())?)?;
            let pid = backends.swap_remove(at);
            processes::kill_one(pid);
            killed.push(pid);
        }
        let what = format!("killed backends {killed:?} of {}", primary.name);
        Ok(Done::new(what, !killed.is_empty()))
    }

    /// Segments that were made ahead would last longer than the experiment: they are used up.
    async fn fill_disk(&self, millis: u64) -> Result<Done> {
        let (primary, _) = self.cluster.roles().await?;
        let disk = self.cluster.disk(&primary.name).ok_or("no small disk")?;
        let db = self.cluster.connect(&primary).await?;
        let bytes = disk.fill()?;
        let end = Instant::now() + Duration::from_millis(millis);
        let mut failed = false;
        while Instant::now() < end {
            // Without an xid nothing would be written, and nothing switched.
            let sql =
                "SET synchronous_commit = local; SELECT pg_current_xact_id(), pg_switch_wal()";
            let limit = end.saturating_duration_since(Instant::now());
            let switched = tokio::time::timeout(limit, db.batch_execute(sql)).await;
            failed |= !matches!(switched, Ok(Ok(())));
            sleep(Duration::from_millis(if failed { 50 } else { 1 })).await;
        }
        disk.free();
        let name = &primary.name;
        let what = format!("filled the disk of {name} with {bytes} bytes; it failed: {failed}");
        Ok(Done::new(what, failed))
    }

    async fn crash_behind_lag(&self, millis: u64) -> Result<Done> {
        let (primary, _) = self.cluster.roles().await?;
        self.network.hold_standbys(&primary.name)?;
        sleep(Duration::from_millis(millis)).await;
        let killed = postmaster(&primary).and_then(processes::kill_server);
        self.network.drop_standbys(&primary.name)?;
        let (name, number) = (&primary.name, killed?);
        let what =
            format!("killed {name}, {number} processes, with its standby {millis} ms behind");
        Ok(Done::new(what, number > 0))
    }
}

/// Its postmaster, from the data directory: alive or not.
fn postmaster(instance: &InstanceStatus) -> Result<i32> {
    let missing = || format!("{} has no postmaster", instance.name);
    Ok(instance.postmaster_pid.ok_or_else(missing)?)
}
