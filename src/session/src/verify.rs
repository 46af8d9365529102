//! Whether a replayed exchange gave what the client has seen (design rule 6).
//!
//! Pure. Equal digests are equal replies. Where they differ, tags, row counts and error codes must
//! still be the same, and rows may differ only where the mode and the isolation level allow it.

use crate::ReplayMode;
use crate::grammar::Kind;
use crate::reply::{Outcome, Reply};

/// Isolation level of the replayed transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// READ UNCOMMITTED (which PostgreSQL runs as READ COMMITTED) and READ COMMITTED.
    ReadCommitted,
    /// REPEATABLE READ and SERIALIZABLE: one snapshot, every result counts.
    Snapshot,
}

impl Isolation {
    /// From the value of `transaction_isolation`; anything unknown is the stricter.
    #[must_use]
    pub fn from_setting(value: &str) -> Self {
        match value {
            "read committed" | "read uncommitted" => Self::ReadCommitted,
            _ => Self::Snapshot,
        }
    }
}

/// Outcome of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The same, byte for byte.
    Same,
    /// Only rows of plain reads differ: right under READ COMMITTED in mode `transaction`, while the
    /// transaction has written nothing that could have been read.
    RowsDiffer,
    /// Something differs that the client has seen and can act on.
    Different(String),
}

/// Compares the reply that the client got with the one of the replay.
///
/// `kinds` are the exchange's statements, `locking` tells whether any statement of the transaction
/// takes row locks (a FETCH may then return locked rows).
#[must_use]
pub fn compare(
    seen: &Reply,
    replayed: &Reply,
    kinds: &[Kind],
    locking: bool,
    mode: ReplayMode,
) -> Verdict {
    for (before, now) in seen.commands.iter().zip(&replayed.commands) {
        if before.outcome != now.outcome || before.rows != now.rows {
            return Verdict::Different(format!(
                "{} instead of {}",
                describe(&now.outcome),
                describe(&before.outcome)
            ));
        }
    }
    if seen.commands.len() != replayed.commands.len() {
        return Verdict::Different(format!(
            "{} results instead of {}",
            replayed.commands.len(),
            seen.commands.len()
        ));
    }
    if seen.status != replayed.status {
        return Verdict::Different("transaction status differs".into());
    }
    if seen.shape != replayed.shape || seen.messages != replayed.messages {
        return Verdict::Different("columns of a result differ".into());
    }
    let differing = seen
        .commands
        .iter()
        .zip(&replayed.commands)
        .any(|(a, b)| a.rows_hash != b.rows_hash);
    if !differing && seen.digest() == replayed.digest() {
        return Verdict::Same;
    }
    if mode == ReplayMode::Select {
        return Verdict::Different("rows of a result differ".into());
    }
    let plain = kinds
        .iter()
        .all(|k| matches!(k, Kind::Read | Kind::Begin | Kind::Empty));
    if plain && !locking {
        Verdict::RowsDiffer
    } else {
        Verdict::Different("rows of a locking read or of RETURNING differ".into())
    }
}

/// Whether a transaction may have written something before its exchange `index`. A read behind
/// that may have seen it, and a difference may be one in what will be committed.
///
/// `kinds` are the statements of all its exchanges; `has_id` tells whether it has a transaction id.
#[must_use]
pub fn may_have_written(kinds: &[Vec<Kind>], index: usize, has_id: bool) -> bool {
    let writes = |kinds: &[Vec<Kind>]| kinds.iter().flatten().any(|k| !looks_only(*k));
    let before = kinds.get(..=index).unwrap_or(kinds);
    // An id without a statement that writes: a function that was called by a read did.
    has_id && (writes(before) || !writes(kinds))
}

fn looks_only(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Read | Kind::Begin | Kind::Empty | Kind::Harmless | Kind::Rollback
    )
}

fn describe(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Complete(tag) => String::from_utf8_lossy(tag.as_bytes()).into_owned(),
        Outcome::Error(code) => format!("error {}", String::from_utf8_lossy(code)),
        Outcome::Suspended => "a suspended portal".into(),
        Outcome::Empty => "an empty query".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TxnStatus;

    fn reply(rows: &[&[u8]], tag: &[u8]) -> Reply {
        let mut reply = Reply::default();
        for row in rows {
            reply.add(b'D', row);
        }
        let mut frame = b"C\0\0\0\0".to_vec();
        frame.extend_from_slice(tag);
        frame.push(0);
        reply.add(b'C', &frame);
        reply.status = Some(TxnStatus::Open);
        reply
    }

    #[test]
    fn what_was_written_may_have_been_read() {
        use Kind::{Begin, Read, Write};
        let kinds = [vec![Begin], vec![Read], vec![Write], vec![Read]];
        assert!(!may_have_written(&kinds, 1, true));
        assert!(may_have_written(&kinds, 3, true));
        assert!(!may_have_written(&kinds, 3, false));
        assert!(!may_have_written(&kinds[..2], 1, false));
        assert!(may_have_written(&kinds[..2], 1, true));
    }

    #[test]
    fn table() {
        use Kind::{LockingRead, Read, Write};
        use ReplayMode::{Select, Transaction};
        let one = reply(&[b"a"], b"SELECT 1");
        let other = reply(&[b"b"], b"SELECT 1");
        let two = reply(&[b"a", b"b"], b"SELECT 2");
        let same = |v: Verdict| v == Verdict::Same;
        let soft = |v: Verdict| v == Verdict::RowsDiffer;
        let hard = |v: Verdict| matches!(v, Verdict::Different(_));
        assert!(same(compare(&one, &one, &[Write], true, Select)));
        assert!(soft(compare(&one, &other, &[Read], false, Transaction)));
        assert!(hard(compare(&one, &other, &[Read], true, Transaction)));
        assert!(hard(compare(
            &one,
            &other,
            &[LockingRead],
            false,
            Transaction
        )));
        assert!(hard(compare(&one, &other, &[Write], false, Transaction)));
        assert!(hard(compare(
            &one,
            &other,
            &[Kind::Opaque],
            false,
            Transaction
        )));
        assert!(hard(compare(&one, &other, &[Read], false, Select)));
        assert!(hard(compare(&one, &two, &[Read], false, Transaction)));
        let mut failed = one.clone();
        failed.status = Some(TxnStatus::Failed);
        assert!(hard(compare(&one, &failed, &[Read], false, Transaction)));
    }
}
