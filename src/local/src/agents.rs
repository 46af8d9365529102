//! Agents under supervision: each is started again when it ends, and watched for what it reports.
//!
//! Invariant: a view is never older than the last command's result that was handed on
//! ([`Agents::command`] reads the state again before it returns).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use helios_agent::AgentConfig;
use helios_agent::client::{AgentClient, ClientError};
use helios_api::agent::{AgentCommand, AgentError, AgentReply, AgentRequest, AgentState};
use helios_api::{Epoch, InstanceName};
use helios_cluster::{Contact, Failure, InstanceView, Leased};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::LocalError;
use crate::files;
use crate::options::AgentMode;

/// Pause before an agent that ended is started again, doubled each time it ends at once.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// An agent that ran for so long had started well.
const GOOD_RUN: Duration = Duration::from_secs(10);
/// How often an agent that does not answer is tried.
const RETRY: Duration = Duration::from_millis(10);
/// How long an agent may take to end once its server has.
const EXIT_LIMIT: Duration = Duration::from_secs(35);

/// What is known of one agent.
#[derive(Debug)]
struct Known {
    state: Option<AgentState>,
    silent_since: Instant,
    /// Why its last run ended.
    ended: Option<String>,
    /// What its last command failed with.
    failed: Option<String>,
}

/// What stands in an instance's way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Trouble {
    /// Its agent ended and does not answer yet.
    #[error("its agent ended: {0}")]
    Ended(String),
    /// Its agent could not do what it was told.
    #[error("{0}")]
    Failed(String),
}

#[derive(Debug)]
struct Entry {
    config: AgentConfig,
    client: AgentClient,
    known: Mutex<Known>,
    log: PathBuf,
    /// Ends the supervision: the next end of the agent is its last.
    finish: CancellationToken,
    /// Stops an agent that runs in this process.
    stop: CancellationToken,
    done: CancellationToken,
}

