//! How many connections there may be, in all and for one user.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Connections over the limit that are kept for the moment in which they are told so (or in which
/// they cancel something: a cancel request must get through when all places are taken).
const OVERFLOW: usize = 64;

/// The limits, with what is taken of them.
#[derive(Debug)]
pub struct Limits {
    total: usize,
    per_user: Option<usize>,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    total: usize,
    overflow: usize,
    users: HashMap<String, usize>,
}

/// Whether a connection has a place.
#[derive(Debug)]
pub enum Admission {
    /// It has.
    Granted(ConnectionPermit),
    /// All places are taken: it may cancel, or be told.
    Full(OverflowPermit),
}

/// A place among all connections; given back on drop.
#[derive(Debug)]
pub struct ConnectionPermit(Arc<Limits>);

/// A place among those that are about to be turned away; given back on drop.
#[derive(Debug)]
pub struct OverflowPermit(Arc<Limits>);

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

    /// Takes a place among all connections; `None` when there is not even one to be turned away.
    #[must_use]
    pub fn admit(self: &Arc<Self>) -> Option<Admission> {
        let mut counts = self.lock();
        if counts.total < self.total {
            counts.total += 1;
            Some(Admission::Granted(ConnectionPermit(self.clone())))
        } else if counts.overflow < OVERFLOW {
            counts.overflow += 1;
            Some(Admission::Full(OverflowPermit(self.clone())))
        } else {
            None
        }
    }

    /// Takes a place among this user's connections.
    #[must_use]
    pub fn user(self: &Arc<Self>, user: &str) -> Option<UserPermit> {
        let mut counts = self.lock();
        let taken = counts.users.get(user).copied().unwrap_or(0);
        if self.per_user.is_some_and(|limit| taken >= limit) {
            return None;
        }
        counts.users.insert(user.to_owned(), taken + 1);
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

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.0.lock().total -= 1;
    }
}

impl Drop for OverflowPermit {
    fn drop(&mut self) {
        self.0.lock().overflow -= 1;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_given_back() {
        let limits = Limits::new(2, Some(1));
        let first = limits.admit();
        assert!(matches!(first, Some(Admission::Granted(_))));
        let second = limits.admit();
        assert!(matches!(second, Some(Admission::Granted(_))));
        let mut turned_away: Vec<_> = (0..OVERFLOW).map(|_| limits.admit()).collect();
        assert!(
            turned_away
                .iter()
                .all(|a| matches!(a, Some(Admission::Full(_))))
        );
        assert!(limits.admit().is_none());
        turned_away.clear();
        drop(first);
        assert!(matches!(limits.admit(), Some(Admission::Granted(_))));
        assert_eq!(limits.open(), 1);

        let user = limits.user("ann");
        assert!(user.is_some() && limits.user("ann").is_none() && limits.user("bob").is_some());
        drop(user);
        assert!(limits.user("ann").is_some());
        assert!(limits.lock().users.is_empty());
    }
}
