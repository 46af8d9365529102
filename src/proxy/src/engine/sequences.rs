//! Values of sequences that a client has seen come again in a replay.
//!
//! `nextval` gives another value on the new primary. Where statements of the open transaction
//! returned values of a sequence, the sequence is set back to the first of them just before they run
//! again, once for as many as follow each other ([`super::runs`]), and forward behind every value
//! that was given, right afterwards ([`set_back`]). `setval` acts at once and is not undone by a
//! rollback; it is done as the proxy's own user.
//!
//! The invariants: while a sequence is set back no other session of this proxy replays (the lock
//! in `Shared`, which every replay holds as long as it may draw from one); and what was set back is
//! set forward again before the lock is given back, also when the replay is broken off.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use helios_api::Endpoint;
use helios_session::tracker::Tracker;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use super::link::Link;
use super::replay::{self, ReplayError};
use super::runs::{Records, Taken};
use super::set_back::{self, Baton, Sequence, SetBack, Wanted};
use super::shared::Shared;
use super::turn::turn_ends;
use crate::backend::{self, BackendError, Login};

/// The lock that all replays hold, with the connection that the last one used.
pub(super) type ReplayLock = Arc<RwLock<Option<Service>>>;

/// How long the connection is kept for the next replay.
const KEEP_OPEN: Duration = Duration::from_secs(2);

/// A connection of the proxy's own to one database.
#[derive(Debug)]
pub(super) struct Service {
    endpoint: Endpoint,
    database: String,
    link: Link,
    baton: Baton,
    /// The server has set sequences back, and waits for the baton.
    waits: bool,
}

/// Sets sequences back and forward, for one replay.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    database: String,
    guard: Option<OwnedRwLockWriteGuard<Option<Service>>>,
    /// The right to go on beside others, behind that.
    beside: Option<OwnedRwLockReadGuard<Option<Service>>>,
    /// Whether a sequence is set back, or may be yet.
    sets_back: Arc<AtomicBool>,
    pub(super) records: Records,
    /// What is known of columns, by table and number.
    pub(super) columns: BTreeMap<(u32, u16), Option<Sequence>>,
    set_back: Vec<SetBack>,
    /// What the statement that sets back is for.
    taken: Taken,
    /// A statement that sets back was sent, and is not known to have ended.
    begun: bool,
    /// This one only cleans up.
    cleans: bool,
    /// By the server's clock, in seconds: nothing is set back later, however late the server gets
    /// to know.
    until: Option<f64>,
}

impl Keeper {
    /// With a connection, where the database lets the proxy in; otherwise statements run again as
    /// they are, and a difference is told honestly.
    ///
    /// # Errors
    /// The proxy's own connection cannot be had at the moment.
    pub(super) async fn open(
        shared: &Arc<Shared>,
        endpoint: &Endpoint,
        database: &str,
        records: Records,
        guard: OwnedRwLockWriteGuard<Option<Service>>,
    ) -> Result<Self, ReplayError> {
        let mut keeper = Self {
            shared: Arc::clone(shared),
            endpoint: endpoint.clone(),
            database: database.to_owned(),
            guard: Some(guard),
            beside: None,
            sets_back: Arc::new(AtomicBool::new(true)),
            records,
            columns: BTreeMap::new(),
            set_back: Vec::new(),
            taken: Taken::default(),
            begun: false,
            cleans: false,
            until: None,
        };
        match keeper.connect().await {
            Ok(()) => keeper.until = turn_ends(shared, &mut keeper).await?,
            Err(e) if e.is_transient() => return Err(std::io::Error::other(e.to_string()).into()),
            Err(e) => {
                tracing::warn!(database, error = %e, "values of sequences cannot be kept");
                keeper.records = Records::default();
            }
        }
        Ok(keeper)
    }

    /// Whether this record may have returned values of sequences.
    pub(super) fn wants(&self, record: usize) -> bool {
        self.records.wanted.contains(&record)
    }