/// All agents of a cluster.
#[derive(Debug)]
pub(crate) struct Agents {
    entries: BTreeMap<InstanceName, Arc<Entry>>,
    changed: Arc<Notify>,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

impl Agents {
    /// Writes each agent's configuration and starts it.
    pub(crate) fn start(
        configs: Vec<(AgentConfig, PathBuf, PathBuf)>,
        mode: &AgentMode,
        cancel: &CancellationToken,
    ) -> Result<Self, LocalError> {
        let changed = Arc::new(Notify::new());
        let tasks = TaskTracker::new();
        let mut entries = BTreeMap::new();
        for (config, file, log) in configs {
            files::write_json(&file, &config, 0o600)?;
            let entry = Arc::new(Entry {
                client: AgentClient::new(&config.control_socket),
                known: Mutex::new(Known {
                    state: None,
                    silent_since: Instant::now(),
                    ended: None,
                    failed: None,
                }),
                log,
                finish: cancel.child_token(),
                stop: cancel.child_token(),
                done: CancellationToken::new(),
                config,
            });
            let mode = mode.clone();
            tasks.spawn(supervise(Arc::clone(&entry), mode, file));
            let watcher = watch(Arc::clone(&entry), Arc::clone(&changed));
            let cancelled = cancel.clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = watcher => {}
                    () = cancelled.cancelled() => {}
                }
            });
            entries.insert(entry.config.name.clone(), entry);
        }
        tasks.close();
        Ok(Self {
            entries,
            changed,
            cancel: cancel.clone(),
            tasks,
        })
    }

    /// Wakes when a view has changed.
    pub(crate) fn changed(&self) -> Arc<Notify> {
        Arc::clone(&self.changed)
    }

    /// All instances as they are known now.
    pub(crate) fn views(&self) -> BTreeMap<InstanceName, InstanceView> {
        let view = |entry: &Entry| {
            let known = lock(&entry.known);
            let contact = match &known.state {
                Some(state) => Contact::Answers(Box::new(state.clone())),
                // Not called dead: an agent is started again at once and tells what is left.
                None => Contact::Silent {
                    for_ms: u64::try_from(known.silent_since.elapsed().as_millis())
                        .unwrap_or(u64::MAX),
                    proven_dead: false,
                },
            };
            InstanceView {
                endpoint: entry.config.unix_endpoint(),
                contact,
                // Agents of one machine hold none: it does not lose its network.
                lease: Leased::default(),
            }
        };
        self.entries
            .iter()
            .map(|(name, entry)| (name.clone(), view(entry)))
            .collect()
    }

    /// The configuration that an agent runs with.
    pub(crate) fn config(&self, name: &InstanceName) -> Option<&AgentConfig> {
        self.entries.get(name).map(|entry| &entry.config)
    }

    /// What stands in an instance's way, when something does.
    pub(crate) fn trouble(&self, name: &InstanceName) -> Option<Trouble> {
        let known = lock(&self.entries.get(name)?.known);
        let ended = known.ended.clone().filter(|_| known.state.is_none());
        let failed = || known.failed.clone().map(Trouble::Failed);
        ended.map(Trouble::Ended).or_else(failed)
    }

    /// Gives a command, waits for its end within the command's limit, and reads the state again.
    pub(crate) async fn command(
        &self,
        name: &InstanceName,
        request: AgentRequest,
    ) -> Result<AgentReply, Failure> {
        let Some(entry) = self.entries.get(name) else {
            return Err(Failure::Refused(format!("there is no instance \"{name}\"")));
        };
        let limit = limit(&request.command);
        let result = entry.client.command(request, limit).await;
        if let Ok(state) = entry.client.state().await {
            learn(entry, state, &self.changed);
        }
        // A later epoch or a cut connection says nothing of the instance.
        let failed = match &result {
            Err(ClientError::Agent(
                error @ (AgentError::Refused { .. } | AgentError::Failed { .. }),
            )) => Some(error.to_string()),
            _ => None,
        };
        lock(&entry.known).failed = failed;
        result.map_err(|error| match error {
            ClientError::Agent(AgentError::Stale { seen, .. }) => Failure::Stale { seen },
            ClientError::Agent(AgentError::Refused { reason }) => Failure::Refused(reason),
            other => Failure::Failed(other.to_string()),
        })
    }

    /// Stops one instance and its agent for good.
    pub(crate) async fn shut_down(&self, name: &InstanceName, epoch: Epoch) {
        let Some(entry) = self.entries.get(name) else {
            return;
        };
        entry.finish.cancel();
        let request = AgentRequest {
            epoch,
            command: AgentCommand::Shutdown,
        };
        if let Err(error) = self.command(name, request).await {
            tracing::debug!(instance = %name, %error, "shutdown was not confirmed");
        }
        entry.stop.cancel();
        if tokio::time::timeout(EXIT_LIMIT, entry.done.cancelled())
            .await
            .is_err()
        {
            tracing::error!(instance = %name, "agent did not end within {EXIT_LIMIT:?}");
        }
    }

    /// Ends all tasks.
    pub(crate) async fn close(&self) {
        self.cancel.cancel();
        if tokio::time::timeout(EXIT_LIMIT, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::error!("supervision did not end within {EXIT_LIMIT:?}");
        }
    }
}

fn lock(known: &Mutex<Known>) -> std::sync::MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a command may take.
fn limit(command: &AgentCommand) -> Duration {
    Duration::from_secs(match command {
        AgentCommand::Bootstrap => 180,
        AgentCommand::Survey => 610,
        AgentCommand::StartPrimary | AgentCommand::StartStandby => 310,
        AgentCommand::Follow { .. } => 6 * 3600,
        AgentCommand::Checkpoint => 120,
        AgentCommand::Fence { .. } | AgentCommand::Shutdown | AgentCommand::Configure { .. } => 30,
        AgentCommand::StopReceiver => 40,
        AgentCommand::Promote => 70,
        AgentCommand::SetSynchronous { .. } | AgentCommand::DropSlot { .. } => 15,
        // A primary waits for the answer before it lets sessions in.
        AgentCommand::WalBeyond { .. } => 2,
    })
}

