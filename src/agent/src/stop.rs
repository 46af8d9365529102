//! Stopping: the fence, the orderly end of the agent, and the checkpoint that makes a stop short.
//!
//! Invariant: a fence is answered only when no process of the instance executes another
//! instruction, whoever started it: it has gone, or SIGKILL is pending for it and it never comes
//! back from the kernel, or ([`StopMode::Halt`]) it stands still, and gets nothing acknowledged even
//! if somebody woke it up. Whoever touches the data directory afterwards kills and waits for the
//! last of them ([`Instance::bury`]).

use std::time::Duration;

use helios_api::agent::{AgentError, AgentReply, InstanceState, StopMode};
use helios_api::{Lsn, Timeline};
use nix::sys::signal::Signal;
use tokio::time::Instant;

use crate::durable::Pending;
use crate::error::refused;
use crate::files::Directory;
use crate::instance::Instance;
use crate::postmaster::Postmaster;
use crate::wal::{self, Control};
use crate::{process, sql};

/// How long a fast shutdown may take, with the WAL sent to the standbys.
const FAST_LIMIT: Duration = Duration::from_secs(10);
/// When processes that a fence has halted are killed at the latest: long enough for the replay of
/// sessions, which they would share the processors with.
const HALTED: Duration = Duration::from_secs(1);
/// How long their end may take when others need the processors, and the instance is to come back:
/// commits may wait for it.
const PATIENCE: Duration = Duration::from_secs(3);
/// The same between two looks for commands.
const BRIEF: Duration = Duration::from_millis(100);
/// How long a checkpoint may take.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(600);

impl Instance {
    /// Stops beside the record of the fence being written: a fence that nobody was told of yet may
    /// still be lost, and stopping does no harm.
    pub(crate) async fn fence(
        &mut self,
        mode: StopMode,
        record: Pending,
    ) -> Result<AgentReply, AgentError> {
        let last = self.last_position();
        if mode != StopMode::Fast
            && let Some(timeline) = self.last_timeline()
        {
            // Everybody waits: for what a clean stop would tell, and for the end of hundreds of
            // processes that can do nothing any more, nobody needs to.
            let began = Instant::now();
            self.kill(mode)?;
            let stopped = began.elapsed();
            record.done().await?;
            tracing::debug!(?mode, ?stopped, recorded = ?began.elapsed(), "phases of the fence");
            self.hub.set(InstanceState::Stopped {
                crashed: false,
                clean: false,
                timeline,
            });
            let end = last;
            return Ok(AgentReply::Positions { end, timeline });
        }
        let fast = (mode == StopMode::Fast).then_some(FAST_LIMIT);
        self.stop(fast).await?;
        record.done().await?;
        let control = self.publish_stopped(false).await;
        let (end, timeline) = self.held_end(last, control)?;
        Ok(AgentReply::Positions { end, timeline })
    }

    /// Kills or halts whatever runs, without waiting for its end.
    fn kill(&mut self, mode: StopMode) -> Result<(), AgentError> {
        self.dying = Some(Instant::now() + HALTED);
        let postmaster = self.postmaster.as_ref().map(Postmaster::pid);
        let how = match mode {
            StopMode::Halt => Signal::SIGSTOP,
            StopMode::Fast | StopMode::Immediate => Signal::SIGKILL,
        };
        process::stop_at_once(postmaster, &self.config.data_dir, how)?;
        self.postmaster = None;
        Ok(())
    }

    /// Resolves when those that a fence has stopped have to be buried; never when there are none.
    pub(crate) async fn burial(&self) {
        match self.dying {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// Kills those that a fence has stopped, and waits until they are gone.
    pub(crate) async fn bury(&mut self) -> Result<(), AgentError> {
        if self.dying.is_some() {
            // Tried again a while later, should it fail.
            self.dying = Some(Instant::now() + HALTED);
            process::let_pass(&self.config.data_dir);
            process::kill_all(&self.config.data_dir).await?;
            self.dying = None;
        }
        Ok(())
    }

    /// The same behind everybody else: what they do next on the machine is for the sessions that have
    /// just left the instance, and nobody waits for it.
    pub(crate) async fn bury_in_turn(&mut self) -> Result<(), AgentError> {
        if self.dying.is_some() {
            process::let_pass(&self.config.data_dir);
            process::kill_in_turn(&self.config.data_dir, PATIENCE).await?;
        }
        self.bury().await
    }

    /// A part of that, until the next look for commands.
    pub(crate) async fn bury_some(&mut self) -> Result<(), AgentError> {
        // Tried again a while later, should it fail.
        self.dying = Some(Instant::now() + HALTED);
        process::let_pass(&self.config.data_dir);
        if process::kill_in_turn(&self.config.data_dir, BRIEF).await? {
            return self.bury().await;
        }
        self.dying = Some(Instant::now());
        Ok(())
    }

    /// Stops whatever runs and proves that nothing is left.
    pub(crate) async fn stop(&mut self, fast: Option<Duration>) -> Result<(), AgentError> {
        match &self.postmaster {
            Some(postmaster) => postmaster.stop(&self.config, fast).await?,
            None => drop(process::kill_all(&self.config.data_dir).await?),
        }
        self.postmaster = None;
        self.dying = None;
        Ok(())
    }

    /// A position that the stopped instance's WAL reaches: exact after a clean stop, else the last
    /// one that was seen.
    fn held_end(&self, last: Lsn, control: Option<Control>) -> Result<(Lsn, Timeline), AgentError> {
        let Some(control) = control else {
            return Ok((Lsn(0), Timeline(0)));
        };
        let timeline = wal::latest_timeline(&self.config, control.timeline)?;
        Ok((last.max(control.checkpoint).max(control.minimum), timeline))
    }

    /// Whether anything was flushed at `at` or behind it. The instance must be stopped: what runs
    /// goes on writing.
    pub(crate) async fn wal_beyond(
        &mut self,
        timeline: Timeline,
        at: Lsn,
    ) -> Result<AgentReply, AgentError> {
        if self.postmaster.is_some() {
            return Err(refused("PostgreSQL is running; its WAL has no end yet"));
        }
        if self.directory()? == Directory::Empty {
            return Err(refused("data directory is empty; its WAL is lost"));
        }
        let control = Control::read(&self.config).await?;
        // "No record" is only proof where pg_control names nothing past the position either.
        let beyond = wal::latest_timeline(&self.config, control.timeline)? != timeline
            || control.checkpoint >= at
            || control.minimum > at
            || wal::has_record(&self.config, timeline, at).await?;
        Ok(AgentReply::WalBeyond { beyond })
    }

    pub(crate) async fn shut_down(&mut self) -> Result<AgentReply, AgentError> {
        self.stop(Some(FAST_LIMIT)).await?;
        self.publish_stopped(false).await;
        Ok(AgentReply::Done)
    }

    /// The agent ends: PostgreSQL does so first.
    pub(crate) async fn stop_for_exit(&mut self, limit: Duration) {
        if let Err(error) = self.stop(Some(limit)).await {
            tracing::error!(%error, "could not stop PostgreSQL");
        }
        self.publish_stopped(false).await;
    }

    pub(crate) async fn checkpoint(&mut self) -> Result<AgentReply, AgentError> {
        self.running()?;
        // A connection of its own: nothing else should wait for the disk.
        let client = sql::connect(
            &self.config.unix_endpoint(),
            &self.config.superuser,
            CHECKPOINT_LIMIT,
        )
        .await?;
        sql::rows(&client, "checkpoint", CHECKPOINT_LIMIT).await?;
        Ok(AgentReply::Done)
    }
}