    /// Before record `from` of `old` runs again on `link`, everything before it being answered
    /// (`new`): sets its sequences back, and those of records behind it that go with it. How many
    /// records that serves, at least this one; everything is to be set forward behind them.
    ///
    /// # Errors
    /// The connection's.
    pub(super) async fn set_back(
        &mut self,
        link: &mut Link,
        old: &Tracker,
        new: &Tracker,
        from: usize,
    ) -> Result<usize, ReplayError> {
        let (records, wanted) = self.run(link, old, new, from).await?;
        if !wanted.is_empty() {
            self.begin(from, records, wanted).await?;
        }
        Ok(records)
    }

    /// For a whole transaction: sets these back; whether they are.
    ///
    /// # Errors
    /// The connection's.
    pub(super) async fn set_back_all(&mut self, wanted: &[Wanted]) -> Result<bool, ReplayError> {
        self.begin(0, usize::MAX, wanted.to_vec()).await?;
        let waits = self.guard.as_deref().and_then(Option::as_ref);
        let all = wanted.len() == self.set_back.len();
        Ok(all && waits.is_some_and(|service| service.waits))
    }

    /// Begins to set `wanted` back, for so many records.
    async fn begin(
        &mut self,
        from: usize,
        records: usize,
        wanted: Vec<Wanted>,
    ) -> Result<(), ReplayError> {
        let mut service = self.service()?;
        self.begun = true;
        let (link, noted) = (&mut service.link, &mut self.set_back);
        // An error takes the connections with it: the server sets forward then.
        service.waits =
            set_back::begin(link, &mut service.baton, &wanted, self.until, noted).await?;
        self.begun = service.waits || !self.set_back.is_empty();
        self.put_back(service);
        self.taken = Taken {
            from,
            records,
            wanted,
        };
        Ok(())
    }

    /// Runs a statement of ours on the connection that holds the baton.
    ///
    /// # Errors
    /// The connection's, or the server's.
    pub(super) async fn on_baton(
        &mut self,
        sql: &str,
    ) -> Result<Vec<Vec<Option<String>>>, ReplayError> {
        let mut service = self.service()?;
        let result = service.baton.run(sql).await;
        if !matches!(&result, Err(e) if e.is_transient()) {
            self.put_back(service);
        }
        result
    }

    /// Behind the records: sets forward what was set back.
    ///
    /// # Errors
    /// The connection's; what is left is set forward when the keeper goes. When it is set forward, and
    /// other values were taken than the client has seen, as [`Taken::check`] says.
    pub(super) async fn set_forward(&mut self) -> Result<(), ReplayError> {
        if !self.begun {
            return Ok(());
        }
        // Not a reason to go on with a sequence that is set back.
        let broken = |e: ReplayError| ReplayError::Connection(std::io::Error::other(e.to_string()));
        let mut service = self.service()?;
        let mut stood = Vec::new();
        if std::mem::take(&mut service.waits) {
            service.baton.give().await?;
            stood = set_back::end(&mut service.link).await.map_err(broken)?;
            service.baton.take_back().await?;
            self.put_back(service);
            self.set_back.clear();
        } else {
            self.put_back(service);
            self.ask(&set_back::wait_for_others())
                .await
                .map_err(broken)?;
            while let Some(sql) = self.set_back.last().map(SetBack::forward) {
                self.ask(&sql).await.map_err(broken)?;
                self.set_back.pop();
            }
        }
        self.begun = false;
        std::mem::take(&mut self.taken).check(&stood)
    }

