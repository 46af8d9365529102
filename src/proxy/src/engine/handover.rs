//! A session goes to another process, with both its sockets.
//!
//! A session that stands outside a transaction makes a parcel of itself and waits, reading nothing,
//! until it hears what became of the parcel. The invariant: exactly one process reads a client's or
//! a backend's socket; what the other one would not know keeps a session here.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use helios_api::{Epoch, Lsn, SessionId};
use helios_session::TxnStatus;
use helios_session::evidence::GtidSource;
use helios_session::state::Snapshot;
use helios_session::tracker::{Carried, Tracker};
use helios_wire::scram::ScramKeys;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::begin::{Beginning, Permits};
use super::events::Moving;
use super::gate::{Ending, Phase};
use super::link::{Link, WHOLE};
use super::registry::{CancelKey, Identity, lock};
use super::session::{End, Server, Session};
use super::shared::Shared;
use super::tables::Rows;
use crate::backend::{Credentials, Login};
use crate::stream::{Detached, Kind, Stream};

/// Cancel requests that wait to be sent to the process that may know their session.
const MAX_CANCELS: usize = 64;

/// What became of a parcel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The other process has the session.
    Taken,
    /// It has not, and never will have.
    Stays,
}

/// A session on its way, with what it waits for.
#[derive(Debug)]
pub(crate) struct Offer {
    pub(crate) parcel: Parcel,
    pub(crate) verdict: oneshot::Sender<Verdict>,
}

/// A session between two processes.
#[derive(Debug)]
pub(crate) struct Parcel {
    pub(crate) card: Box<Card>,
    pub(crate) client: OwnedFd,
    pub(crate) server: OwnedFd,
}

/// What is to be known of a session, beside its sockets.
#[derive(Serialize, Deserialize)]
pub(crate) struct Card {
    pub(crate) session: u64,
    key: (i32, Vec<u8>),
    pub(crate) user: String,
    database: String,
    params: Vec<(String, String)>,
    /// ClientKey, StoredKey and ServerKey.
    keys: Option<[[u8; 32]; 3]>,
    peer: String,
    kinds: (Kind, Kind),
    /// What the client has sent of a message that is not whole.
    input: Vec<u8>,
    pid: i32,
    secret: Vec<u8>,
    parameters: BTreeMap<String, String>,
    floor: Option<u64>,
    log_floor: Option<u64>,
    began: Option<String>,
    epoch: Epoch,
    known: BTreeMap<String, String>,
    tracker: Carried,
    state: Snapshot,
    wants_rows: bool,
    idle_ms: u64,
    migrations: u64,
}

impl std::fmt::Debug for Card {
    /// Without its secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Card({})", self.session)
    }
}

/// A session that has arrived.
#[derive(Debug)]
pub(crate) struct Arrived {
    card: Box<Card>,
    client: Detached,
    server: Detached,
    tracker: Tracker,
    permits: Permits,
}

/// Cancel requests for another process.
pub(crate) type Cancels = mpsc::Receiver<(CancelKey, Stream)>;

/// The processes before and behind this one.
#[derive(Debug, Default)]
pub(crate) struct Kin {
    number: AtomicU64,
    successor: std::sync::Mutex<Option<mpsc::Sender<Offer>>>,
    predecessor: std::sync::Mutex<Option<mpsc::Sender<(CancelKey, Stream)>>>,
}

impl Kin {
    /// A successor is there; sessions send their parcels here.
    pub(crate) fn begin(&self) -> mpsc::Receiver<Offer> {
        self.number.fetch_add(1, Ordering::SeqCst);
        let (to, offers) = mpsc::channel(1);
        *lock(&self.successor) = Some(to);
        offers
    }

    /// It takes no more.
    pub(crate) fn end(&self) {
        *lock(&self.successor) = None;
    }

    /// A predecessor has sessions that clients may want to cancel.
    pub(crate) fn follow(&self) -> Cancels {
        let (to, cancels) = mpsc::channel(MAX_CANCELS);
        *lock(&self.predecessor) = Some(to);
        cancels
    }

    /// It has none any more.
    pub(crate) fn forget(&self) {
        *lock(&self.predecessor) = None;
    }

    /// Passes on a cancel request whose key is not known here; too many are dropped, as those with
    /// a wrong key are.
    pub(crate) fn pass_on(&self, key: CancelKey, stream: Stream) {
        if let Some(to) = &*lock(&self.predecessor) {
            let _ = to.try_send((key, stream));
        }
    }
}

