//! The sessions of a proxy: who they are, their cancel keys, what they tell about themselves.
//!
//! Sessions write their own entry, everybody may read it. The invariant: an entry is here exactly
//! as long as its session's task runs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use helios_api::control::SessionInfo;
use helios_api::{Epoch, InstanceName, Lsn, SessionId};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::ahead::{Blueprint, Warm};
use super::bell::Bell;
use super::progress::Progress;
use super::protection::{Meter, Who};
use super::running::Running;
use crate::backend::Login;
use crate::stream::Stream;

/// Cancel requests whose senders wait for one session; the senders of more are not waited for.
const MAX_CANCELLING: usize = 8;

/// What a session shows of itself.
#[derive(Debug, Clone, Default)]
pub struct Shown {
    /// Instance of its backend.
    pub instance: Option<InstanceName>,
    /// Why a failover now would cost it an error.
    pub unprotected: Option<String>,
    /// It listens to notifications.
    pub listens: bool,
    /// Moves it has been through.
    pub migrations: u64,
}

/// One session.
#[derive(Debug)]
pub struct Entry {
    /// Its number.
    pub id: SessionId,
    /// How it logged in, to open further backends for it.
    pub login: Login,
    /// Whose session it is, for what is counted.
    pub who: Arc<Who>,
    /// Its clock, once it has begun.
    pub meter: OnceLock<Meter>,
    /// The client's address.
    pub peer: String,
    /// Key of cancel requests.
    pub key: CancelKey,
    /// Number of the last take-over that left the session here.
    pub refused: AtomicU64,
    /// A cancel request waits to be forwarded.
    pub cancel: AtomicBool,
    /// Connections of clients that wait for a cancel request to be delivered.
    pub cancelling: Mutex<Vec<Stream>>,
    /// A cancel request is on its way to the server: nothing new is sent until it has been
    /// delivered, or it could hit a COMMIT that follows.
    pub cancel_under_way: AtomicBool,
    /// Wakes the session: for that, and for changes of the gate.
    pub bell: Arc<Bell>,
    /// The runtime that the session lives on.
    pub home: Handle,
    /// It has temporary objects, by [`Registered::owns`].
    owns: AtomicBool,
    /// A planned move is being prepared: see [`Leave`].
    pub leave: Mutex<Option<Leave>>,
    /// A planned move is being prepared: temporary tables are to be read. Dropped when they are, or
    /// cannot be now.
    pub keep: Mutex<Option<oneshot::Sender<()>>>,
    /// A planned move is being prepared: the session is to say what can be restored ahead of it.
    pub blueprint: Mutex<Option<oneshot::Sender<Box<Blueprint>>>>,
    /// A backend opened ahead of time on the next primary.
    pub warm: Mutex<Option<Warm>>,
    /// Its last backend, as the server knows it.
    pub identity: Mutex<Identity>,
    /// What it shows; changed at most once an exchange that matters.
    pub shown: Mutex<Shown>,
    /// 0 connecting, 1 idle, 2 active, 3 in transaction, 4 held, 5 migrating.
    pub state: AtomicU64,
    /// When the open transaction began: microseconds since the proxy started, 0 for none.
    pub began: AtomicU64,
    /// How far the replay of the transaction is.
    pub replay: Progress,
    /// Bytes of its journal.
    pub journal_bytes: AtomicU64,
    /// A statement is in flight that a planned move cannot cut off.
    pub uncut: AtomicBool,
    /// Its replay sets sequences back.
    pub wants_turn: AtomicBool,
    /// Its backend is gone, and the session has not been moved since.
    pub lost: AtomicBool,
    /// What its client has seen of those.
    pub seen: Mutex<Vec<helios_session::sequences::Seen>>,
    /// Log position before the mark of the statement in flight, `u64::MAX` for none.
    pub mark_floor: AtomicU64,
    /// The marked statement that runs.
    pub running: Running,
}

/// A backend as its server knows it. A process id alone may be given out again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// Process id; 0 before there is one.
    pub pid: i32,
    /// Of the server.
    pub epoch: Epoch,
    /// When it began, as the server writes it; asked for beside the health checks.
    pub started: Option<String>,
    /// When it was there, in microseconds since the proxy started.
    pub since: u64,
    /// A position that the server's log had then, if it was asked for.
    pub floor: Option<helios_api::Lsn>,
}

