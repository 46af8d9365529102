//! Becoming a standby: the fork-point check, then the cheapest way that is safe.
//!
//! Invariant: no instance attaches to a primary whose history its own WAL has left. A crashed old
//! primary that does can confirm positions that no other instance holds.

use std::time::Duration;

use helios_api::agent::{AgentError, AgentReply, InstanceState, Rejoin};
use helios_api::control::Backend;
use helios_api::{Lsn, Timeline};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::disk;
use crate::error::{failed, refused};
use crate::files::{self, Directory, Dynamic, Floor};
use crate::instance::Instance;
use crate::source::{Source, conninfo};
use crate::wal::{self, Control, Standing};
use crate::{logs, sql, tools};

/// How long a fast shutdown may take before an instance changes sides.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How long a started standby may take to stream.
const STREAM_LIMIT: Duration = Duration::from_secs(15);
/// After how long without a stream it is asked whether the primary still has the WAL.
const WAL_LOST_AFTER: Duration = Duration::from_secs(2);
/// How long a standby looks for its primary often.
const ALONE: Duration = Duration::from_secs(3);
/// How often it does so after that.
const RARE: &str = "2s";
/// How often a standby is asked whether it streams.
const INTERVAL: Duration = Duration::from_millis(5);

/// What came of waiting for the stream.
enum Stream {
    Flows,
    /// The primary no longer has the WAL that the standby needs.
    WalLost,
}

impl Instance {
    pub(crate) async fn follow(
        &mut self,
        primary: &Backend,
        timeline: Timeline,
        fork: Option<Lsn>,
    ) -> Result<AgentReply, AgentError> {
        if primary.name == self.config.name {
            return Err(refused("an instance cannot follow itself"));
        }
        let directory = self.directory()?;
        // One that runs as a primary keeps it until it has stopped.
        if self.postmaster.is_none() || files::is_standby(&self.config) {
            self.lease.release();
        }
        let source = Source::connect(&self.config, primary, timeline, fork).await?;
        source.ensure_slot(&self.config.name.slot_name()).await?;
        let how = match directory {
            Directory::Empty => self.clone_from(&source, primary).await?,
            // Without its log nothing of it can be used: it is a copy of what the primary has.
            Directory::Ours if self.store.get().torn || logs::are_lost(&self.config) => {
                self.stop(None).await?;
                self.clone_from(&source, primary).await?
            }
            Directory::Ours => self.rejoin(&source, primary).await?,
        };
        self.lease.release();
        tracing::info!(primary = %primary.name, %timeline, ?how, "following");
        Ok(AgentReply::Following { how })
    }

    async fn rejoin(&mut self, source: &Source, primary: &Backend) -> Result<Rejoin, AgentError> {
        if self.postmaster.is_some() {
            if self.repoint(source, primary).await? {
                return Ok(Rejoin::Direct);
            }
            self.stop(Some(STOP_LIMIT)).await?;
        }
        self.step("comparing timelines");
        let control = Control::read(&self.config).await?;
        if control.system != source.system {
            return Err(refused(format_args!(
                "data directory \"{}\" belongs to another cluster (system identifier {}, not {}); \
                 remove it to have it cloned",
                self.config.data_dir.display(),
                control.system,
                source.system
            )));
        }
        let mut how = Rejoin::Direct;
        if self.has_diverged(source, &control).await? {
            how = Rejoin::Rewound;
            if let Err(error) = self.rewind(source, primary).await {
                tracing::warn!(%error, "pg_rewind did not work, cloning instead");
                return self.clone_from(source, primary).await;
            }
        }
        match self.start_standby(source, primary).await {
            Ok(Stream::Flows) => Ok(how),
            Ok(Stream::WalLost) => {
                tracing::warn!("primary no longer has the WAL that is needed, cloning instead");
                self.stop(Some(STOP_LIMIT)).await?;
                self.clone_from(source, primary).await
            }
            // The configuration was good enough for recovery before it, so the data is not.
            Err(error) if how == Rejoin::Rewound && self.running().is_err() => {
                tracing::warn!(%error, "rewound instance does not start, cloning instead");
                self.stop(None).await?;
                self.clone_from(source, primary).await
            }
            Err(error) => Err(error),
        }
    }

    /// Points a running standby at the primary without a restart; `false` when that is not proven
    /// safe, or when it is no standby.
    async fn repoint(&mut self, source: &Source, primary: &Backend) -> Result<bool, AgentError> {
        // One that does not answer is stopped.
        let Ok(client) = self.client().await else {
            return Ok(false);
        };
        let Some((held, received)) = standby_position(&client).await? else {
            return Ok(false);
        };
        let held = wal::latest_timeline(&self.config, held)?;
        let safe = match Standing::of(held, source.timeline, &source.history) {
            Standing::Same => received <= source.position().await?,
            Standing::Ancestor(fork) => received <= fork,
            Standing::Foreign => false,
        };
        if !safe {
            return Ok(false);
        }
        self.write_upstream(primary)?;
        self.running()?.reload()?;
        match self.await_stream(&client, source).await? {
            Stream::Flows => Ok(true),
            // Stopped and cloned by the caller's longer way.
            Stream::WalLost => Ok(false),
        }
    }

