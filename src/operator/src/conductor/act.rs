//! Carries actions out, each in a task of its own, and hands their results back.

use std::sync::Arc;

use helios_api::{Endpoint, InstanceName};
use helios_cluster::{Action, Failure, Finished, ProxyCommand, Reply};
use tokio::sync::{Mutex, Notify, mpsc};
use tokio_postgres::Client;

use super::agents::Agents;
use super::proxies::{Proxies, Way};
use super::together::Together;
use super::{Input, sql};
use crate::secret::Secrets;

/// A primary, and where it listens.
pub(super) type At = (InstanceName, Endpoint);

#[derive(Debug)]
pub(super) struct Actor {
    done: mpsc::Sender<Finished>,
    /// A connection to the primary that was made before anybody is held.
    flush: Arc<Mutex<Option<Client>>>,
}

impl Actor {
    pub(super) fn new(done: mpsc::Sender<Finished>) -> Self {
        Self {
            done,
            flush: Arc::default(),
        }
    }

    /// Begins an action.
    pub(super) fn start(
        &self,
        input: &Input,
        (agents, changed): (&Agents, &Arc<Notify>),
        proxies: &Proxies,
        primary: Option<At>,
        action: Action,
    ) {
        let done = self.done.clone();
        match &action {
            Action::Agent { instance, request } => {
                let command = agents.command(instance, request.clone(), changed);
                tokio::spawn(async move {
                    let result = command.await.map(Reply::Agent);
                    // Nobody listens any more when the conductor has ended.
                    let _ = done.send(Finished { action, result }).await;
                });
            }
            Action::Proxy { proxy, command } => {
                let (way, command) = (proxies.way(proxy), command.clone());
                let missing = format!("proxy \"{proxy}\" is gone");
                let order = Order {
                    command,
                    flush: Arc::clone(&self.flush),
                    primary,
                    secrets: Arc::clone(&input.secrets),
                };
                tokio::spawn(async move {
                    let result = match way {
                        Some(way) => order.carry_out(&way).await,
                        None => Err(Failure::Failed(missing)),
                    };
                    let _ = done.send(Finished { action, result }).await;
                });
            }
        }
    }

    /// Takes proxies through the barrier.
    pub(super) fn go_on(&self, together: Together) {
        tokio::spawn(together.run(self.done.clone()));
    }
}

struct Order {
    command: ProxyCommand,
    flush: Arc<Mutex<Option<Client>>>,
    primary: Option<At>,
    secrets: Arc<Secrets>,
}

impl Order {
    /// A drain is answered only when a commit behind everything that was committed is confirmed:
    /// sessions may have committed with `synchronous_commit = off`, and the primary may be stopped
    /// at once afterwards.
    async fn carry_out(&self, way: &Way) -> Result<Reply, Failure> {
        match &self.command {
            ProxyCommand::Prepare { .. } => {
                let connect = async {
                    if let Some(primary) = &self.primary
                        && let Ok(client) = sql::connect(primary, &self.secrets).await
                    {
                        *self.flush.lock().await = Some(client);
                    }
                };
                tokio::join!(way.order(&self.command), connect).0
            }
            ProxyCommand::Drain(_) => {
                let reply = way.order(&self.command).await?;
                if let Some(primary) = &self.primary {
                    self.last_commit(primary).await?;
                }
                Ok(reply)
            }
            ProxyCommand::Resume(_)
            | ProxyCommand::Together { .. }
            | ProxyCommand::Join(_)
            | ProxyCommand::Abort { .. } => way.order(&self.command).await,
        }
    }

    async fn last_commit(&self, primary: &At) -> Result<(), Failure> {
        let ready = self.flush.lock().await.take().filter(|c| !c.is_closed());
        let commit = async {
            let client = match ready {
                Some(client) => client,
                None => sql::connect(primary, &self.secrets).await?,
            };
            sql::last_commit(&client).await
        };
        commit
            .await
            .map_err(|error| Failure::Failed(error.to_string()))
    }
}