impl Session {
    /// Whether another process is to have the session, and it stands where that can be; on the way
    /// to sleep, where nothing that has come is left to be moved.
    pub(super) fn goes_over(&self) -> bool {
        self.shared.gate.ending() == Ending::HandOver && self.may_go_over()
    }

    fn may_go_over(&self) -> bool {
        let number = self.shared.kin.number.load(Ordering::SeqCst);
        let entry = self.entry();
        let Some(server) = &self.server else {
            return false;
        };
        let (client, link) = (&self.client, &server.link);
        let outside = self.tracker.status() == TxnStatus::Idle
            && self.tracker.is_between()
            && self.tracker.is_quiet()
            && self.gate.phase == Phase::Open;
        let nothing_under_way = client.output.is_empty()
            && client.passing == 0
            && !client.ended
            && link.input.is_empty()
            && link.output.is_empty()
            && link.passing == 0
            && !link.ended;
        outside
            && nothing_under_way
            && entry.refused.load(Ordering::Relaxed) != number
            && !entry.cancel.load(Ordering::SeqCst)
            && !entry.cancel_under_way.load(Ordering::SeqCst)
            && self.is_plain()
    }

    /// Nothing is noted that would be gone with this process.
    fn is_plain(&self) -> bool {
        let moves = self.moving != Moving::No
            || self.moved_by_gate()
            || self.rebuilt
            || self.stays
            || self.resend.is_some()
            || self.resend_left > 0
            || self.lost.is_some()
            || self.last_words.is_some();
        let owes = self.asking.is_some()
            || self.state_due
            || self.skip.is_some()
            || self.instead.is_some()
            || self.refuse.is_some()
            || self.forced.is_some()
            || self.discarding
            || self.dropping_rest
            || self.cancel_waits
            || self.cut;
        !moves && !owes && self.temporary.is_none()
    }

