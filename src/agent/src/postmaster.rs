//! One run of the postmaster: spawned or taken over, watched until it ends, stopped in bounds.
//!
//! It is a child in a process group of its own, so that a signal to the agent's group does not
//! reach it, and its end is known the moment it happens.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::sync::Arc;
use std::time::Duration;

use helios_api::agent::AgentError;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::sync::{Notify, watch};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use crate::AgentConfig;
use crate::error::{failed, file_failed};
use crate::hub::{Hub, Run};
use crate::lease::Lease;
use crate::observer::Observer;
use crate::{files, process, tools};

/// How often a postmaster that is not our child is looked at.
const ADOPTED_INTERVAL: Duration = Duration::from_millis(10);
/// How long an immediate shutdown may take before processes are killed.
/// Short: killing them does no more harm, and a failover waits.
const IMMEDIATE_LIMIT: Duration = Duration::from_millis(250);
/// A log that has grown past this is set aside at the next start.
const LOG_LIMIT: u64 = 16 << 20;

/// When the observer looks at a server that has just been promoted.
const LATER: Duration = Duration::from_millis(50);

/// A postmaster that was started or found.
#[derive(Debug)]
pub(crate) struct Postmaster {
    pid: Pid,
    pub(crate) run: Run,
    exited: CancellationToken,
    /// The connection for commands, while there is one.
    pub(crate) client: watch::Receiver<Option<Arc<Client>>>,
    /// Makes the observer look at once.
    poke: Arc<Notify>,
    /// Where this run's part of the log begins.
    log_start: u64,
}

impl Postmaster {
    /// Starts PostgreSQL on the data directory.
    pub(crate) fn spawn(
        config: &Arc<AgentConfig>,
        told: (&Hub, &Lease),
        run: Run,
    ) -> Result<Self, AgentError> {
        let (log, log_start) = open_log(config)?;
        let log_path = config.log_file();
        let second = log
            .try_clone()
            .map_err(file_failed("could not open", &log_path))?;
        let mut command = tools::command(config, "postgres");
        command
            .arg("-D")
            .arg(&config.data_dir)
            .args(files::arguments(config))
            .stdout(log)
            .stderr(second)
            .process_group(0);
        let mut child = command
            .spawn()
            .map_err(file_failed("could not run", &config.program("postgres")))?;
        let pid = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .map(Pid::from_raw)
            .ok_or_else(|| failed("postgres ended at once"))?;
        let exited = CancellationToken::new();
        tokio::spawn({
            let exited = exited.clone();
            async move {
                let status = child.wait().await;
                tracing::debug!(%pid, ?status, "postmaster ended");
                exited.cancel();
            }
        });
        Ok(Self::observed(config, told, run, pid, exited, log_start))
    }

    /// Takes over a postmaster that an earlier agent left running.
    pub(crate) fn adopt(
        config: &Arc<AgentConfig>,
        told: (&Hub, &Lease),
        run: Run,
        pid: Pid,
    ) -> Self {
        let exited = CancellationToken::new();
        tokio::spawn({
            let exited = exited.clone();
            let data_dir = config.data_dir.clone();
            async move {
                while process::is_of_instance(pid, &data_dir) {
                    tokio::time::sleep(ADOPTED_INTERVAL).await;
                }
                exited.cancel();
            }
        });
        Self::observed(config, told, run, pid, exited, u64::MAX)
    }

    fn observed(
        config: &Arc<AgentConfig>,
        (hub, lease): (&Hub, &Lease),
        run: Run,
        pid: Pid,
        exited: CancellationToken,
        log_start: u64,
    ) -> Self {
        hub.begin(run, "recovery");
        let (sender, client) = watch::channel(None);
        let poke = Arc::new(Notify::new());
        let observer = Observer {
            config: Arc::clone(config),
            hub: hub.clone(),
            lease: lease.clone(),
            run,
            client: sender,
            poke: Arc::clone(&poke),
        };
        let gone = exited.clone();
        tokio::spawn(async move { gone.run_until_cancelled(observer.watch()).await });
        Self {
            pid,
            run,
            exited,
            client,
            poke,
            log_start,
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether it has ended.
    pub(crate) fn has_exited(&self) -> bool {
        self.exited.is_cancelled()
    }

    /// Resolves when it has ended.
    pub(crate) async fn exited(&self) {
        self.exited.cancelled().await;
    }

    /// Makes the observer look at once.
    pub(crate) fn poke(&self) {
        self.poke.notify_one();
    }

    /// Makes the observer look soon: what it would see at once has been said.
    pub(crate) fn poke_later(&self) {
        let poke = Arc::clone(&self.poke);
        tokio::spawn(async move {
            tokio::time::sleep(LATER).await;
            poke.notify_one();
        });
    }

    /// Re-reads the configuration files.
    pub(crate) fn reload(&self) -> Result<(), AgentError> {
        process::signal(self.pid, Signal::SIGHUP)
    }

    /// Fast shutdown (SIGINT), then immediate (SIGQUIT), then SIGKILL; each when the one before
    /// has not worked within its limit. `None` skips the fast one.
    pub(crate) async fn stop(
        &self,
        config: &AgentConfig,
        fast: Option<Duration>,
    ) -> Result<(), AgentError> {
        let steps = [
            fast.map(|limit| (Signal::SIGINT, limit)),
            Some((Signal::SIGQUIT, IMMEDIATE_LIMIT)),
        ];
        for (signal, limit) in steps.into_iter().flatten() {
            if self.has_exited() {
                break;
            }
            process::signal(self.pid, signal)?;
            if tokio::time::timeout(limit, self.exited()).await.is_err() {
                tracing::warn!(%signal, ?limit, "postmaster did not stop within its limit");
            }
        }
        process::kill_all(&config.data_dir).await?;
        // The kernel has reaped it or is about to; the watcher says when.
        let _ = tokio::time::timeout(IMMEDIATE_LIMIT, self.exited()).await;
        Ok(())
    }

    /// The end of what this run wrote to the log.
    pub(crate) fn log_tail(&self, config: &AgentConfig) -> String {
        let read = || -> std::io::Result<String> {
            let mut file = File::open(config.log_file())?;
            let length = file.metadata()?.len();
            let start = self.log_start.min(length).max(length.saturating_sub(8192));
            file.seek(SeekFrom::Start(start))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(tools::tail(&String::from_utf8_lossy(&bytes)))
        };
        read().unwrap_or_default()
    }
}

/// Opens the log for appending and says how long it is; a large one is set aside first.
fn open_log(config: &AgentConfig) -> Result<(File, u64), AgentError> {
    let path = config.log_file();
    let failed = |e| file_failed("could not open", &path)(e);
    trim_log(config, LOG_LIMIT);
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    Ok((file, length))
}

/// Keeps the log bounded: past `limit` it is copied to `postgres.log.1` and emptied. The server
/// appends, so that emptying it under its hands is safe.
pub(crate) fn trim_log(config: &AgentConfig, limit: u64) {
    let path = config.log_file();
    let too_long = std::fs::metadata(&path).is_ok_and(|m| m.len() > limit);
    if !too_long {
        return;
    }
    let aside = path.with_extension("log.1");
    let trimmed = std::fs::copy(&path, aside)
        .and_then(|_| OpenOptions::new().write(true).open(&path)?.set_len(0));
    if let Err(error) = trimmed {
        tracing::warn!(%error, "could not trim PostgreSQL's log");
    }
}
