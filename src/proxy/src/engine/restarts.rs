//! Transaction ids that a primary hands out twice: it was restarted, and goes on where its flushed
//! log ends.
//!
//! An id of which no record was flushed when a primary crashed is given to another transaction when
//! that primary comes up again, on the same timeline; `pg_xact_status` tells of the other one then.
//! The log shows each such end of a server's life, with the first id of the next one (the checkpoint
//! at the end of recovery, `CreateCheckPoint` in `src/backend/access/transam/xlog.c`). The
//! invariant: a status is believed only when the log from a position of the transaction's own life
//! says that its id was not free again.

use std::collections::VecDeque;

use helios_api::{Epoch, Lsn, Xid};

use super::resolve::Outcome;

/// Positions that are kept: with one each half second, the last two minutes or more.
const KEPT: usize = 256;

/// A flushed position of the log, and when it was asked for and told: microseconds since the proxy
/// started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    epoch: Epoch,
    asked: u64,
    told: u64,
    pub at: Lsn,
}

/// The last positions of the log, oldest first.
#[derive(Debug, Default)]
pub(super) struct Positions(VecDeque<Position>);

impl Positions {
    /// Notes one.
    pub(super) fn note(&mut self, epoch: Epoch, (asked, told): (u64, u64), at: Lsn) {
        while self.0.len() >= KEPT {
            self.0.pop_front();
        }
        self.0.push_back(Position {
            epoch,
            asked,
            told,
            at,
        });
    }

    /// The last one of an epoch.
    pub(super) fn last(&self, epoch: Epoch) -> Option<Position> {
        self.0.back().filter(|p| p.epoch == epoch).copied()
    }

    /// The last one of an epoch that was told before `until`, and that a recovery cannot end
    /// before.
    fn before(&self, epoch: Epoch, until: u64) -> Option<Position> {
        let fits = |p: &&Position| p.epoch == epoch && p.told <= until && is_between_records(p.at);
        self.0.iter().rev().find(fits).copied()
    }
}

/// Whether a flushed position is the end of a record. One at the end of a page can be in the middle
/// of a record (`XLogBackgroundFlush` in `src/backend/access/transam/xlog.c` writes whole pages),
/// and a recovery ends in front of that record when the rest of it is lost. Pages have 1 KiB or
/// a multiple of it.
fn is_between_records(at: Lsn) -> bool {
    !at.0.is_multiple_of(1024)
}

/// What is known of the life that a transaction ran in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Life {
    /// The epoch that it ran in.
    pub epoch: Epoch,
    /// When its backend was there, in microseconds since the proxy started.
    pub since: u64,
    /// A position that the log had when the backend was there.
    pub floor: Option<Lsn>,
    /// When something was sent that the backend has answered.
    pub answered: u64,
}

/// Where to begin to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct From {
    /// The transaction's server was there when the log had come to this position, or later.
    pub at: Lsn,
    /// It was there at this very position.
    pub exact: bool,
}

impl Life {
    /// The position to read from, as late as it can be; `None` when no position is known.
    pub(super) fn from(&self, known: &Positions) -> Option<From> {
        let last = known.before(self.epoch, self.answered);
        let own = last.filter(|p| p.asked >= self.since).map(|p| p.at);
        match own.max(self.floor.filter(|at| is_between_records(*at))) {
            Some(at) => Some(From { at, exact: true }),
            None => last.map(|p| From {
                at: p.at,
                exact: false,
            }),
        }
    }
}

/// What `status` of `xid` is worth (committed, or in progress), when the first restart behind
/// `from` went on with the id `restarted`.
pub(super) fn judged(status: Outcome, xid: Xid, from: From, restarted: Option<Xid>) -> Outcome {
    let runs = status == Outcome::InProgress;
    match restarted {
        Some(next) if xid >= next && from.exact => Outcome::Aborted,
        // It may have been handed out behind that restart, or in front of it: once it has ended,
        // more may be known.
        Some(next) if xid >= next && runs => Outcome::InProgress,
        Some(next) if xid >= next => Outcome::Unknown,
        // Only what is prepared outlives a restart.
        Some(_) if runs => Outcome::Unknown,
        _ => status,
    }
}

