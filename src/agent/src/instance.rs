//! The instance: its data directory, its postmaster when one runs, and the gate that every command
//! goes through (epoch, fence) before a module of its own carries it out.

use std::sync::Arc;
use std::time::Duration;

use helios_api::agent::{AgentCommand, AgentError, AgentReply, AgentRequest, InstanceState};
use helios_api::{Epoch, Lsn, Timeline};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::certificates::Certificates;
use crate::durable::{Pending, Store};
use crate::error::{failed, refused};
use crate::files::{self, Directory};
use crate::hub::{Hub, Run};
use crate::lease::Lease;
use crate::postmaster::Postmaster;
use crate::wal::Control;
use crate::{AgentConfig, AgentFailure, logs, process, tools};

/// How long a server may take from its start to its first answer: crash recovery comes before it.
const START_LIMIT: Duration = Duration::from_secs(300);
/// The oldest major version that is supported.
const OLDEST: u32 = 15;
/// How long a running server may take to have a connection for a command.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);

/// The instance that the agent is in charge of.
#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) config: Arc<AgentConfig>,
    pub(crate) store: Store,
    pub(crate) hub: Hub,
    pub(crate) lease: Lease,
    pub(crate) postmaster: Option<Postmaster>,
    /// Since when the running standby has had no stream.
    pub(crate) alone_since: Option<Instant>,
    /// The epoch in which the WAL receiver was stopped for a successor to be chosen.
    pub(crate) stopped_at: Option<Epoch>,
    /// Processes that a fence has stopped may not have gone yet: when they are killed at the latest.
    pub(crate) dying: Option<Instant>,
    /// PostgreSQL's own certificate files.
    pub(crate) certificates: Certificates,
    /// Major version of `bin_dir`.
    pub(crate) major: String,
    runs: u64,
}

impl Instance {
    /// Looks at what is there: takes over a running postmaster, kills one that is fenced, and the
    /// remains of one that died.
    pub(crate) async fn open(
        mut config: AgentConfig,
        store: Store,
        hub: Hub,
        lease: Lease,
    ) -> Result<Self, AgentFailure> {
        files::prepare_folders(&config)?;
        // The folder on PATH may hold links to some of the programs only.
        if let Some(folder) = std::fs::canonicalize(config.program("postgres"))
            .ok()
            .as_deref()
            .and_then(std::path::Path::parent)
        {
            folder.clone_into(&mut config.bin_dir);
        }
        let major = major_version(&config).await?;
        let mut instance = Self {
            certificates: Certificates::of(&config),
            config: Arc::new(config),
            store,
            hub,
            lease,
            postmaster: None,
            alone_since: None,
            stopped_at: None,
            dying: None,
            major,
            runs: 0,
        };
        instance.publish_durable();
        let settings = instance.first_settings().await;
        settings.map_err(|e| AgentFailure::Config(e.to_string()))?;
        let config = Arc::clone(&instance.config);
        let fenced = instance.is_fenced() && !files::is_standby(&config);
        match process::postmaster(&config.data_dir) {
            Some((pid, file))
                if !fenced && file.port == config.port && file.socket_dir == config.socket_dir =>
            {
                tracing::info!(%pid, "taking over the running postmaster");
                let run = instance.next_run();
                let (hub, lease) = (&instance.hub, &instance.lease);
                instance.postmaster = Some(Postmaster::adopt(&config, (hub, lease), run, pid));
            }
            _ => {
                let killed = process::kill_all(&config.data_dir).await;
                let killed = killed.map_err(|e| AgentFailure::Config(e.to_string()))?;
                if killed > 0 {
                    tracing::warn!(killed, fenced, "killed processes that were left running");
                }
                instance.publish_stopped(killed > 0).await;
            }
        }
        Ok(instance)
    }

