//! What is known of each agent, and orders to it.
//!
//! Invariant: a view is never older than the last command's result that was handed on
//! ([`Agents::command`] reads the state again before it returns).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use helios_agent::client::{AgentClient, ClientError};
use helios_api::agent::{
    AgentCommand, AgentError, AgentReply, AgentRequest, AgentState, InstanceState,
};
use helios_api::v1alpha1::names;
use helios_api::{Endpoint, Host, InstanceName, Lsn};
use helios_cluster::{Contact, Failure, InstanceView, Leased};
use helios_control::{ControlClient, Live};
use tokio::sync::{Notify, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::lease::{self, Duty};
use crate::OperatorError;

/// How often an agent that does not answer is tried.
const RETRY: Duration = Duration::from_millis(100);

/// So many refusals in a row, [`RETRY`] apart, say that nobody has an agent's port.
const REFUSALS: u32 = 2;

/// A standby hears nothing more from its primary so long before that one's agent is silent, at most.
const DEAF_BEFORE: Duration = Duration::from_secs(2);

/// Whether an agent's control port is closed. All processes of its server have it, too, so the
/// kernel refuses connections only when none of them is left. What answered, or ended a connection,
/// a moment ago and is refused now has been closed; behind a timeout it may be another machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Port {
    /// Nothing is known.
    #[default]
    Unknown,
    /// It answered last.
    Answered,
    /// So often in a row it has refused.
    Refuses(u32),
}

impl Port {
    fn after(self, error: &ClientError) -> Self {
        match (self, error) {
            (Self::Answered, ClientError::Refused { .. }) => Self::Refuses(1),
            (Self::Refuses(times), ClientError::Refused { .. }) => {
                Self::Refuses(times.saturating_add(1))
            }
            (Self::Answered, ClientError::Broken { .. }) => self,
            _ => Self::Unknown,
        }
    }

    fn is_closed(self) -> bool {
        matches!(self, Self::Refuses(REFUSALS..))
    }
}

/// Where an instance's Pod is, as the API server says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) ip: Option<IpAddr>,
    /// Whether the kubelet says that its container has ended.
    pub(super) ended: bool,
}

#[derive(Debug)]
pub(super) struct Known {
    pub(super) state: Option<AgentState>,
    pub(super) silent_since: Instant,
    /// When a grant of the lease was last sent, or when this began: a predecessor may have sent one.
    pub(super) granted: Instant,
    /// The terms that it holds itself to.
    pub(super) version: Option<u64>,
    /// What a standby was last seen to have received, and when that was new.
    received: (Option<Lsn>, Instant),
    /// Whether it was asked to the end once: before, its silence means nothing.
    asked: bool,
    port: Port,
    /// Its last word was that it is a primary.
    leads: bool,
    /// Since when it is a standby that hears nothing from its primary.
    deaf_since: Option<Instant>,
}

impl Known {
    fn nothing() -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            state: None,
            silent_since: Instant::now(),
            granted: Instant::now(),
            version: None,
            received: (None, Instant::now()),
            asked: false,
            port: Port::default(),
            leads: false,
            deaf_since: None,
        }))
    }
}

impl Known {
    /// A primary of which no process is left: nobody has its port any more, and a standby (`deaf`:
    /// since when each) lost its connection to it at the same time.
    fn has_died(&self, deaf: &[Instant]) -> bool {
        let at_once = |since: &Instant| *since + DEAF_BEFORE >= self.silent_since;
        self.leads && self.port.is_closed() && deaf.iter().any(at_once)
    }
}

#[derive(Debug)]
struct Entry {
    place: Place,
    endpoint: Endpoint,
    known: Arc<Mutex<Known>>,
    client: Option<AgentClient>,
    /// What it is granted.
    duty: watch::Sender<Option<Duty>>,
    /// Ends the watch of an address that is no longer the instance's.
    watch: Option<DropGuard>,
}

/// All agents of a cluster.
#[derive(Debug, Default)]
pub(super) struct Agents {
    entries: BTreeMap<InstanceName, Entry>,
}

