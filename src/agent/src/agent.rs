//! The agent's loop: takes commands one at a time, watches the postmaster, ends in an orderly way.
//!
//! A command that is already running is not run twice: the same request joins it. A fence, a
//! shutdown or a command of a later epoch overtakes one that takes its time (a clone); the
//! overtaken command's work is dropped at the point it had reached, which every step allows for.

use std::collections::VecDeque;
use std::fs::File;
use std::time::Duration;

use helios_api::agent::{
    AgentCommand, AgentError, AgentReply, AgentRequest, AgentState, InstanceState,
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::durable::Store;
use crate::error::failed;
use crate::hub::Hub;
use crate::instance::Instance;
use crate::lease::Lease;
use crate::server::{self, Job};
use crate::{AgentConfig, AgentFailure};

/// Commands that may wait for the one that runs.
const QUEUE_LIMIT: usize = 16;
/// How often an agent without a command looks after its standby.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a stopping agent gives PostgreSQL for a fast shutdown before it kills it.
const EXIT_LIMIT: Duration = Duration::from_secs(20);
/// How long a primary that is to end waits for its replacement. With the limit above it stays
/// within what a Pod is given to stop.
const HAND_OVER_LIMIT: Duration = Duration::from_secs(20);
/// How long it answers after it has been replaced.
const LINGER: Duration = Duration::from_secs(1);

type Reply = Result<AgentReply, AgentError>;

/// Runs the agent until it is cancelled, told to shut down, or (with `parent_watch`) its standard
/// input ends. PostgreSQL is stopped before it returns.
///
/// # Errors
///
/// The configuration is wrong, another agent is in charge of the instance, or a file that the
/// agent cannot do without fails it. A postmaster left running by an agent that was killed is
/// taken over, or, if it is fenced, killed.
pub async fn run(config: AgentConfig, cancel: CancellationToken) -> Result<(), AgentFailure> {
    config.validate()?;
    std::fs::create_dir_all(config.home())
        .map_err(|e| AgentFailure::file("could not create folder", config.home(), e))?;
    let _lock = lock(&config)?;
    let store = Store::open(config.state_file())?;
    let hub = Hub::new(config.name.clone());
    let parent_gone = watch_parent(config.parent_watch);
    let socket = config.control_socket.clone();
    let lease = Lease::new(&config);
    lease.guard()?;
    let mut instance = Instance::open(config, store, hub.clone(), lease.clone()).await?;

    let listener = server::bind(&socket)?;
    let (jobs, inbox) = mpsc::channel(QUEUE_LIMIT);
    let stop_server = CancellationToken::new();
    let router = server::router(hub.clone(), jobs, lease);
    if let Some(network) = &instance.config.network {
        server::serve_network(network, hub, router.clone(), stop_server.clone()).await?;
    }
    let server = tokio::spawn(server::serve(listener, router, stop_server.clone()));
    // Only somebody on the network can let another instance take over.
    let patient = instance.config.network.is_some();
    let stop = CancellationToken::new();
    let watcher = tokio::spawn({
        let (stop, hub) = (stop.clone(), instance.hub.clone());
        async move {
            tokio::select! {
                Ok(()) = parent_gone => tracing::info!("parent process has gone, stopping"),
                () = cancel.cancelled() => {}
            }
            hub.leave();
            if patient {
                hand_over(&hub).await;
            }
            stop.cancel();
        }
    });
    Loop::new(&mut instance, inbox, stop).work().await;
    watcher.abort();
    instance.stop_for_exit(EXIT_LIMIT).await;
    stop_server.cancel();
    let _ = server.await;
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

/// A primary that is to end goes on until another one is to take its place, for a while; its files
/// can be asked for what they hold for a moment longer. Without a standby there is nobody to wait
/// for: so it is when the whole cluster is deleted.
async fn hand_over(hub: &Hub) {
    let serves = |state: &AgentState| match &state.instance {
        InstanceState::Primary { standbys, .. } => !standbys.is_empty(),
        _ => false,
    };
    if serves(&hub.state()) {
        let handed = tokio::time::timeout(HAND_OVER_LIMIT, hub.until(|s| !serves(s))).await;
        match handed {
            Ok(()) => tokio::time::sleep(LINGER).await,
            Err(_) => tracing::warn!("nobody took over within {HAND_OVER_LIMIT:?}, stopping"),
        }
    }
}

/// Takes the instance's lock, held until this process ends.
fn lock(config: &AgentConfig) -> Result<File, AgentFailure> {
    let path = config.lock_file();
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| AgentFailure::file("could not open lock file", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            Err(AgentFailure::AlreadyRunning(config.data_dir.clone()))
        }
        Err(std::fs::TryLockError::Error(e)) => Err(AgentFailure::file("could not lock", &path, e)),
    }
}

/// Resolves when the standard input ends. A plain thread: the runtime would wait for a read that
/// never comes back, a detached thread is simply left.
fn watch_parent(wanted: bool) -> oneshot::Receiver<()> {
    let (sender, receiver) = oneshot::channel();
    if wanted {
        let spawned = std::thread::Builder::new()
            .name("parent-watch".to_owned())
            .spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
                let _ = sender.send(());
            });
        if let Err(error) = spawned {
            tracing::error!(%error, "could not watch the parent process");
        }
    }
    receiver
}

