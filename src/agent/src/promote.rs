//! Promotion, and the evidence for commit resolution that is taken on the way.
//!
//! The fence's transaction id is read while the server is still in recovery, because afterwards
//! anybody may be given an id. It counts only if the new timeline begins exactly where replay stood
//! when it was read.

use std::time::Duration;

use helios_api::agent::{AgentError, AgentReply, InstanceState};
use helios_api::control::{Fence, LostCommits};
use helios_api::{Epoch, Lsn, Timeline, Xid};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::durable::{Evidence, Pending, Promotion};
use crate::error::{failed, refused};
use crate::files::Dynamic;
use crate::instance::Instance;
use crate::process;
use crate::sql::{self, SqlError};
use crate::wal::History;

/// How often the server is asked how far it is.
const INTERVAL: Duration = Duration::from_millis(1);
/// How long replay may stand still before it is given up.
const REPLAY_LIMIT: Duration = Duration::from_secs(30);
/// How long the end of recovery may take.
const PROMOTE_LIMIT: Duration = Duration::from_secs(30);
/// Replay that stands still for so long may be waiting for a query: queries are cancelled.
const CANCEL_AFTER: Duration = Duration::from_millis(5);
/// Replay that stands still for so long may be waiting for an idle transaction: they are ended.
const TERMINATE_AFTER: Duration = Duration::from_millis(100);

/// What a move asks, parsed and planned when the connection is opened: parsing and planning is most
/// of what these statements cost, more than half of it in the first use of what they name, and in
/// a move everybody waits for them.
///
/// `progress`: in recovery?, receiver there?, received, replayed, whether replay has run out of WAL,
/// and the process that replays. One look at the processes, so it is as old as the oldest of these.
pub(crate) const PREPARE: &str = "\
prepare progress as
select pg_is_in_recovery(),
       coalesce(bool_or(backend_type = 'walreceiver'), false),
       greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()),
       pg_last_wal_replay_lsn(),
       coalesce(bool_or(backend_type = 'startup' and
           wait_event in ('RecoveryWalStream', 'RecoveryRetrieveRetryInterval')), false),
       min(pid) filter (where backend_type = 'startup')
from pg_stat_get_activity(null);
prepare replayed as select pg_last_wal_replay_lsn();
prepare horizon as select pg_snapshot_xmax(pg_current_snapshot());
prepare recovering as select pg_is_in_recovery();
prepare promote as select pg_promote(false);
prepare fork as
select ('x' || name)::bit(32)::int,
       pg_read_file('pg_wal/' || name || '.history', 0, 1048576, true)
from substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) name;
execute progress;
execute replayed;
execute horizon;
execute recovering;
explain execute promote;
explain execute fork";

const PROGRESS: &str = "execute progress";

/// Frees replay from a pause and from queries that hold a snapshot.
const CANCEL: &str = "\
select case when pg_is_wal_replay_paused() then pg_wal_replay_resume()::text end;
select pg_cancel_backend(pid) from pg_stat_activity
where backend_type = 'client backend' and pid <> pg_backend_pid()
  and state = 'active' and application_name <> 'helios-agent'";

const TERMINATE: &str = "\
select pg_terminate_backend(pid) from pg_stat_activity
where backend_type = 'client backend' and pid <> pg_backend_pid()
  and xact_start is not null and application_name <> 'helios-agent'";

/// The order matters: everything up to the position was visible before the snapshot was taken, and
/// the server was still in recovery after it. Three statements, so three snapshots.
const EVIDENCE: &str = "execute replayed; execute horizon; execute recovering";

struct Progress {
    recovering: bool,
    receiving: bool,
    received: Lsn,
    replayed: Lsn,
    starved: bool,
    startup: Option<i32>,
}

impl Progress {
    async fn read(client: &Client) -> Result<Self, SqlError> {
        let row = sql::one(client, PROGRESS, sql::LIMIT).await?;
        Ok(Self {
            recovering: sql::column::<String>(&row, 0)? == "t",
            receiving: sql::column::<String>(&row, 1)? == "t",
            received: sql::optional(&row, 2)?.unwrap_or_default(),
            replayed: sql::optional(&row, 3)?.unwrap_or_default(),
            starved: sql::column::<String>(&row, 4)? == "t",
            startup: sql::optional(&row, 5)?,
        })
    }

    /// A record that arrived in part can never be replayed: then replay starves before the end.
    fn complete(&self) -> bool {
        !self.receiving && (self.received <= self.replayed || self.starved)
    }
}

