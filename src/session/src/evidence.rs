//! The mark that an autocommit transaction leaves in the write-ahead log.
//!
//! A transaction that is begun and ended by one request gives nobody a moment to ask for its id. So
//! a transactional logical message with its global id goes in front, in the same flight and the
//! same transaction: whoever finds the message in the log has the transaction's id, and whoever
//! reads the whole log since then without finding it knows that nothing was committed.
//! Pure: texts and bytes; reading the log is the engine's. The invariant: a mark stands in front
//! of everything in its request that may write.

use helios_api::{Lsn, Xid};

/// Prefix of our logical messages.
pub const PREFIX: &str = "helios";

/// Global id of a transaction: 64 random bits of its session, then a number that grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gtid(pub u128);

impl std::fmt::Display for Gtid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Hands out the ids of one session.
#[derive(Debug, Clone, Copy, Default)]
pub struct GtidSource {
    session: u64,
    last: u64,
}

impl GtidSource {
    /// For a session with these random bits.
    #[must_use]
    pub fn new(session: u64) -> Self {
        Self { session, last: 0 }
    }

    /// The next id.
    pub fn next_id(&mut self) -> Gtid {
        self.last += 1;
        Gtid(u128::from(self.session) << 64 | u128::from(self.last))
    }
}

/// A mark that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The transaction.
    pub gtid: Gtid,
    /// The log stood here, or further, when the mark was sent.
    pub floor: Lsn,
}

/// What became of a transaction with a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It committed.
    Committed,
    /// It did not, and never will.
    NotCommitted,
    /// Nobody can tell any more.
    Unknown,
}

/// Whether COMMIT PREPARED or ROLLBACK PREPARED did what it was to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It did.
    Yes,
    /// It did not, and never will.
    No,
    /// Nobody can tell any more.
    Unknown,
}

/// Reads a logical message as `pg_walinspect` describes it (`logicalmsg_desc` in
/// `src/backend/access/rmgrdesc/logicalmsgdesc.c`); `None` for what is not a mark of ours.
#[must_use]
pub fn described(description: &str) -> Option<Gtid> {
    let (head, payload) = description.split_once("; payload (16 bytes): ")?;
    let prefix = head.strip_prefix("transactional, prefix \"")?;
    if prefix.strip_suffix('"')? != PREFIX {
        return None;
    }
    let mut value = 0_u128;
    let mut count = 0;
    for byte in payload.split_ascii_whitespace() {
        value = value.checked_shl(8)? | u128::from(u8::from_str_radix(byte, 16).ok()?);
        count += 1;
    }
    (count == 16).then_some(Gtid(value))
}

/// The full transaction id behind the 32 bits that a log record holds: the nearest one to `next`, an
/// id that is handed out about now. Ids in use span less than half of 2^32.
#[must_use]
pub fn full_id(record: u32, next: Xid) -> Option<Xid> {
    let low = u32::try_from(next.0 & u64::from(u32::MAX)).ok()?;
    let distance = record.wrapping_sub(low).cast_signed();
    next.0.checked_add_signed(i64::from(distance)).map(Xid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_recognised_in_the_log() {
        let text = "transactional, prefix \"helios\"; payload (16 bytes): \
                    30 31 32 33 34 35 36 37 38 39 61 62 63 64 65 66";
        assert_eq!(
            described(text),
            Some(Gtid(u128::from_be_bytes(*b"0123456789abcdef")))
        );
        for other in [
            "non-transactional, prefix \"helios\"; payload (16 bytes): 00",
            "transactional, prefix \"helios2\"; payload (16 bytes): 30 31",
            "transactional, prefix \"helios\"; payload (3 bytes): 30 31 32",
            "transactional, prefix \"helios\"; payload (16 bytes): 30 31 32",
        ] {
            assert_eq!(described(other), None, "{other}");
        }
    }

    #[test]
    fn ids_are_completed_near_the_next_one() {
        let wrapped = 5_u64 << 32;
        assert_eq!(full_id(10, Xid(11)), Some(Xid(10)));
        // A server that was promoted has not heard of it.
        assert_eq!(full_id(12, Xid(11)), Some(Xid(12)));
        assert_eq!(full_id(u32::MAX, Xid(11)), None);
        assert_eq!(full_id(9, Xid(wrapped + 10)), Some(Xid(wrapped + 9)));
        assert_eq!(
            full_id(u32::MAX - 1, Xid(wrapped + 10)),
            Some(Xid(wrapped - 2))
        );
    }

    #[test]
    fn ids_do_not_repeat() {
        let mut source = GtidSource::new(7);
        let (a, b) = (source.next_id(), source.next_id());
        assert!(a < b);
        assert_eq!(a.to_string(), "00000000000000070000000000000001");
    }
}
