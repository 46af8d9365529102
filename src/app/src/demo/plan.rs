//! What the demo does, decided from its seed: which events in which order, which client does what.
//!
//! Pure: no clock, no I/O. The same seed gives the same plan.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

/// What happens to the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum EventKind {
    /// A planned move through the control API.
    Switchover,
    /// `kill -9` of the primary's postmaster and all its processes.
    Crash,
}

impl EventKind {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Switchover => "switchover",
            Self::Crash => "crash",
        }
    }
}

/// One event and how long to wait before it once the cluster is redundant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PlannedEvent {
    pub(crate) kind: EventKind,
    pub(crate) delay: Duration,
}

/// How a client talks to the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum ClientKind {
    /// Simple protocol, SQL text.
    Plain,
    /// Named prepared statements, made once a connection.
    Prepared,
    /// BEGIN, statements and COMMIT sent without waiting for answers.
    Pipelined,
    /// Thinks between its statements: a transaction is open nearly always.
    Slow,
    /// REPEATABLE READ; every read is compared with what it must be.
    RepeatableRead,
    /// SERIALIZABLE. At most one client: two could get legitimate serialization failures, and any
    /// error counts.
    Serializable,
    /// One transaction of tens of seconds with a cursor, and transfers between its FETCHes.
    Cursor,
}

impl ClientKind {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Prepared => "prepared",
            Self::Pipelined => "pipelined",
            Self::Slow => "slow",
            Self::RepeatableRead => "repeatable read",
            Self::Serializable => "serializable",
            Self::Cursor => "cursor",
        }
    }

    /// The kind of client number `index` of `clients`. From six clients on all kinds but the
    /// serializable one are present, from seven on all.
    pub(crate) fn of(index: usize, clients: usize) -> Self {
        if clients >= 6 && index + 1 == clients {
            return Self::Cursor;
        }
        if clients >= 7 && index + 2 == clients {
            return Self::Serializable;
        }
        match index % 5 {
            0 => Self::Plain,
            1 => Self::Slow,
            2 => Self::Prepared,
            3 => Self::Pipelined,
            _ => Self::RepeatableRead,
        }
    }
}

/// The events in the order they happen.
pub(crate) fn events(seed: u64, switchovers: usize, crashes: usize) -> Vec<PlannedEvent> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut kinds = vec![EventKind::Switchover; switchovers];
    kinds.resize(switchovers + crashes, EventKind::Crash);
    kinds.shuffle(&mut rng);
    kinds
        .into_iter()
        .map(|kind| PlannedEvent {
            kind,
            delay: Duration::from_millis(rng.random_range(200..1200)),
        })
        .collect()
}

/// The random numbers of one client, independent of the other clients'.
pub(crate) fn client_rng(seed: u64, index: usize) -> StdRng {
    // A client's stream must not be the plan's or a neighbour's shifted one: seed_from_u64 mixes.
    StdRng::seed_from_u64(seed ^ (index as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_plan() {
        let plan = events(7, 20, 20);
        assert_eq!(plan, events(7, 20, 20));
        assert_ne!(plan, events(8, 20, 20));
        let crashes = plan.iter().filter(|e| e.kind == EventKind::Crash).count();
        assert_eq!((plan.len(), crashes), (40, 20));
    }

    #[test]
    fn all_kinds_take_part() {
        for clients in [7, 8, 32, 100] {
            let kinds: Vec<_> = (0..clients).map(|i| ClientKind::of(i, clients)).collect();
            for kind in [
                ClientKind::Plain,
                ClientKind::Prepared,
                ClientKind::Pipelined,
                ClientKind::Slow,
                ClientKind::RepeatableRead,
            ] {
                assert!(kinds.contains(&kind), "{clients} clients, {kind:?}");
            }
            for one in [ClientKind::Cursor, ClientKind::Serializable] {
                assert_eq!(kinds.iter().filter(|k| **k == one).count(), 1);
            }
        }
        assert_eq!(ClientKind::of(0, 1), ClientKind::Plain);
    }
}