    /// Offers the session to the other process, and waits for what becomes of it; nothing is read
    /// meanwhile.
    pub(super) async fn hand_over(&mut self) -> Result<(), End> {
        let number = self.shared.kin.number.load(Ordering::SeqCst);
        let to = lock(&self.shared.kin.successor).clone();
        let verdict = match (to, self.parcel()) {
            (Some(to), Some(parcel)) => {
                let (verdict, answer) = oneshot::channel();
                match to.send(Offer { parcel, verdict }).await {
                    Ok(()) => answer.await.unwrap_or(Verdict::Stays),
                    Err(_) => Verdict::Stays,
                }
            }
            _ => Verdict::Stays,
        };
        match verdict {
            Verdict::Taken => Err(End::HandedOver),
            Verdict::Stays => {
                self.entry().refused.store(number, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    /// The session, packed; `None` where it has to stay.
    fn parcel(&self) -> Option<Parcel> {
        let server = self.server.as_ref()?;
        let (of_client, client) = self.client.stream.plain()?;
        let (of_server, at_server) = server.link.stream.plain()?;
        if self.client.input.len() > WHOLE || server.epoch != self.gate.topology.epoch {
            return None;
        }
        let entry = self.entry();
        let Login {
            user,
            database,
            params,
            credentials,
        } = entry.login.clone();
        let keys = match &credentials {
            Credentials::None => None,
            Credentials::Scram(keys) => Some([keys.client_key, keys.stored_key, keys.server_key]),
            Credentials::Password(_) => return None,
        };
        let identity = lock(&entry.identity).clone();
        let card = Card {
            session: entry.id.0,
            key: (entry.key.pid, entry.key.secret.clone()),
            user,
            database,
            params,
            keys,
            peer: entry.peer.clone(),
            kinds: (of_client, of_server),
            input: self.client.input.to_vec(),
            pid: server.pid,
            secret: server.secret.to_vec(),
            parameters: server.link.parameters.clone(),
            floor: server.floor.map(|lsn| lsn.0),
            log_floor: identity.floor.map(|lsn| lsn.0),
            began: identity.started.filter(|_| identity.pid == server.pid),
            epoch: server.epoch,
            known: self.known.clone(),
            tracker: self.tracker.carried()?,
            state: self.state.clone(),
            wants_rows: self.rows.carried()?,
            idle_ms: u64::try_from(self.last_activity.elapsed().as_millis()).unwrap_or(0),
            migrations: lock(&entry.shown).migrations,
        };
        Some(Parcel {
            card: Box::new(card),
            client: client.try_clone_to_owned().ok()?,
            server: at_server.try_clone_to_owned().ok()?,
        })
    }
}

impl Arrived {
    /// Unpacks a session, for which there are places.
    ///
    /// # Errors
    /// Why it cannot go on here.
    pub(crate) fn new(parcel: Parcel, shared: &Shared, permits: Permits) -> Result<Self, String> {
        let Parcel {
            card,
            client,
            server,
        } = parcel;
        let epoch = shared.gate.now().topology.epoch;
        if card.epoch != epoch {
            return Err(format!("it is of epoch {}, not {epoch}", card.epoch));
        }
        let ids = GtidSource::new(rand::random());
        let tracker = Tracker::taken_over(shared.options.mode, ids, card.tracker.clone());
        let received = |kind, socket| Detached::received(kind, socket).map_err(|e| e.to_string());
        Ok(Self {
            client: received(card.kinds.0, client)?,
            server: received(card.kinds.1, server)?,
            tracker: tracker.ok_or("its prepared statements make no sense")?,
            card,
            permits,
        })
    }

    /// Runs the session to its end, from when it is told to: the other process does not read any
    /// more. Where it is not told so, the session is that one's, and nothing was read here.
    pub(crate) async fn serve(
        self,
        shared: Arc<Shared>,
        ready: oneshot::Sender<()>,
        go: oneshot::Receiver<()>,
    ) {
        let gate = shared.gate.watch();
        let session = self.card.session;
        let running = match self.settle(shared) {
            Ok(running) => running,
            // Nobody says that it is ready: it stays where it was.
            Err(error) => return tracing::warn!(session, %error, "session cannot go on here"),
        };
        let _ = ready.send(());
        if go.await.is_ok() {
            tracing::debug!(session, "session was taken over");
            running.run(gate).await;
        }
    }

    /// The session, on the runtime that it will live on. Nothing is read.
    fn settle(self, shared: Arc<Shared>) -> std::io::Result<Box<Session>> {
        let Self {
            card,
            client,
            server,
            tracker,
            permits,
        } = self;
        let (client, at_server) = (client.attach()?, server.attach()?);
        let state = shared.gate.now();
        let (id, peer, key) = (
            SessionId(card.session),
            card.peer.clone(),
            card.cancel_key(),
        );
        let registered = shared.registry.enter(id, key, card.login(), peer);
        // The backend was there now, which is all that is said of it by the clock of this process.
        *lock(&registered.entry.identity) = Identity {
            started: card.began,
            floor: card.log_floor.map(Lsn),
            ..Identity::new(card.pid, card.epoch, shared.now_micros())
        };
        lock(&registered.entry.shown).migrations = card.migrations;
        shared.new_work(card.epoch);
        let server = Server {
            link: Link {
                parameters: card.parameters,
                ..Link::new(at_server, BytesMut::new())
            },
            pid: card.pid,
            secret: Bytes::from(card.secret),
            endpoint: state.topology.primary.endpoint.clone(),
            epoch: card.epoch,
            floor: card.floor.map(Lsn),
            restored: None,
        };
        let mut session = Session::begin(Beginning {
            gate: state,
            client: Link::new(client, BytesMut::from(card.input.as_slice())),
            server,
            tracker,
            known: card.known,
            permits,
            shared,
            registered,
        });
        session.state = card.state;
        session.rows = Rows::taken_over(card.wants_rows);
        let idle = Duration::from_millis(card.idle_ms);
        session.last_activity = Instant::now()
            .checked_sub(idle)
            .unwrap_or_else(Instant::now);
        session.entry().set_state(1);
        session.show_protection();
        Ok(session)
    }
}

impl Card {
    fn cancel_key(&self) -> CancelKey {
        let (pid, secret) = self.key.clone();
        CancelKey { pid, secret }
    }

    fn login(&self) -> Login {
        let credentials = self.keys.map_or(Credentials::None, |keys| {
            let [client_key, stored_key, server_key] = keys;
            Credentials::Scram(Arc::new(ScramKeys {
                client_key,
                stored_key,
                server_key,
            }))
        });
        Login {
            user: self.user.clone(),
            database: self.database.clone(),
            params: self.params.clone(),
            credentials,
        }
    }
}