    fn write_upstream(&self, primary: &Backend) -> Result<(), AgentError> {
        Dynamic {
            primary_conninfo: conninfo(&self.config, primary),
            primary_slot_name: self.config.name.slot_name(),
            // A standby that is promoted must not wait for whoever its predecessor waited for.
            synchronous_standby_names: String::new(),
            retry_interval: String::new(),
        }
        .write(&self.config)
    }

    /// Whether the stopped instance's WAL reaches past the point where the primary's history left
    /// it. "No" only when that is proven.
    async fn has_diverged(&self, source: &Source, control: &Control) -> Result<bool, AgentError> {
        let held = wal::latest_timeline(&self.config, control.timeline)?;
        // What cannot be read proves nothing, and recovery could not begin there either.
        let begins = wal::has_record(
            &self.config,
            control.checkpoint_timeline,
            control.checkpoint,
        );
        if !begins.await? {
            return Ok(true);
        }
        match Standing::of(held, source.timeline, &source.history) {
            Standing::Same => {
                let end = source.position().await?;
                Ok(control.checkpoint > end || control.minimum > end)
            }
            Standing::Foreign => Ok(true),
            Standing::Ancestor(fork) => {
                // A record that begins at the fork is the first that is not in the history.
                if control.checkpoint >= fork || control.minimum > fork {
                    return Ok(true);
                }
                wal::has_record(&self.config, held, fork).await
            }
        }
    }

    async fn rewind(&mut self, source: &Source, primary: &Backend) -> Result<(), AgentError> {
        self.step("pg_rewind");
        source.checkpoint().await?;
        // pg_rewind runs crash recovery first, which a standby's directory would not do.
        files::set_standby(&self.config, false)?;
        files::configure(&self.config, &Floor::new())?;
        self.store.update(|record| record.torn = true)?;
        let mut command = tools::command(&self.config, "pg_rewind");
        command.arg("-D").arg(&self.config.data_dir).arg(format!(
            "--source-server={} dbname='postgres'",
            conninfo(&self.config, primary)
        ));
        let at_once = self.config.syncs() && disk::can_sync_at_once();
        if at_once || !self.config.syncs() {
            command.arg("--no-sync");
        }
        tools::run_long(command, "pg_rewind", |_| {}).await?;
        if at_once {
            disk::sync_at_once(&self.config.data_dir).await?;
        }
        logs::check(&self.config)?;
        let control = Control::read(&self.config).await?;
        if self.has_diverged(source, &control).await? {
            return Err(failed("data directory still reaches past the fork"));
        }
        // Before the record says that it is whole: a rewound directory must not start as a primary.
        files::set_standby(&self.config, true)?;
        self.store.update(|record| record.torn = false)
    }

    async fn clone_from(
        &mut self,
        source: &Source,
        primary: &Backend,
    ) -> Result<Rejoin, AgentError> {
        self.step("base backup");
        if self.store.get().torn {
            // Worthless, and its space may be needed.
            files::remove_tree(&self.config.data_dir).await?;
            logs::sweep(&self.config).await?;
        }
        let building = files::start_building(&self.config).await?;
        let log = logs::start_building(&self.config).await?;
        let mut command = tools::command(&self.config, "pg_basebackup");
        command
            .arg("-D")
            .arg(building)
            .arg("-d")
            .arg(conninfo(&self.config, primary))
            .arg("--slot")
            .arg(self.config.name.slot_name())
            .args(["--wal-method=stream", "--checkpoint=fast", "--progress"]);
        if let Some(log) = log {
            command.arg("--waldir").arg(log);
        }
        if !self.config.syncs() {
            command.arg("--no-sync");
        }
        if let Err(error) = self.run_backup(command).await {
            let _ = files::remove_tree(&self.config.building_dir()).await;
            return Err(error);
        }
        files::finish_building(&self.config).await?;
        files::set_standby(&self.config, true)?;
        self.store.update(|record| record.torn = false)?;
        match self.start_standby(source, primary).await? {
            Stream::Flows => Ok(Rejoin::Cloned),
            Stream::WalLost => Err(failed("primary has removed the WAL since the base backup")),
        }
    }

    /// Runs `pg_basebackup`, and says how far it is.
    pub(crate) async fn run_backup(
        &self,
        command: tokio::process::Command,
    ) -> Result<(), AgentError> {
        let hub = self.hub.clone();
        tools::run_long(command, "pg_basebackup", |line| {
            if let Some(percent) = percentage(line) {
                let step = format!("base backup {percent} %");
                hub.set(InstanceState::Starting { step });
            }
        })
        .await
    }