/// Starts the agent again and again.
async fn supervise(entry: Arc<Entry>, mode: AgentMode, file: PathBuf) {
    let name = entry.config.name.clone();
    let mut pause = FIRST_PAUSE;
    while !entry.finish.is_cancelled() {
        let began = Instant::now();
        let ended = match &mode {
            AgentMode::InProcess => in_process(&entry).await,
            AgentMode::Process(program) => as_process(&entry, program, &file).await,
        };
        if entry.finish.is_cancelled() {
            break;
        }
        tracing::warn!(instance = %name, reason = %ended, "agent ended, starting it again");
        lock(&entry.known).ended = Some(ended);
        if began.elapsed() > GOOD_RUN {
            pause = FIRST_PAUSE;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = entry.finish.cancelled() => break,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    entry.done.cancel();
}

async fn in_process(entry: &Entry) -> String {
    // A task of its own, so that a panic of the agent is an end like any other.
    let running = tokio::spawn(helios_agent::run(entry.config.clone(), entry.stop.clone()));
    match running.await {
        Ok(Ok(())) => "it was told to".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    }
}

/// Runs the agent as a child. Its standard input is a pipe that ends with this process, however
/// this process ends.
async fn as_process(entry: &Entry, program: &PathBuf, file: &PathBuf) -> String {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&entry.log);
    let (log, errors) = match log.and_then(|log| Ok((log.try_clone()?, log))) {
        Ok(both) => both,
        Err(error) => return format!("could not open \"{}\": {error}", entry.log.display()),
    };
    let spawned = tokio::process::Command::new(program)
        .arg("agent")
        .arg("--config")
        .arg(file)
        .stdin(Stdio::piped())
        .stdout(log)
        .stderr(errors)
        // ctrl-C in a terminal is for the supervisor, which stops agents in its own order.
        .process_group(0)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return format!("could not start \"{}\": {error}", program.display()),
    };
    let stdin = child.stdin.take();
    let status = tokio::select! {
        status = child.wait() => status,
        () = entry.stop.cancelled() => {
            drop(stdin); // the agent stops its server and ends
            match tokio::time::timeout(EXIT_LIMIT, child.wait()).await {
                Ok(status) => status,
                Err(_) => {
                    let _ = child.start_kill();
                    child.wait().await
                }
            }
        }
    };
    match status {
        Ok(status) => format!("{status}; {}", files::tail(&entry.log, 3)),
        Err(error) => error.to_string(),
    }
}

/// Follows what the agent reports.
async fn watch(entry: Arc<Entry>, changed: Arc<Notify>) {
    loop {
        let seen = lock(&entry.known)
            .state
            .as_ref()
            .map(|state| state.revision);
        let answer = match seen {
            Some(revision) => entry.client.watch(revision).await,
            None => entry.client.state().await,
        };
        match answer {
            Ok(state) => learn(&entry, state, &changed),
            Err(_) => {
                let news = {
                    let mut known = lock(&entry.known);
                    if known.state.is_some() {
                        known.silent_since = Instant::now();
                    }
                    known.state.take().is_some()
                };
                if news {
                    changed.notify_one();
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Takes a report, unless a newer one is known.
fn learn(entry: &Entry, state: AgentState, changed: &Notify) {
    let mut known = lock(&entry.known);
    // A restarted agent counts from 1 again; its silence in between has emptied the view.
    let newer = known
        .state
        .as_ref()
        .is_none_or(|old| state.revision > old.revision);
    if newer {
        known.state = Some(state);
        known.ended = None;
        drop(known);
        changed.notify_one();
    }
}
