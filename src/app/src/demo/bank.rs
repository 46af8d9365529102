//! The bank: tables, accounts, transfers, and what a client notes of each.
//!
//! Invariant: a transfer locks its accounts in the order of their ids, and clients that think
//! inside a transaction have accounts of their own. So nothing here deadlocks, waits long or fails
//! to serialize by itself, and any error that a client sees is the cluster's.

use rand::RngExt;
use rand::rngs::StdRng;

/// What each account holds at first.
pub(crate) const INITIAL: i64 = 1_000_000;
/// Accounts that several clients use.
pub(crate) const SHARED: i32 = 100;
/// Accounts that each client has for itself.
pub(crate) const PRIVATE: i32 = 4;
/// Rows of the table that the cursor reads.
pub(crate) const ITEMS: i64 = 20_000;

/// Tables of the demo. The ledger has no unique constraint on purpose: a transaction that is
/// applied twice must show.
pub(crate) fn schema(clients: usize) -> String {
    let accounts = SHARED + PRIVATE * i32::try_from(clients).unwrap_or(i32::MAX / 8);
    format!(
        "CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL) WITH (fillfactor = 50);
         CREATE TABLE ledger (client int NOT NULL, n bigint NOT NULL, source int NOT NULL, \
                              target int NOT NULL, amount bigint NOT NULL);
         CREATE TABLE items (id bigint PRIMARY KEY, label text NOT NULL);
         INSERT INTO accounts SELECT i, {INITIAL} FROM generate_series(1, {accounts}) i;
         INSERT INTO items SELECT i, md5(i::text) FROM generate_series(1, {ITEMS}) i;
         ANALYZE accounts; ANALYZE items;"
    )
}

/// The accounts that a client moves money between: `first ..= last`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Accounts {
    pub(crate) first: i32,
    pub(crate) last: i32,
}

impl Accounts {
    pub(crate) const COMMON: Self = Self {
        first: 1,
        last: SHARED,
    };

    /// Those of client `index` alone.
    pub(crate) fn private(index: usize) -> Self {
        let first = SHARED + 1 + PRIVATE * i32::try_from(index).unwrap_or(i32::MAX / 8);
        Self {
            first,
            last: first + PRIVATE - 1,
        }
    }

    /// What they hold together as long as only transfers among them happen.
    pub(crate) fn sum(self) -> i64 {
        i64::from(self.last - self.first + 1) * INITIAL
    }
}

/// One movement of money, with the client's unique number of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub(crate) client: i32,
    pub(crate) n: i64,
    pub(crate) source: i32,
    pub(crate) target: i32,
    pub(crate) amount: i64,
}

impl Transfer {
    /// The two changes in the order in which the rows are locked.
    pub(crate) fn changes(&self) -> [(i32, i64); 2] {
        let take = (self.source, -self.amount);
        let give = (self.target, self.amount);
        if self.source < self.target {
            [take, give]
        } else {
            [give, take]
        }
    }

    pub(crate) fn ledger_sql(&self) -> String {
        format!(
            "INSERT INTO ledger (client, n, source, target, amount) VALUES ({}, {}, {}, {}, {})",
            self.client, self.n, self.source, self.target, self.amount
        )
    }
}

/// How far a transfer got, as its client knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Begun; COMMIT was not sent.
    Begun,
    /// COMMIT was sent, no answer came.
    Attempted,
    /// COMMIT was answered.
    Acknowledged,
}

/// One line of a client's notes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Note {
    pub(crate) transfer: Transfer,
    pub(crate) fate: Fate,
}

/// What a client knows of its transfers; number `n` is line `n`.
#[derive(Debug)]
pub(crate) struct Notes {
    client: i32,
    lines: Vec<Note>,
}

impl Notes {
    pub(crate) fn new(index: usize) -> Self {
        Self {
            client: i32::try_from(index).unwrap_or(i32::MAX),
            lines: Vec::new(),
        }
    }

    /// A new transfer between two different ones of `accounts`.
    pub(crate) fn begin(&mut self, accounts: Accounts, rng: &mut StdRng) -> Transfer {
        let source = rng.random_range(accounts.first..=accounts.last);
        let mut target = rng.random_range(accounts.first..accounts.last);
        if target >= source {
            target += 1;
        }
        let transfer = Transfer {
            client: self.client,
            n: i64::try_from(self.lines.len()).unwrap_or(i64::MAX),
            source,
            target,
            amount: rng.random_range(1..=100),
        };
        self.lines.push(Note {
            transfer,
            fate: Fate::Begun,
        });
        transfer
    }

    /// COMMIT is about to be sent for transfer `first` and all after it.
    pub(crate) fn attempt(&mut self, first: i64) {
        self.mark(first, Fate::Attempted);
    }

    /// COMMIT was answered for transfer `first` and all after it; returns how many.
    pub(crate) fn acknowledge(&mut self, first: i64) -> u64 {
        self.mark(first, Fate::Acknowledged)
    }

    fn mark(&mut self, first: i64, fate: Fate) -> u64 {
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        let mut count = 0;
        for note in self.lines.iter_mut().skip(first) {
            note.fate = fate;
            count += 1;
        }
        count
    }

    pub(crate) fn lines(&self) -> &[Note] {
        &self.lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::plan::client_rng;

    #[test]
    fn transfers_have_two_accounts_and_lock_in_order() {
        let mut rng = client_rng(1, 0);
        let mut notes = Notes::new(3);
        for accounts in [Accounts::COMMON, Accounts::private(5)] {
            for _ in 0..2000 {
                let t = notes.begin(accounts, &mut rng);
                assert_ne!(t.source, t.target);
                for id in [t.source, t.target] {
                    assert!((accounts.first..=accounts.last).contains(&id));
                }
                let [a, b] = t.changes();
                assert!(a.0 < b.0 && a.1 + b.1 == 0);
            }
        }
        assert_eq!(notes.lines()[17].transfer.n, 17);
        notes.attempt(3998);
        assert_eq!(notes.acknowledge(3999), 1);
        assert_eq!(notes.lines()[3997].fate, Fate::Begun);
        assert_eq!(notes.lines()[3998].fate, Fate::Attempted);
        assert_eq!(notes.lines()[3999].fate, Fate::Acknowledged);
    }
}