    /// Carries out one command.
    pub(crate) async fn execute(
        &mut self,
        request: AgentRequest,
    ) -> Result<AgentReply, AgentError> {
        if self.postmaster.as_ref().is_some_and(Postmaster::has_exited) {
            self.clean_up_crash().await;
        }
        let pending = self.accept(&request)?;
        let fast = matches!(
            request.command,
            AgentCommand::Fence { .. } | AgentCommand::Promote
        );
        // On the way of a failover the disk works beside the server; see there.
        let pending = if fast {
            pending
        } else {
            pending.done().await?;
            Pending::default()
        };
        let AgentRequest { epoch, command } = request;
        match command {
            AgentCommand::Fence { .. } => {}
            AgentCommand::Follow { .. } => self.bury_in_turn().await?,
            _ => self.bury().await?,
        }
        tracing::debug!(%epoch, ?command, "command");
        // Each is boxed: the largest of these futures would otherwise sit in all callers.
        let promotes = matches!(command, AgentCommand::Promote);
        let result = match command {
            AgentCommand::Bootstrap => Box::pin(self.bootstrap()).await,
            AgentCommand::StartPrimary => Box::pin(self.start_primary()).await,
            AgentCommand::Survey => Box::pin(self.survey()).await,
            AgentCommand::StartStandby => Box::pin(self.start_alone()).await,
            AgentCommand::Follow {
                primary,
                timeline,
                fork,
            } => Box::pin(self.follow(&primary, timeline, fork)).await,
            AgentCommand::Checkpoint => Box::pin(self.checkpoint()).await,
            AgentCommand::Fence { mode } => Box::pin(self.fence(mode, pending)).await,
            AgentCommand::StopReceiver => Box::pin(self.stop_receiver()).await,
            AgentCommand::WalBeyond { timeline, at } => {
                Box::pin(self.wal_beyond(timeline, at)).await
            }
            AgentCommand::Promote => Box::pin(self.promote(epoch, pending)).await,
            AgentCommand::SetSynchronous { standbys, number } => {
                Box::pin(self.set_synchronous(&standbys, number)).await
            }
            AgentCommand::Configure { settings } => Box::pin(self.reconfigure(&settings)).await,
            AgentCommand::DropSlot { standby } => Box::pin(self.drop_slot(&standby)).await,
            AgentCommand::Shutdown => Box::pin(self.shut_down()).await,
        };
        match &self.postmaster {
            Some(postmaster) if postmaster.has_exited() => self.clean_up_crash().await,
            // It has said what it is, and all sessions are about to run there.
            Some(postmaster) if promotes && result.is_ok() => postmaster.poke_later(),
            Some(postmaster) => postmaster.poke(),
            // A command that failed before it started anything may have said "starting".
            None if matches!(self.hub.state().instance, InstanceState::Starting { .. }) => {
                self.publish_stopped(false).await;
            }
            None => {}
        }
        result
    }

    /// The gate: refuses what is stale or fenced, and begins to make durable what the command means
    /// for the epoch.
    fn accept(&mut self, request: &AgentRequest) -> Result<Pending, AgentError> {
        let given = request.epoch;
        let seen = self.store.get().epoch;
        if given < seen {
            return Err(AgentError::Stale { given, seen });
        }
        let command = &request.command;
        let writable = matches!(
            command,
            AgentCommand::Bootstrap | AgentCommand::StartPrimary | AgentCommand::Promote
        );
        let fenced_at = self.store.get().fenced_at;
        if writable && fenced_at.is_some_and(|at| given <= at) {
            return Err(refused(format_args!(
                "instance is fenced in epoch {given}; only a command of a later epoch can make it \
                 writable"
            )));
        }
        // A successor is being chosen: whoever received again would confirm the old primary again.
        let follows = matches!(command, AgentCommand::Follow { .. });
        if follows && self.stopped_at.is_some_and(|at| given <= at) {
            return Err(refused(format_args!(
                "receiver was stopped in epoch {given} so that a successor can be chosen; only a \
                 command of a later epoch starts it again"
            )));
        }
        if matches!(command, AgentCommand::StopReceiver) {
            self.stopped_at = Some(given);
        }
        // A standby cannot commit: following in the fence's own epoch leaves the fence on.
        let lifts = writable || matches!(command, AgentCommand::Follow { .. });
        let pending = self.store.update_aside(|record| {
            record.epoch = given;
            if lifts && record.fenced_at.is_some_and(|at| given > at) {
                record.fenced_at = None;
            }
            if matches!(command, AgentCommand::Fence { .. }) {
                record.fenced_at = Some(given);
            }
        });
        self.publish_durable();
        Ok(pending)
    }