/// What ended the wait for a running command.
enum Outcome {
    Finished(Reply),
    Overtaken,
    Stopped,
}

struct Loop<'a> {
    instance: &'a mut Instance,
    inbox: mpsc::Receiver<Job>,
    waiting: VecDeque<Job>,
    stop: CancellationToken,
}

impl<'a> Loop<'a> {
    fn new(
        instance: &'a mut Instance,
        inbox: mpsc::Receiver<Job>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            instance,
            inbox,
            waiting: VecDeque::new(),
            stop,
        }
    }

    async fn work(mut self) {
        while let Some(job) = self.next().await {
            let shutdown = job.request.command == AgentCommand::Shutdown;
            if !self.perform(job).await || shutdown {
                return;
            }
        }
    }

    /// The next command; deals with the postmaster's end in the meantime.
    async fn next(&mut self) -> Option<Job> {
        loop {
            if let Some(job) = self.waiting.pop_front() {
                return Some(job);
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                () = self.instance.postmaster_gone() => self.instance.clean_up_crash().await,
                job = self.inbox.recv() => return job,
                () = self.instance.burial() => {
                    if let Err(error) = self.instance.bury_some().await {
                        tracing::error!(%error, "could not kill what a fence has stopped");
                    }
                }
                () = tokio::time::sleep(LOOK_INTERVAL) => {
                    self.instance.hush();
                    self.instance.renew_certificates();
                }
            }
        }
    }

    /// Runs one command and answers everybody who gave it. `false`: the agent is to stop.
    async fn perform(&mut self, job: Job) -> bool {
        let Job { request, reply } = job;
        let mut askers = vec![reply];
        let outcome = {
            let work = self.instance.execute(request.clone());
            tokio::pin!(work);
            loop {
                tokio::select! {
                    biased;
                    () = self.stop.cancelled() => break Outcome::Stopped,
                    result = &mut work => break Outcome::Finished(result),
                    Some(job) = self.inbox.recv(), if self.waiting.len() < QUEUE_LIMIT => {
                        if job.request == request {
                            askers.push(job.reply);
                            continue;
                        }
                        let overtakes = overtakes(&job.request, &request);
                        if overtakes {
                            self.waiting.push_front(job);
                            break Outcome::Overtaken;
                        }
                        self.waiting.push_back(job);
                    }
                }
            }
        };
        let (result, go_on) = match outcome {
            Outcome::Finished(result) => (result, true),
            Outcome::Overtaken => (Err(failed("overtaken by a later command")), true),
            Outcome::Stopped => (Err(failed("the agent is stopping")), false),
        };
        if let Err(error) = &result {
            tracing::warn!(command = ?request.command, %error, "command failed");
        }
        for asker in askers {
            // Whoever asked may have gone; the command counts all the same.
            let _ = asker.send(result.clone());
        }
        go_on
    }
}

/// Whether `next` may not wait for `running` to end.
fn overtakes(next: &AgentRequest, running: &AgentRequest) -> bool {
    if next.epoch < running.epoch {
        return false;
    }
    match (&next.command, &running.command) {
        (_, AgentCommand::Fence { .. } | AgentCommand::Shutdown) => false,
        (AgentCommand::Fence { .. } | AgentCommand::Shutdown, _) => true,
        // A promotion is over in a moment and is better known done than cut off.
        (_, AgentCommand::Promote) => false,
        _ => next.epoch > running.epoch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use helios_api::Epoch;
    use helios_api::agent::StopMode;

    fn request(epoch: u64, command: AgentCommand) -> AgentRequest {
        AgentRequest {
            epoch: Epoch(epoch),
            command,
        }
    }

    #[test]
    fn fences_and_later_epochs_overtake() {
        let fence = AgentCommand::Fence {
            mode: StopMode::Fast,
        };
        let table = [
            (2, fence.clone(), 2, AgentCommand::Bootstrap, true),
            (1, fence.clone(), 2, AgentCommand::Bootstrap, false),
            (2, AgentCommand::Shutdown, 2, AgentCommand::Promote, true),
            (3, AgentCommand::Checkpoint, 2, AgentCommand::Promote, false),
            (
                3,
                AgentCommand::Checkpoint,
                2,
                AgentCommand::Bootstrap,
                true,
            ),
            (
                2,
                AgentCommand::Checkpoint,
                2,
                AgentCommand::Bootstrap,
                false,
            ),
            (3, fence.clone(), 2, fence, false),
        ];
        for (next_epoch, next, epoch, running, expected) in table {
            let next = request(next_epoch, next);
            let running = request(epoch, running);
            assert_eq!(overtakes(&next, &running), expected, "{next:?} {running:?}");
        }
    }
}