impl Instance {
    pub(crate) async fn stop_receiver(&mut self) -> Result<AgentReply, AgentError> {
        let client = self.client().await?;
        let Some(end) = self.finish_replay(&client).await? else {
            return Err(refused("instance is a primary; it has no WAL receiver"));
        };
        let timeline = match self.hub.state().instance {
            InstanceState::Standby { timeline, .. } => timeline,
            _ => Timeline(0),
        };
        Ok(AgentReply::Positions { end, timeline })
    }

    /// Stops the WAL receiver and waits until everything it brought is replayed; returns the end,
    /// `None` for a primary.
    async fn finish_replay(&self, client: &Client) -> Result<Option<Lsn>, AgentError> {
        let first = Progress::read(client).await?;
        if !first.recovering {
            return Ok(None);
        }
        let dynamic = Dynamic::read(&self.config);
        if !dynamic.primary_conninfo.is_empty() {
            let without = Dynamic {
                primary_conninfo: String::new(),
                // The reload ends the wait that is under way, and later ones are short.
                retry_interval: String::new(),
                ..dynamic
            };
            without.write(&self.config)?;
            self.reload_startup(&first)?;
        }
        let mut moved = Instant::now();
        let mut last = Lsn(0);
        let mut complete_at = None;
        let mut acted = Duration::ZERO;
        loop {
            let progress = Progress::read(client).await?;
            if progress.complete() {
                // Twice at the same place: once may have been between two records.
                if complete_at == Some(progress.replayed) || progress.received <= progress.replayed
                {
                    return Ok(Some(progress.replayed));
                }
                complete_at = Some(progress.replayed);
            }
            if progress.replayed != last {
                last = progress.replayed;
                moved = Instant::now();
                acted = Duration::ZERO;
            }
            let still = moved.elapsed();
            if still > REPLAY_LIMIT {
                return Err(failed(format_args!(
                    "replay has stood still at {last} for {REPLAY_LIMIT:?}; received up to {}",
                    progress.received
                )));
            }
            if !progress.receiving && !progress.starved {
                acted = free_replay(client, still, acted).await?;
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Has the startup process read the configuration again, which decides on its own whether there
    /// is a receiver. All others would do so too if the postmaster were told, each backend in front
    /// of its next statement (`PostgresMain` in `src/backend/tcop/postgres.c`): that is a millisecond
    /// for each of the sessions that wait for the promotion.
    fn reload_startup(&self, progress: &Progress) -> Result<(), AgentError> {
        match progress.startup {
            Some(pid) => process::signal(Pid::from_raw(pid), Signal::SIGHUP),
            None => self.running()?.reload(),
        }
    }

    pub(crate) async fn promote(
        &mut self,
        epoch: Epoch,
        record: Pending,
    ) -> Result<AgentReply, AgentError> {
        let began = Instant::now();
        let client = self.client().await?;
        let known = self.store.get().promotion.clone();
        let evidence = known.filter(|p| p.epoch == epoch).and_then(|p| p.evidence);
        if self.finish_replay(&client).await?.is_none() {
            record.done().await?;
            return self.promoted_before(&client, epoch, evidence, began).await;
        }
        let replayed = began.elapsed();
        let mut seen = Vec::new();
        if !gather(&client, &mut seen).await? {
            return Err(failed("recovery ended before the promotion"));
        }
        sql::rows(&client, "execute promote", sql::LIMIT).await?;
        // The epoch is durable before anybody hears of the new primary, and written while the server
        // is busy. Until then a command of an earlier epoch could reach an agent that has died in
        // this very moment, but none of them does harm: the primary of that epoch has been fenced
        // durably, so there is nobody to follow, and whoever promotes gives this command again.
        // The evidence is not waited for: the caller has the answer. If the agent dies before both,
        // the outcome of open commits is unknown, which is honest.
        let best = seen.last().copied();
        self.remember(epoch, best);
        let ended = self.await_end_of_recovery(&client, &mut seen).await;
        let recovered = began.elapsed();
        ended?;
        record.done().await?;
        let recorded = began.elapsed();
        let (timeline, fork) = fork(&client).await?;
        let proof = seen.iter().find(|e| e.replayed == fork).copied();
        if proof != best {
            self.remember(epoch, proof);
        }
        let fence = Fence {
            epoch,
            timeline,
            fork,
            xid: proof.map(|e| e.xid),
            lost: LostCommits::default(),
        };
        self.report_promoted(&fence);
        tracing::debug!(?replayed, ?recovered, ?recorded, "phases of the promotion");
        Ok(reply(fence, began))
    }

    /// The same command again, or after the agent died on the way.
    async fn promoted_before(
        &self,
        client: &Client,
        epoch: Epoch,
        evidence: Option<Evidence>,
        began: Instant,
    ) -> Result<AgentReply, AgentError> {
        // Without evidence (the agent died before it was written, or the instance was a primary
        // all along) the answer is still right, and the outcome of open commits unknown.
        let (timeline, fork) = fork(client).await?;
        let proof = evidence.filter(|e| e.replayed == fork);
        let fence = Fence {
            epoch,
            timeline,
            fork,
            xid: proof.map(|e| e.xid),
            lost: LostCommits::default(),
        };
        Ok(reply(fence, began))
    }

    async fn await_end_of_recovery(
        &self,
        client: &Client,
        seen: &mut Vec<Evidence>,
    ) -> Result<(), AgentError> {
        let deadline = Instant::now() + PROMOTE_LIMIT;
        while gather(client, seen).await? {
            if Instant::now() > deadline {
                return Err(failed(format_args!(
                    "recovery did not end within {PROMOTE_LIMIT:?}; PostgreSQL's log: {}",
                    self.running()?.log_tail(&self.config)
                )));
            }
            tokio::time::sleep(INTERVAL).await;
        }
        Ok(())
    }

    fn remember(&mut self, epoch: Epoch, evidence: Option<Evidence>) {
        let writing = self
            .store
            .update_aside(|record| record.promotion = Some(Promotion { epoch, evidence }));
        tokio::spawn(async move {
            if let Err(error) = writing.done().await {
                tracing::warn!(%error, "evidence of the promotion is not durable");
            }
        });
    }

    fn report_promoted(&self, fence: &Fence) {
        if let Some(postmaster) = &self.postmaster {
            self.hub.observe(
                postmaster.run,
                InstanceState::Primary {
                    timeline: fence.timeline,
                    position: fence.fork,
                    standbys: Vec::new(),
                },
            );
        }
        tracing::info!(epoch = %fence.epoch, timeline = %fence.timeline, fork = %fence.fork,
            xid = ?fence.xid, "promoted");
    }
}

fn reply(fence: Fence, began: Instant) -> AgentReply {
    AgentReply::Promoted {
        fence,
        micros: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
    }
}

/// Reads the evidence once; `false` when recovery has ended, and then it is worth nothing.
async fn gather(client: &Client, seen: &mut Vec<Evidence>) -> Result<bool, SqlError> {
    let rows = sql::rows(client, EVIDENCE, sql::LIMIT).await?;
    let [position, xid, recovering] = rows.as_slice() else {
        return Err(SqlError::Answer("not three rows".to_owned()));
    };
    if sql::column::<String>(recovering, 0)? != "t" {
        return Ok(false);
    }
    let evidence = Evidence {
        replayed: sql::optional(position, 0)?.unwrap_or_default(),
        xid: Xid(sql::column(xid, 0)?),
    };
    if seen
        .last()
        .is_none_or(|last| last.replayed != evidence.replayed)
    {
        seen.push(evidence);
    }
    Ok(true)
}

/// The timeline that the new primary writes, and where it begins.
async fn fork(client: &Client) -> Result<(Timeline, Lsn), AgentError> {
    let row = sql::one(client, "execute fork", sql::LIMIT).await?;
    let timeline = Timeline(sql::column(&row, 0)?);
    let Some(text) = sql::optional::<String>(&row, 1)? else {
        return Err(refused("instance is a primary that was never promoted"));
    };
    let fork = History::parse(&text).and_then(|h| h.begin());
    fork.map(|fork| (timeline, fork))
        .ok_or_else(|| failed(format_args!("history of timeline {timeline} is damaged")))
}

/// The timeline that a primary writes.
pub(crate) async fn current_timeline(client: &Client) -> Result<Timeline, SqlError> {
    let sql = "select ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))\
               ::bit(32)::int";
    let row = sql::one(client, sql, sql::LIMIT).await?;
    Ok(Timeline(sql::column(&row, 0)?))
}

/// Takes away what may hold replay up, the longer it stands still the harder; returns for how long
/// it had stood still when something was last done.
async fn free_replay(
    client: &Client,
    still: Duration,
    acted: Duration,
) -> Result<Duration, SqlError> {
    for (after, script) in [(TERMINATE_AFTER, TERMINATE), (CANCEL_AFTER, CANCEL)] {
        if still >= after && acted < after {
            sql::rows(client, script, sql::LIMIT).await?;
            return Ok(still);
        }
    }
    Ok(acted)
}