    fn is_fenced(&self) -> bool {
        self.store.get().fenced_at.is_some()
    }

    fn publish_durable(&self) {
        self.hub
            .set_durable(self.store.get().epoch, self.is_fenced());
    }

    fn next_run(&mut self) -> Run {
        self.runs += 1;
        Run(self.runs)
    }

    /// Resolves when the running postmaster ends; never when none runs.
    pub(crate) async fn postmaster_gone(&self) {
        match &self.postmaster {
            Some(postmaster) => postmaster.exited().await,
            None => std::future::pending().await,
        }
    }

    /// The postmaster has ended by itself: makes sure that its backends have too, and says so.
    pub(crate) async fn clean_up_crash(&mut self) {
        let Some(postmaster) = self.postmaster.take() else {
            return;
        };
        // A backend that is busy does not notice for a while, and might still commit.
        match process::kill_all(&self.config.data_dir).await {
            Ok(0) => {}
            Ok(killed) => tracing::debug!(killed, "killed what a dead postmaster left"),
            Err(error) => tracing::error!(%error, "could not kill what a dead postmaster left"),
        }
        let timeline = self.last_timeline();
        if let Some(timeline) = timeline {
            // Without a look into pg_control: a failover waits for this.
            self.hub.set(InstanceState::Stopped {
                crashed: true,
                clean: false,
                timeline,
            });
        }
        tracing::warn!(
            log = postmaster.log_tail(&self.config),
            "postmaster ended by itself"
        );
        if timeline.is_none() {
            self.publish_stopped(true).await;
        }
    }

    /// Says what the directory is while no postmaster runs; returns its `pg_control`.
    pub(crate) async fn publish_stopped(&self, crashed: bool) -> Option<Control> {
        let mut control = None;
        let state = match self.directory() {
            Ok(Directory::Empty) => InstanceState::Empty,
            Ok(Directory::Ours) => {
                match Control::read(&self.config).await {
                    Ok(read) => control = Some(read),
                    Err(error) => tracing::warn!(%error, "could not read pg_control"),
                }
                InstanceState::Stopped {
                    crashed,
                    clean: control.as_ref().is_some_and(|c| c.clean),
                    timeline: control.as_ref().map_or(Timeline(0), |c| c.timeline),
                }
            }
            Err(error) => {
                tracing::warn!(%error, "data directory cannot be used");
                InstanceState::Stopped {
                    crashed,
                    clean: false,
                    timeline: Timeline(0),
                }
            }
        };
        self.hub.set(state);
        control
    }

    /// What the data directory is.
    pub(crate) fn directory(&self) -> Result<Directory, AgentError> {
        files::inspect(&self.config, &self.major)
    }

    /// Says what is being done while no postmaster runs.
    pub(crate) fn step(&self, step: &str) {
        self.hub.set(InstanceState::Starting {
            step: step.to_owned(),
        });
    }

    /// The running postmaster.
    pub(crate) fn running(&self) -> Result<&Postmaster, AgentError> {
        self.postmaster
            .as_ref()
            .filter(|p| !p.has_exited())
            .ok_or_else(|| refused("PostgreSQL is not running"))
    }

    /// Starts the postmaster on the configured directory and waits for its first answer. One that
    /// ends with new settings is started with those before them.
    pub(crate) async fn start(&mut self) -> Result<Arc<Client>, AgentError> {
        match self.start_once().await {
            Err(error) if self.running().is_err() && self.fall_back(&error) => {
                self.start_once().await
            }
            other => other,
        }
    }