impl Agents {
    /// Takes note of where an instance is now.
    pub(super) fn place(
        &mut self,
        name: &InstanceName,
        place: Place,
        certificates: &Live,
        changed: &Arc<Notify>,
    ) -> Result<(), OperatorError> {
        let entry = self.entries.entry(name.clone()).or_insert_with(|| Entry {
            place: Place {
                ip: None,
                ended: false,
            },
            // Until it has an address nobody connects to it.
            endpoint: endpoint(IpAddr::from([0, 0, 0, 0])),
            known: Known::nothing(),
            client: None,
            duty: watch::Sender::new(None),
            watch: None,
        });
        let moved = entry.place.ip != place.ip;
        entry.place = place;
        // A Pod that is gone from the API server may still be ending, and tells what its agent can;
        // the instance's name in its certificate keeps a stranger at its address out.
        if !moved || place.ip.is_none() {
            return Ok(());
        }
        entry.watch = None;
        entry.client = None;
        entry.known = Known::nothing();
        let Some(ip) = place.ip else {
            return Ok(());
        };
        entry.endpoint = endpoint(ip);
        let address = SocketAddr::new(ip, names::CONTROL_PORT);
        let client = AgentClient::over(ControlClient::new(address, name.as_str(), certificates)?);
        entry.client = Some(client.clone());
        let stop = CancellationToken::new();
        entry.watch = Some(stop.clone().drop_guard());
        let (known, changed) = (Arc::clone(&entry.known), Arc::clone(changed));
        let duty = entry.duty.subscribe();
        tokio::spawn(async move {
            let both = async {
                tokio::join!(
                    follow(client.clone(), Arc::clone(&known), Arc::clone(&changed)),
                    lease::renew(client, known, duty, changed)
                )
            };
            tokio::select! {
                _ = both => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(())
    }

    /// Forgets instances that are gone for good.
    pub(super) fn retain(&mut self, names: &BTreeSet<InstanceName>) {
        self.entries.retain(|name, _| names.contains(name));
    }

    /// All instances as they are known now.
    pub(super) fn views(&self) -> BTreeMap<InstanceName, InstanceView> {
        let deaf: Vec<Instant> = self
            .entries
            .values()
            .filter_map(|entry| lock(&entry.known).deaf_since)
            .collect();
        let view = |entry: &Entry| {
            let known = lock(&entry.known);
            let contact = match &known.state {
                Some(state) => Contact::Answers(Box::new(state.clone())),
                None => Contact::Silent {
                    for_ms: millis(known.silent_since.elapsed()),
                    // The first process of its container ends only with all others.
                    proven_dead: entry.place.ended || known.has_died(&deaf),
                },
            };
            InstanceView {
                endpoint: entry.endpoint.clone(),
                contact,
                lease: Leased {
                    version: known.version,
                    ungranted_ms: millis(known.granted.elapsed()),
                    quiet_ms: millis(known.received.1.elapsed()),
                },
            }
        };
        self.entries
            .iter()
            .map(|(name, entry)| (name.clone(), view(entry)))
            .collect()
    }

    /// Grants the lease to one of them, or to nobody.
    pub(super) fn grant(&self, to: Option<(InstanceName, Duty)>) {
        for (name, entry) in &self.entries {
            let duty = to.as_ref().filter(|(holder, _)| holder == name);
            let duty = duty.map(|(_, duty)| duty.clone());
            entry.duty.send_if_modified(|now| {
                let changed = *now != duty;
                *now = duty;
                changed
            });
        }
    }

    /// Whether each that has a Pod has answered or failed to.
    pub(super) fn asked(&self) -> bool {
        let asked = |entry: &Entry| entry.client.is_none() || lock(&entry.known).asked;
        self.entries.values().all(asked)
    }

    /// Where an instance's server listens.
    pub(super) fn endpoint(&self, name: &InstanceName) -> Option<Endpoint> {
        let entry = self.entries.get(name)?;
        entry.place.ip.map(|_| entry.endpoint.clone())
    }

    /// Gives a command within its limit, and reads the state again.
    pub(super) fn command(
        &self,
        name: &InstanceName,
        request: AgentRequest,
        changed: &Arc<Notify>,
    ) -> impl Future<Output = Result<AgentReply, Failure>> + Send + use<> {
        let way = self
            .entries
            .get(name)
            .and_then(|e| Some((e.client.clone()?, Arc::clone(&e.known))));
        let (name, changed) = (name.clone(), Arc::clone(changed));
        async move {
            let Some((client, known)) = way else {
                return Err(Failure::Failed(format!("\"{name}\" has no Pod")));
            };
            let limit = limit(&request.command);
            let result = client.command(request, limit).await;
            if let Ok(state) = client.state().await {
                learn(&known, state, &changed);
            }
            result.map_err(|error| match error {
                ClientError::Agent(AgentError::Stale { seen, .. }) => Failure::Stale { seen },
                ClientError::Agent(AgentError::Refused { reason }) => Failure::Refused(reason),
                other => Failure::Failed(other.to_string()),
            })
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn endpoint(ip: IpAddr) -> Endpoint {
    Endpoint {
        host: Host::Tcp(ip.to_string()),
        port: names::POSTGRES_PORT,
    }
}

pub(super) fn lock(known: &Mutex<Known>) -> std::sync::MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a command may take.
fn limit(command: &AgentCommand) -> Duration {
    Duration::from_secs(match command {
        AgentCommand::StartPrimary | AgentCommand::StartStandby => 310,
        AgentCommand::Survey => 610,
        // They may copy a whole server.
        AgentCommand::Bootstrap | AgentCommand::Follow { .. } => 6 * 3600,
        AgentCommand::Checkpoint => 120,
        AgentCommand::Fence { .. } | AgentCommand::Shutdown | AgentCommand::Configure { .. } => 30,
        AgentCommand::StopReceiver => 40,
        AgentCommand::Promote => 70,
        AgentCommand::SetSynchronous { .. } | AgentCommand::DropSlot { .. } => 15,
        // A primary waits for the answer before it lets sessions in.
        AgentCommand::WalBeyond { .. } => 2,
    })
}

/// Follows what the agent reports.
async fn follow(client: AgentClient, known: Arc<Mutex<Known>>, changed: Arc<Notify>) {
    loop {
        let seen = lock(&known).state.as_ref().map(|state| state.revision);
        let answer = match seen {
            Some(revision) => client.watch(revision).await,
            None => client.state().await,
        };
        match answer {
            Ok(state) => learn(&known, state, &changed),
            Err(error) => {
                let news = {
                    let mut known = lock(&known);
                    let first = !std::mem::replace(&mut known.asked, true);
                    if known.state.is_some() {
                        known.silent_since = Instant::now();
                    }
                    let closed = known.port.is_closed();
                    known.port = known.port.after(&error);
                    known.state.take().is_some() || first || closed != known.port.is_closed()
                };
                if news {
                    tracing::info!(%error, "agent does not answer");
                    changed.notify_one();
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Takes a report, unless a newer one is known.
pub(super) fn learn(known: &Mutex<Known>, state: AgentState, changed: &Notify) {
    let mut known = lock(known);
    known.port = Port::Answered;
    known.leads = matches!(state.instance, InstanceState::Primary { .. });
    let received = match &state.instance {
        InstanceState::Standby {
            received, heard_ms, ..
        } => {
            let since = known.deaf_since.unwrap_or_else(Instant::now);
            known.deaf_since = heard_ms.is_none().then_some(since);
            Some(*received)
        }
        _ => {
            known.deaf_since = None;
            None
        }
    };
    if received != known.received.0 {
        known.received = (received, Instant::now());
    }
    // A restarted agent counts from its time of start.
    let newer = known
        .state
        .as_ref()
        .is_none_or(|old| state.revision > old.revision);
    if newer {
        known.asked = true;
        known.state = Some(state);
        drop(known);
        changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(kind: &str) -> ClientError {
        let at = "10.0.0.1:1".to_owned();
        let why = "as it happens".to_owned();
        match kind {
            "refused" => ClientError::Refused { at },
            "broken" => ClientError::Broken { at, why },
            "unreachable" => ClientError::Unreachable { at, why },
            _ => ClientError::Timeout {
                at,
                limit: Duration::from_secs(1),
            },
        }
    }

    fn after(answered: bool, kinds: &[&str]) -> Port {
        let first = if answered {
            Port::Answered
        } else {
            Port::Unknown
        };
        let next = |port: Port, kind: &&str| port.after(&error(kind));
        kinds.iter().fold(first, next)
    }

    #[test]
    fn a_port_is_closed_when_it_refuses_twice_behind_an_answer() {
        for (answered, kinds, closed) in [
            (true, &["refused", "refused"][..], true),
            (true, &["broken", "refused", "refused", "refused"], true),
            (true, &["refused"], false),
            (true, &["broken", "broken"], false),
            // Nobody knows what happened meanwhile: another machine may have the address.
            (true, &["timeout", "refused", "refused"], false),
            (true, &["unreachable", "refused", "refused"], false),
            (true, &["refused", "timeout", "refused", "refused"], false),
            (true, &["refused", "broken", "refused", "refused"], false),
            (false, &["refused", "refused"], false),
            (false, &["broken", "refused", "refused"], false),
        ] {
            assert_eq!(after(answered, kinds).is_closed(), closed, "{kinds:?}");
        }
    }

    #[test]
    fn a_primary_has_died_when_a_standby_lost_it_at_the_same_time() {
        let silent_since = Instant::now() + Duration::from_secs(3600);
        let known = |leads, port| Known {
            state: None,
            silent_since,
            granted: silent_since,
            version: None,
            received: (None, silent_since),
            asked: true,
            port,
            leads,
            deaf_since: None,
        };
        let closed = Port::Refuses(REFUSALS);
        let then = silent_since + Duration::from_millis(200);
        let long_ago = silent_since - Duration::from_secs(60);
        assert!(known(true, closed).has_died(&[long_ago, then]));
        assert!(known(true, closed).has_died(&[silent_since]));
        // The way from here alone may be closed, or nobody else looks.
        assert!(!known(true, closed).has_died(&[long_ago]));
        assert!(!known(true, closed).has_died(&[]));
        assert!(!known(false, closed).has_died(&[then]));
        assert!(!known(true, Port::Refuses(1)).has_died(&[then]));
    }
}
