//! Carries out what a plan says, at its times, and writes down what it did.

use std::sync::Arc;
use std::time::{Duration, Instant};

use helios_local::InstanceStatus;
use nix::sys::signal::Signal;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::Act;
use super::network::Network;
use crate::Result;
use crate::chaos::cluster::Cluster;
use crate::chaos::plan::Step;
use crate::chaos::processes;

/// Limit on a planned move as such; its drain alone may take 30 s.
const MOVE_LIMIT: Duration = Duration::from_secs(90);

/// How long a second crash waits for a primary that runs.
const PRIMARY_LIMIT: Duration = Duration::from_secs(5);

/// Carries out the acts of one experiment.
#[derive(Debug)]
pub struct Injector {
    cluster: Arc<Cluster>,
    clock: Instant,
    network: Network,
    moving: Vec<JoinHandle<Result<String>>>,
    done: Vec<String>,
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
    pub async fn run(mut self, steps: &[Step]) -> Result<Vec<String>> {
        for step in steps {
            let at = Duration::from_millis(step.at_ms);
            sleep(at.saturating_sub(self.clock.elapsed())).await;
            let began = self.clock.elapsed().as_millis();
            let what = match self.act(&step.act).await {
                Ok(what) => what,
                Err(error) => format!("{:?} could not be done: {error}", step.act),
            };
            let ended = self.clock.elapsed().as_millis();
            self.done.push(format!("{began}..{ended} ms: {what}"));
        }
        for moving in self.moving {
            let what = moving.await??;
            let ended = self.clock.elapsed().as_millis();
            self.done.push(format!("until {ended} ms: {what}"));
        }
        self.network.remove();
        Ok(self.done)
    }

    async fn act(&mut self, act: &Act) -> Result<String> {
        match act {
            Act::Switchover => self.cluster.switchover(MOVE_LIMIT).await,
            Act::BeginSwitchover => {
                let cluster = Arc::clone(&self.cluster);
                let moving = async move { cluster.switchover(MOVE_LIMIT).await };
                self.moving.push(tokio::spawn(moving));
                Ok("switchover begun".to_owned())
            }
            Act::CrashPrimary => {
                let primary = self.running_primary().await?;
                let killed = processes::kill_server(postmaster(&primary)?)?;
                Ok(format!("killed {}, {killed} processes", primary.name))
            }
            Act::CrashStandby => {
                let (_, standbys) = self.cluster.roles().await?;
                let standby = standbys.first().ok_or("there is no standby")?;
                let killed = processes::kill_server(postmaster(standby)?)?;
                Ok(format!("killed {}, {killed} processes", standby.name))
            }
            Act::KillBackends { count, pick } => self.kill_backends(*count, *pick).await,
            Act::KillAgent => {
                let (primary, _) = self.cluster.roles().await?;
                let agent = self.cluster.agent(&primary.name).ok_or("no such agent")?;
                processes::kill_one(agent);
                Ok(format!("killed agent of {}, process {agent}", primary.name))
            }
            Act::Freeze { millis } => {
                let (primary, _) = self.cluster.roles().await?;
                let frozen = processes::tree(postmaster(&primary)?)?;
                processes::signal_all(&frozen, Signal::SIGSTOP);
                sleep(Duration::from_millis(*millis)).await;
                let alive = processes::signal_all(&frozen, Signal::SIGCONT);
                let name = &primary.name;
                Ok(format!(
                    "{name} stood still, {alive} of {} went on",
                    frozen.len()
                ))
            }
            Act::CrashBehindLag { millis } => self.crash_behind_lag(*millis).await,
            Act::FillDisk { millis } => self.fill_disk(*millis).await,
            Act::Cut { .. } | Act::Hold { .. } | Act::Slow { .. } => {
                let (primary, _) = self.cluster.roles().await?;
                self.network.act(&primary.name, act).await
            }
        }
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

    async fn kill_backends(&self, count: usize, pick: u64) -> Result<String> {
        let (primary, _) = self.cluster.roles().await?;
        let user = format!("postgres: {} ", self.cluster.target().user);
        let mut backends = processes::titled(postmaster(&primary)?, &user)?;
        let mut killed = Vec::new();
        for _ in 0..count.min(backends.len()) {
            let at = usize::try_from(pick % u64::try_from(backends.len())?)?;
            let pid = backends.swap_remove(at);
            processes::kill_one(pid);
            killed.push(pid);
        }
        Ok(format!("killed backends {killed:?} of {}", primary.name))
    }

    /// Segments that were made ahead would last longer than the experiment: they are used up.
    async fn fill_disk(&self, millis: u64) -> Result<String> {
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
        Ok(format!(
            "filled the disk of {name} with {bytes} bytes; it failed: {failed}"
        ))
    }

    async fn crash_behind_lag(&self, millis: u64) -> Result<String> {
        let (primary, _) = self.cluster.roles().await?;
        self.network.hold_standbys(&primary.name)?;
        sleep(Duration::from_millis(millis)).await;
        let killed = postmaster(&primary).and_then(processes::kill_server);
        self.network.drop_standbys(&primary.name)?;
        let (name, number) = (&primary.name, killed?);
        Ok(format!(
            "killed {name}, {number} processes, with its standby {millis} ms behind"
        ))
    }
}

/// Its postmaster, from the data directory: alive or not.
fn postmaster(instance: &InstanceStatus) -> Result<i32> {
    let missing = || format!("{} has no postmaster", instance.name);
    Ok(instance.postmaster_pid.ok_or_else(missing)?)
}
