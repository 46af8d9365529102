//! Storage of the journal: accounts of memory and disk, exact to the byte, and the files that large
//! journals go to.
//!
//! The invariant: what all accounts of a [`Pool`] hold never exceeds its limit, and an account gives
//! back everything when it is dropped.

mod spill;

pub use spill::SpillFile;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that all journals of a proxy may hold together, in memory or on disk.
#[derive(Debug)]
pub struct Pool {
    used: AtomicUsize,
    limit: usize,
}

/// Which limit stood in the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Overflow {
    /// The session's own (`max_journal_bytes`).
    #[error("journal over the session's limit of {0} bytes")]
    Session(usize),
    /// The proxy's (`max_total_journal_bytes`).
    #[error("journals over the proxy's limit of {0} bytes")]
    Total(usize),
}

impl Pool {
    /// A pool of `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicUsize::new(0),
            limit,
        })
    }

    /// Bytes in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// An empty account for one session, of at most `limit` bytes.
    #[must_use]
    pub fn account(self: &Arc<Self>, limit: usize) -> Account {
        Account {
            pool: Arc::clone(self),
            used: 0,
            limit,
        }
    }
}

/// What one session holds of the pool.
#[derive(Debug)]
pub struct Account {
    pool: Arc<Pool>,
    used: usize,
    limit: usize,
}

impl Account {
    /// Bytes held.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// Sets what is held to `bytes`.
    ///
    /// # Errors
    /// [`Overflow`]; what was held before is then still held.
    pub fn set(&mut self, bytes: usize) -> Result<(), Overflow> {
        if bytes <= self.used {
            self.pool
                .used
                .fetch_sub(self.used - bytes, Ordering::Relaxed);
            self.used = bytes;
            return Ok(());
        }
        if bytes > self.limit {
            return Err(Overflow::Session(self.limit));
        }
        let more = bytes - self.used;
        let fits = |used: usize| used.checked_add(more).filter(|sum| *sum <= self.pool.limit);
        match self
            .pool
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
        {
            Ok(_) => {
                self.used = bytes;
                Ok(())
            }
            Err(_) => Err(Overflow::Total(self.pool.limit)),
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.pool.used.fetch_sub(self.used, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_to_the_byte() {
        let pool = Pool::new(100);
        let mut a = pool.account(60);
        let mut b = pool.account(60);
        assert_eq!(a.set(60), Ok(()));
        assert_eq!(a.set(61), Err(Overflow::Session(60)));
        assert_eq!(b.set(41), Err(Overflow::Total(100)));
        assert_eq!(b.set(40), Ok(()));
        assert_eq!(pool.used(), 100);
        assert_eq!(a.set(10), Ok(()));
        assert_eq!(pool.used(), 50);
        drop(a);
        assert_eq!(pool.used(), 40);
        drop(b);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn sums_are_exact_under_contention() {
        let pool = Pool::new(1 << 20);
        std::thread::scope(|scope| {
            for seed in 1..=8_usize {
                let pool = &pool;
                scope.spawn(move || {
                    let mut account = pool.account(1 << 18);
                    for step in 0..10_000 {
                        let _ = account.set(step * seed % (1 << 18));
                        assert!(pool.used() <= 1 << 20);
                    }
                });
            }
        });
        assert_eq!(pool.used(), 0);
    }
}
