//! Where clients come in: sockets, and how many may be open.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::stream::Stream;

/// A client's connection before its first byte.
#[derive(Debug)]
pub struct Incoming {
    /// The connection.
    pub stream: Stream,
    /// Its address for people.
    pub peer: String,
    /// Its place among all connections; `None`: all are taken, it will be told so.
    pub permit: Option<ConnectionPermit>,
}

/// How many connections there may be, in all and for one user.
#[derive(Debug)]
pub struct Limits {
    total: usize,
    per_user: Option<usize>,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    total: usize,
    users: HashMap<String, usize>,
}

/// A place among all connections; given back on drop.
#[derive(Debug)]
pub struct ConnectionPermit(Arc<Limits>);

/// A place among a user's connections; given back on drop.
#[derive(Debug)]
pub struct UserPermit {
    limits: Arc<Limits>,
    user: String,
}

impl Limits {
    /// At most `total` connections, at most `per_user` of one user.
    #[must_use]
    pub fn new(total: usize, per_user: Option<usize>) -> Arc<Self> {
        Arc::new(Self {
            total,
            per_user,
            counts: Mutex::default(),
        })
    }

    /// Takes a place among all connections.
    #[must_use]
    pub fn connection(self: &Arc<Self>) -> Option<ConnectionPermit> {
        let mut counts = self.lock();
        if counts.total >= self.total {
            return None;
        }
        counts.total += 1;
        Some(ConnectionPermit(self.clone()))
    }

    /// Takes a place among this user's connections.
    #[must_use]
    pub fn user(self: &Arc<Self>, user: &str) -> Option<UserPermit> {
        let mut counts = self.lock();
        let taken = counts.users.entry(user.to_owned()).or_default();
        if self.per_user.is_some_and(|limit| *taken >= limit) {
            if *taken == 0 {
                counts.users.remove(user);
            }
            return None;
        }
        *taken += 1;
        Some(UserPermit {
            limits: self.clone(),
            user: user.to_owned(),
        })
    }

    /// Connections that are open now.
    #[must_use]
    pub fn open(&self) -> usize {
        self.lock().total
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.0.lock().total -= 1;
    }
}

impl Drop for UserPermit {
    fn drop(&mut self) {
        let mut counts = self.limits.lock();
        if let Some(taken) = counts.users.get_mut(&self.user) {
            *taken -= 1;
            if *taken == 0 {
                counts.users.remove(&self.user);
            }
        }
    }
}