    /// Whether a sequence is set back, or may be yet.
    pub(super) fn sets_back(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.sets_back)
    }

    /// Gives up being alone where nothing is set back any more, nor will be from record `next` on.
    pub(super) fn release_behind(&mut self, next: usize) {
        let more = self.records.wanted.range(next..).next().is_some();
        if more || self.begun || !self.set_back.is_empty() {
            return;
        }
        if let Some(guard) = self.guard.take() {
            self.records = Records::default();
            self.sets_back.store(false, Ordering::Relaxed);
            self.beside = Some(guard.downgrade());
            self.close_later();
        }
    }

    /// The replay draws from no sequence any more.
    pub(super) fn end(&mut self) {
        self.release_behind(usize::MAX);
        self.beside = None;
    }

    /// Ends the connection, unless the next replay uses it soon.
    fn close_later(&self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let lock = Arc::clone(&self.shared.replaying);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(KEEP_OPEN).await;
                if let Ok(mut unused) = lock.try_write() {
                    *unused = None;
                    return;
                }
            }
        });
    }

    /// Taken out while it is used: a question that is broken off leaves no half-read answer.
    fn service(&mut self) -> Result<Service, ReplayError> {
        let service = self.guard.as_deref_mut().and_then(Option::take);
        service.ok_or_else(|| ReplayError::Connection(std::io::ErrorKind::NotConnected.into()))
    }

    fn put_back(&mut self, service: Service) {
        if let Some(slot) = self.guard.as_deref_mut() {
            *slot = Some(service);
        }
    }

    pub(super) async fn ask(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, ReplayError> {
        let mut service = self.service()?;
        let result = replay::simple(&mut service.link, sql).await;
        if !matches!(&result, Err(e) if e.is_transient()) {
            self.put_back(service);
        }
        result
    }

    /// Makes sure of a connection to the right database.
    async fn connect(&mut self) -> Result<(), BackendError> {
        let fits = |s: &Service| s.endpoint == self.endpoint && s.database == self.database;
        let Some(slot) = self.guard.as_deref_mut() else {
            return Ok(());
        };
        if slot.as_ref().is_some_and(fits) {
            return Ok(());
        }
        *slot = None;
        let login = login(&self.shared.service, &self.database);
        let limit = self.shared.options.connect_timeout;
        let connect = || backend::connect(&self.endpoint, &self.shared.tls, &login, limit);
        let (conn, second) = tokio::try_join!(connect(), connect())?;
        let baton = Baton::take(Link::new(second.stream, second.buf)).await;
        *slot = Some(Service {
            endpoint: self.endpoint.clone(),
            database: self.database.clone(),
            link: Link::new(conn.stream, conn.buf),
            baton: baton.map_err(|e| BackendError::Io {
                endpoint: self.endpoint.clone(),
                source: std::io::Error::other(e.to_string()),
            })?,
            waits: false,
        });
        Ok(())
    }

    /// Sets forward what a broken replay has left behind, on a fresh connection if need be. When
    /// the primary is elsewhere then, what was set back may have got there.
    async fn clean_up(mut self) {
        let limit = self.shared.options.max_replay_time;
        let _ = tokio::time::timeout(limit, self.set_forward_at_last()).await;
        for one in std::mem::take(&mut self.set_back) {
            let sequence = &one.sequence.name;
            tracing::warn!(sequence, "sequence could not be set forward after a replay");
        }
    }

    async fn set_forward_at_last(&mut self) {
        while self.connect().await.is_err() || self.set_forward().await.is_err() {
            let topology = self.shared.gate.now().topology;
            self.endpoint = topology.primary.endpoint.clone();
            tokio::time::sleep(self.shared.options.replay_backoff).await;
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let Some(guard) = self.guard.take() else {
            return;
        };
        // A runtime that ends drops at once what it is given.
        if self.cleans && self.begun {
            return;
        }
        if self.set_back.is_empty() && !self.begun {
            drop(guard);
            self.close_later();
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let rest = Self {
            shared: Arc::clone(&self.shared),
            endpoint: self.endpoint.clone(),
            database: std::mem::take(&mut self.database),
            guard: Some(guard),
            beside: None,
            sets_back: Arc::clone(&self.sets_back),
            records: Records::default(),
            columns: BTreeMap::new(),
            set_back: std::mem::take(&mut self.set_back),
            taken: Taken::default(),
            begun: self.begun,
            cleans: true,
            until: self.until,
        };
        runtime.spawn(rest.clean_up());
    }
}

/// The proxy's own user in a session's database. Waiting for a synchronous standby would be in
/// vain: the new primary may have none yet.
fn login(service: &Login, database: &str) -> Login {
    let mut login = service.clone();
    database.clone_into(&mut login.database);
    for (name, value) in [
        ("search_path", "pg_catalog"),
        ("synchronous_commit", "off"),
        ("lock_timeout", "1s"),
        ("statement_timeout", "10s"),
        ("client_min_messages", "notice"),
    ] {
        login.params.push((name.to_owned(), value.to_owned()));
    }
    login
}