    async fn start_once(&mut self) -> Result<Arc<Client>, AgentError> {
        // Proven before each start: two postmasters on one directory destroy it.
        process::kill_all(&self.config.data_dir).await?;
        self.check_addresses()?;
        logs::check(&self.config)?;
        process::remove_stale_locks(&self.config.data_dir, &self.config.postgres_socket())?;
        let kept = files::configure(&self.config, &self.floor().await?)?;
        self.certificates.start();
        let run = self.next_run();
        let told = (&self.hub, &self.lease);
        self.postmaster = Some(Postmaster::spawn(&self.config, told, run)?);
        let client = self.client_within(START_LIMIT).await?;
        self.accept_settings(kept);
        Ok(client)
    }

    /// The connection for commands.
    pub(crate) async fn client(&self) -> Result<Arc<Client>, AgentError> {
        self.client_within(CLIENT_LIMIT).await
    }

    async fn client_within(&self, limit: Duration) -> Result<Arc<Client>, AgentError> {
        let postmaster = self.running()?;
        let mut client = postmaster.client.clone();
        tokio::select! {
            biased;
            () = postmaster.exited() => Err(failed(format_args!(
                "PostgreSQL ended; its log: {}",
                postmaster.log_tail(&self.config)
            ))),
            found = client.wait_for(Option::is_some) => match found {
                Ok(found) => found.clone().ok_or_else(|| failed("no connection")),
                Err(_) => Err(failed("PostgreSQL ended")),
            },
            () = tokio::time::sleep(limit) => Err(failed(format_args!(
                "PostgreSQL accepted no connection within {limit:?}; its log: {}",
                postmaster.log_tail(&self.config)
            ))),
        }
    }

    /// The last position that was seen of the running instance.
    pub(crate) fn last_position(&self) -> Lsn {
        match self.hub.state().instance {
            InstanceState::Primary { position, .. } => position,
            InstanceState::Standby {
                received, replayed, ..
            } => received.max(replayed),
            _ => Lsn(0),
        }
    }

    /// The timeline that the instance was last seen to write or follow, while it runs or right
    /// after it has stopped.
    pub(crate) fn last_timeline(&self) -> Option<Timeline> {
        match self.hub.state().instance {
            InstanceState::Primary { timeline, .. }
            | InstanceState::Standby { timeline, .. }
            | InstanceState::Stopped { timeline, .. } => Some(timeline),
            _ => None,
        }
        .filter(|timeline| *timeline != Timeline(0))
    }

    /// Finds out before the start whether somebody else has the addresses: PostgreSQL itself goes
    /// on when only some of them are taken.
    fn check_addresses(&self) -> Result<(), AgentError> {
        let port = self.config.port;
        let socket = self.config.postgres_socket();
        if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
            return Err(failed(format_args!(
                "another server listens on \"{}\"; choose another port or socket folder",
                socket.display()
            )));
        }
        for address in &self.config.listen_addresses {
            let host = if address == "*" { "0.0.0.0" } else { address };
            if let Err(error) = std::net::TcpListener::bind((host, port)) {
                return Err(failed(format_args!(
                    "could not listen on port {port} of \"{address}\": {error}; \
                     free the port or choose another one"
                )));
            }
        }
        Ok(())
    }
}

/// Major version of the programs in `bin_dir`.
async fn major_version(config: &AgentConfig) -> Result<String, AgentFailure> {
    let mut command = tools::command(config, "postgres");
    command.arg("--version");
    let text = tools::output(command, "postgres").await.map_err(|error| {
        AgentFailure::Config(format!(
            "bin_dir \"{}\" cannot be used: {error}",
            config.bin_dir.display()
        ))
    })?;
    let version = text.split_whitespace().nth(2).unwrap_or_default();
    let major: String = version.chars().take_while(char::is_ascii_digit).collect();
    match major.parse::<u32>() {
        Ok(number) if number >= OLDEST => Ok(major),
        _ => Err(AgentFailure::Config(format!(
            "PostgreSQL in \"{}\" is \"{}\"; version {OLDEST} or later is needed",
            config.bin_dir.display(),
            text.trim()
        ))),
    }
}