impl Identity {
    /// A new backend, of which no more is known.
    #[must_use]
    pub fn new(pid: i32, epoch: Epoch, since: u64) -> Self {
        Self {
            pid,
            epoch,
            since,
            ..Self::default()
        }
    }
}

/// Key that a client cancels with.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CancelKey {
    /// Process id that the client was told.
    pub pid: i32,
    /// Secret that it was told.
    pub secret: Vec<u8>,
}

/// What the preparation of a planned move asks of an idle session.
#[derive(Debug)]
pub enum Leave {
    /// To note whether it stays idle from now on.
    Watch,
    /// To leave its backend if it did. Dropped when the backend has ended, or will not be left.
    Now(oneshot::Sender<()>),
}

const STATES: [&str; 6] = [
    "connecting",
    "idle",
    "active",
    "in transaction",
    "held",
    "migrating",
];

impl Entry {
    /// Sets the state, by its number (see [`Entry::state`]).
    pub fn set_state(&self, state: u64) {
        self.state.store(state, Ordering::Relaxed);
    }

    /// Whether it has temporary objects, and no transaction that would need them behind a move.
    #[must_use]
    pub fn owns_idly(&self) -> bool {
        self.owns.load(Ordering::Relaxed) && self.began.load(Ordering::Relaxed) == 0
    }

    /// The entry as it is listed; `now` in microseconds since the proxy started.
    #[must_use]
    pub fn info(&self, now: u64) -> SessionInfo {
        let shown = lock(&self.shown).clone();
        let began = self.began.load(Ordering::Relaxed);
        let state = usize::try_from(self.state.load(Ordering::Relaxed)).unwrap_or(0);
        let replay = self.replay.now();
        // One that found the primary by itself is not told to migrate.
        let state = if replay.is_some() { 5 } else { state };
        let reason = self.meter.get().and_then(Meter::reason);
        SessionInfo {
            id: self.id,
            state: STATES.get(state).copied().unwrap_or("idle").to_owned(),
            user: self.login.user.clone(),
            database: self.login.database.clone(),
            application: self.who.application.clone(),
            client: self.peer.clone(),
            instance: shown.instance,
            transaction_age_ms: (began > 0).then(|| now.saturating_sub(began) / 1000),
            replay,
            journal_bytes: self.journal_bytes.load(Ordering::Relaxed),
            migrations: shown.migrations,
            unprotected: reason.map(|r| shown.unprotected.unwrap_or_else(|| r.text().into())),
            reason,
        }
    }
}

/// All sessions.
#[derive(Debug, Default)]
pub struct Registry {
    sessions: Mutex<HashMap<SessionId, Arc<Entry>>>,
    keys: Mutex<HashMap<CancelKey, Arc<Entry>>>,
    next: AtomicU64,
    owners: AtomicUsize,
}