    async fn start_standby(
        &mut self,
        source: &Source,
        primary: &Backend,
    ) -> Result<Stream, AgentError> {
        self.step("recovery");
        files::set_standby(&self.config, true)?;
        self.write_upstream(primary)?;
        let client = self.start().await?;
        drop_slots(&client).await;
        self.await_stream(&client, source).await
    }

    /// Has a standby that has not found its primary for a while look for it less often: each try is
    /// two lines in its log. Back to often once it streams; any command that matters to a move
    /// resets it too.
    pub(crate) fn hush(&mut self) {
        let InstanceState::Standby { heard_ms, .. } = self.hub.state().instance else {
            self.alone_since = None;
            return;
        };
        let interval = match heard_ms {
            Some(_) => {
                self.alone_since = None;
                ""
            }
            None if self.alone_since.get_or_insert_with(Instant::now).elapsed() < ALONE => return,
            None => RARE,
        };
        let dynamic = Dynamic::read(&self.config);
        let users = self.config.parameters.contains_key(files::RETRY_INTERVAL);
        if dynamic.retry_interval == interval || dynamic.primary_conninfo.is_empty() || users {
            return;
        }
        let changed = Dynamic {
            retry_interval: interval.to_owned(),
            ..dynamic
        };
        let done = changed
            .write(&self.config)
            .and_then(|()| self.running()?.reload());
        if let Err(error) = done {
            tracing::warn!(%error, "could not change how often the primary is looked for");
        }
    }

    async fn await_stream(&self, client: &Client, source: &Source) -> Result<Stream, AgentError> {
        let began = Instant::now();
        let mut asked = false;
        loop {
            if streams(client, source.timeline).await? {
                return Ok(Stream::Flows);
            }
            if began.elapsed() > WAL_LOST_AFTER && !asked {
                asked = true;
                let row = sql::one(client, "select pg_last_wal_replay_lsn()", sql::LIMIT).await?;
                if let Some(position) = sql::optional(&row, 0)?
                    && !source.has_wal(position).await?
                {
                    return Ok(Stream::WalLost);
                }
            }
            if began.elapsed() > STREAM_LIMIT {
                return Err(failed(format_args!(
                    "standby runs, but did not stream within {STREAM_LIMIT:?}; PostgreSQL's log: {}",
                    self.running()?.log_tail(&self.config)
                )));
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

/// Whether the standby streams the primary's timeline.
async fn streams(client: &Client, timeline: Timeline) -> Result<bool, AgentError> {
    let sql = format!(
        "select exists (select from pg_stat_get_wal_receiver() \
         where status = 'streaming' and received_tli = {timeline})"
    );
    let row = sql::one(client, &sql, sql::LIMIT).await?;
    Ok(sql::column::<String>(&row, 0)? == "t")
}

/// Timeline and end of the WAL that a running standby holds; `None` for a primary.
async fn standby_position(client: &Client) -> Result<Option<(Timeline, Lsn)>, AgentError> {
    let sql = "select pg_is_in_recovery(), \
         (select greatest(c.timeline_id, r.min_recovery_end_timeline, \
                          (select received_tli from pg_stat_get_wal_receiver())) \
          from pg_control_checkpoint() c, pg_control_recovery() r), \
         greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())";
    let row = sql::one(client, sql, sql::LIMIT).await?;
    if sql::column::<String>(&row, 0)? != "t" {
        return Ok(None);
    }
    let timeline = Timeline(sql::column(&row, 1)?);
    Ok(Some((
        timeline,
        sql::optional(&row, 2)?.unwrap_or_default(),
    )))
}

/// Drops the slots of its time as a primary: nobody moves them on, and they would keep WAL for
/// ever.
async fn drop_slots(client: &Client) {
    let sql = "select pg_drop_replication_slot(slot_name) from pg_replication_slots \
               where slot_type = 'physical' and not active and slot_name like 'helios\\_%'";
    if let Err(error) = sql::rows(client, sql, sql::LIMIT).await {
        tracing::warn!(%error, "could not drop the slots of an old primary");
    }
}

/// The percentage in a line like `1234/5678 kB (21%), 0/1 tablespace`.
fn percentage(line: &str) -> Option<u32> {
    let (before, _) = line.split_once("%)")?;
    before.rsplit_once('(')?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_pg_basebackup() {
        assert_eq!(
            percentage("22743/22743 kB (100%), 1/1 tablespace"),
            Some(100)
        );
        assert_eq!(percentage("  0/22743 kB (0%), 0/1 tablespace"), Some(0));
        assert_eq!(percentage("waiting for checkpoint"), None);
    }
}