/// Reads the first id behind a restart from the log's record of it, as `pg_walinspect` describes it
/// (`xlog_desc` in `src/backend/access/rmgrdesc/xlogdesc.c`: `xid EPOCH:XID`).
pub(super) fn next_id(description: &str) -> Option<Xid> {
    let mut parts = description.split("; ");
    let (epoch, xid) = parts
        .find_map(|p| p.strip_prefix("xid "))?
        .split_once(':')?;
    let (epoch, xid) = (epoch.parse::<u32>().ok()?, xid.parse::<u32>().ok()?);
    Some(Xid(u64::from(epoch) << 32 | u64::from(xid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Positions {
        let mut known = Positions::default();
        for (epoch, time) in [(1, 10), (1, 20), (1, 30), (2, 40)] {
            known.note(Epoch(epoch), (time, time + 1), Lsn(time * 100));
        }
        known
    }

    fn from(epoch: u64, since: u64, floor: Option<u64>, answered: u64) -> Option<(u64, bool)> {
        let life = Life {
            epoch: Epoch(epoch),
            since,
            floor: floor.map(Lsn),
            answered,
        };
        life.from(&known()).map(|f| (f.at.0, f.exact))
    }

    #[test]
    fn the_last_position_of_the_same_life_is_read_from() {
        assert_eq!(from(1, 5, None, 35), Some((3000, true)));
        assert_eq!(from(1, 5, None, 25), Some((2000, true)));
        // told too late: the server may have been another one by then
        assert_eq!(from(1, 5, None, 30), Some((2000, true)));
        // asked before the backend was there
        assert_eq!(from(1, 21, None, 30), Some((2000, false)));
        assert_eq!(from(1, 21, Some(2100), 30), Some((2100, true)));
        assert_eq!(from(1, 21, Some(2100), 35), Some((3000, true)));
        assert_eq!(from(1, 5, None, 9), None);
        assert_eq!(from(2, 5, None, 45), Some((4000, true)));
        assert_eq!(from(3, 5, None, 45), None);
        // the end of a page may be the middle of a record
        assert_eq!(from(1, 21, Some(2048), 30), Some((2000, false)));
        let mut known = known();
        known.note(Epoch(1), (31, 32), Lsn(8192));
        assert_eq!(known.before(Epoch(1), 35).map(|p| p.at), Some(Lsn(3000)));
    }

    #[test]
    fn an_id_that_was_free_again_is_not_believed() {
        let at = |exact| From { at: Lsn(1), exact };
        let next = Some(Xid(10));
        // the id, the next one behind the restart, what `committed` is worth, and `in progress`
        let table = [
            (9, true, None, (Outcome::Committed, Outcome::InProgress)),
            (9, true, next, (Outcome::Committed, Outcome::Unknown)),
            (10, true, next, (Outcome::Aborted, Outcome::Aborted)),
            (10, false, next, (Outcome::Unknown, Outcome::InProgress)),
            (9, false, next, (Outcome::Committed, Outcome::Unknown)),
        ];
        for (xid, exact, next, (committed, runs)) in table {
            let judge = |status| judged(status, Xid(xid), at(exact), next);
            assert_eq!(
                judge(Outcome::Committed),
                committed,
                "{xid} {exact} {next:?}"
            );
            assert_eq!(judge(Outcome::InProgress), runs, "{xid} {exact} {next:?}");
        }
    }

    #[test]
    fn the_next_id_is_read_from_the_record() {
        let text = "redo 0/15325A0; tli 1; prev tli 1; fpw true; xid 0:725; oid 24576; multi 1; \
                    offset 0; oldest xid 716 in DB 1; oldest multi 1 in DB 1; oldest/newest commit \
                    timestamp xid: 0/0; oldest running xid 0; shutdown";
        assert_eq!(next_id(text), Some(Xid(725)));
        assert_eq!(
            next_id(&text.replace("xid 0:725", "xid 2:3")),
            Some(Xid((2 << 32) + 3))
        );
        assert_eq!(next_id("redo 0/1; tli 1"), None);
    }

    #[test]
    fn old_positions_are_forgotten() {
        let mut known = Positions::default();
        for n in 0..1_000 {
            known.note(Epoch(1), (n, n), Lsn(n * 1024 + 8));
        }
        assert_eq!(known.0.len(), KEPT);
        let last = known.before(Epoch(1), 1_000).map(|p| p.at);
        assert_eq!(last, Some(Lsn(999 * 1024 + 8)));
        assert_eq!(known.before(Epoch(1), 10), None);
    }
}