/// Locks, also when another thread died with the lock: entries are plain values.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// Registers a session; it is listed until the guard is dropped. To be called on the runtime
    /// that it will live on.
    #[must_use]
    pub fn add(self: &Arc<Self>, login: Login, peer: String, secret_len: usize) -> Registered {
        let id = SessionId(self.next.fetch_add(1, Ordering::Relaxed) + 1);
        let pid = i32::try_from(id.0 % 0x7FFF_FFFF).unwrap_or(0) + 1;
        let mut secret = vec![0; secret_len];
        rand::fill(&mut secret[..]);
        self.enter(id, CancelKey { pid, secret }, login, peer)
    }

    /// Numbers up to this one belong to sessions of the process that this one takes over from.
    pub fn begin_behind(&self, last: u64) {
        self.next.fetch_max(last, Ordering::Relaxed);
    }

    /// The last number that was given to a session.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// The same for a session that another process began, under the number and the key that it has.
    #[must_use]
    pub fn enter(
        self: &Arc<Self>,
        id: SessionId,
        key: CancelKey,
        login: Login,
        peer: String,
    ) -> Registered {
        let application = login.params.iter().find(|(k, _)| k == "application_name");
        let who = Who {
            database: login.database.clone(),
            user: login.user.clone(),
            application: application.map(|(_, v)| v.clone()).unwrap_or_default(),
        };
        let entry = Arc::new(Entry {
            id,
            who: Arc::new(who.cut()),
            meter: OnceLock::new(),
            login,
            peer,
            key,
            refused: AtomicU64::new(0),
            cancel: AtomicBool::new(false),
            cancelling: Mutex::default(),
            cancel_under_way: AtomicBool::new(false),
            bell: Arc::default(),
            home: Handle::current(),
            keep: Mutex::default(),
            owns: AtomicBool::new(false),
            leave: Mutex::new(None),
            blueprint: Mutex::new(None),
            warm: Mutex::new(None),
            identity: Mutex::default(),
            shown: Mutex::default(),
            state: AtomicU64::new(0),
            began: AtomicU64::new(0),
            replay: Progress::default(),
            journal_bytes: AtomicU64::new(0),
            uncut: AtomicBool::new(false),
            wants_turn: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            seen: Mutex::default(),
            mark_floor: AtomicU64::new(u64::MAX),
            running: Running::default(),
        });
        lock(&self.sessions).insert(id, Arc::clone(&entry));
        lock(&self.keys).insert(entry.key.clone(), Arc::clone(&entry));
        Registered {
            registry: Arc::clone(self),
            entry,
        }
    }

    /// Asks the session with this key to cancel what it runs.
    ///
    /// # Errors
    /// Nobody here has this key: the connection back, for another process that may.
    pub fn cancel(&self, key: &CancelKey, stream: Stream) -> Result<(), Stream> {
        let Some(entry) = lock(&self.keys).get(key).cloned() else {
            return Err(stream);
        };
        let mut waiting = lock(&entry.cancelling);
        if waiting.len() < MAX_CANCELLING {
            waiting.push(stream);
        }
        drop(waiting);
        entry.cancel.store(true, Ordering::SeqCst);
        entry.bell.ring();
        Ok(())
    }

    /// The lowest log position that the mark of a statement in flight may be at.
    #[must_use]
    pub fn lowest_mark(&self) -> Lsn {
        let sessions = lock(&self.sessions);
        let floors = sessions
            .values()
            .map(|e| e.mark_floor.load(Ordering::Relaxed));
        Lsn(floors.min().unwrap_or(u64::MAX))
    }

    /// How many sessions have temporary objects.
    #[must_use]
    pub fn owners(&self) -> usize {
        self.owners.load(Ordering::Relaxed)
    }

    /// All sessions, by number.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Entry>> {
        let mut all: Vec<_> = lock(&self.sessions).values().cloned().collect();
        all.sort_by_key(|e| e.id);
        all
    }
}

/// Keeps a session listed.
#[derive(Debug)]
pub struct Registered {
    registry: Arc<Registry>,
    /// The session.
    pub entry: Arc<Entry>,
}

impl Registered {
    /// Whether the session has temporary objects.
    pub fn owns(&self, objects: bool) {
        let owners = &self.registry.owners;
        match (self.entry.owns.swap(objects, Ordering::Relaxed), objects) {
            (false, true) => owners.fetch_add(1, Ordering::Relaxed),
            (true, false) => owners.fetch_sub(1, Ordering::Relaxed),
            _ => return,
        };
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.owns(false);
        lock(&self.registry.sessions).remove(&self.entry.id);
        lock(&self.registry.keys).remove(&self.entry.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Credentials;

    #[tokio::test]
    async fn owners_are_counted_while_they_are_there_and_own_something() {
        let registry = Arc::<Registry>::default();
        let enter = || {
            let login = Login {
                user: "a".into(),
                database: "b".into(),
                params: Vec::new(),
                credentials: Credentials::None,
            };
            registry.add(login, String::new(), 4)
        };
        let (one, two) = (enter(), enter());
        assert_eq!(registry.owners(), 0);
        one.owns(true);
        one.owns(true);
        two.owns(true);
        assert_eq!(registry.owners(), 2);
        assert!(one.entry.owns_idly());
        one.entry.began.store(1, Ordering::Relaxed);
        assert!(!one.entry.owns_idly(), "its transaction needs them");
        one.owns(false);
        one.owns(false);
        assert_eq!(registry.owners(), 1);
        drop(two);
        assert_eq!(registry.owners(), 0);
    }
}
