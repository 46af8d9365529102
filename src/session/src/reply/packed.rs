//! A whole reply in few bytes: what a journal holds of an answered exchange.
//!
//! Pure. A transaction may have hundreds of thousands of exchanges, and a [`Reply`] with its lists is
//! made for one that grows. The invariant: [`Reply::unpack`] gives what [`Reply::pack`] was given,
//! and equal bytes are equal replies. Bytes that were not packed here give a reply that equals none.

use super::{CommandResult, Outcome, Reply, Tag, fold};
use crate::TxnStatus;
use crate::kept::Kept;

impl Reply {
    /// Appends the reply, which must not be inside a message.
    pub fn pack(&self, to: &mut Vec<u8>) {
        to.push(self.status.map_or(0, TxnStatus::byte));
        number(to, self.messages);
        to.extend_from_slice(&self.shape.to_le_bytes());
        rows(to, self.rows, self.rows_hash);
        number(to, self.commands.len() as u64);
        for command in &self.commands {
            outcome(to, &command.outcome);
            rows(to, command.rows, command.rows_hash);
        }
        let (first, frames) = self.kept.packed();
        if !frames.is_empty() {
            number(to, first as u64);
            to.extend_from_slice(frames);
        }
    }

    /// The reply that was packed into these bytes.
    #[must_use]
    pub fn unpack(bytes: &[u8]) -> Self {
        let mut rest = Rest(bytes);
        rest.reply().unwrap_or_else(|| Self {
            // No server counts so far.
            messages: u64::MAX,
            ..Self::default()
        })
    }
}

/// Seven bits a byte, the lowest first; the highest bit says that there are more.
fn number(to: &mut Vec<u8>, mut value: u64) {
    loop {
        let low = u8::try_from(value & 0x7f).unwrap_or_default();
        value >>= 7;
        if value == 0 {
            return to.push(low);
        }
        to.push(low | 0x80);
    }
}

/// A count of rows and, unless there are none, their hash.
fn rows(to: &mut Vec<u8>, count: u64, hash: u128) {
    number(to, count);
    if count > 0 {
        to.extend_from_slice(&hash.to_le_bytes());
    }
}

/// A letter, and what belongs to it.
fn outcome(to: &mut Vec<u8>, outcome: &Outcome) {
    match outcome {
        Outcome::Complete(tag) => {
            to.extend_from_slice(&[b'C', tag.len]);
            to.extend_from_slice(tag.as_bytes());
        }
        Outcome::Error(code) => {
            to.push(b'E');
            to.extend_from_slice(code);
        }
        Outcome::Suspended => to.push(b's'),
        Outcome::Empty => to.push(b'I'),
    }
}

/// What is left to read.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn reply(&mut self) -> Option<Reply> {
        let status = match self.byte()? {
            0 => None,
            byte => Some(TxnStatus::from_byte(byte)?),
        };
        let mut reply = Reply {
            status,
            messages: self.number()?,
            shape: self.hash()?,
            ..Reply::default()
        };
        (reply.rows, reply.rows_hash) = self.rows()?;
        for _ in 0..self.number()? {
            let outcome = self.outcome()?;
            let (rows, rows_hash) = self.rows()?;
            reply.all_rows = fold(reply.all_rows, rows_hash);
            reply.commands.push(CommandResult {
                outcome,
                rows,
                rows_hash,
            });
        }
        if !self.0.is_empty() {
            let first = usize::try_from(self.number()?).ok()?;
            reply.kept = Kept::unpacked(first, self.0);
        }
        Some(reply)
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn number(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn hash(&mut self) -> Option<u128> {
        Some(u128::from_le_bytes(self.take(16)?.try_into().ok()?))
    }

    fn rows(&mut self) -> Option<(u64, u128)> {
        match self.number()? {
            0 => Some((0, 0)),
            count => Some((count, self.hash()?)),
        }
    }

    fn outcome(&mut self) -> Option<Outcome> {
        match self.byte()? {
            b'C' => {
                let len = usize::from(self.byte()?);
                Some(Outcome::Complete(Tag::new(self.take(len)?)))
            }
            b'E' => Some(Outcome::Error(self.take(5)?.try_into().ok()?)),
            b's' => Some(Outcome::Suspended),
            b'I' => Some(Outcome::Empty),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::frame;
    use super::*;
    use proptest::prelude::*;

    fn packed(reply: &Reply) -> Vec<u8> {
        let mut bytes = Vec::new();
        reply.pack(&mut bytes);
        bytes
    }

    /// A message of a reply, and whether it is added as one that comes in pieces.
    fn message() -> impl Strategy<Value = (u8, Vec<u8>, bool)> {
        let tags = prop::sample::select(b"TDDDCCEsIGHdWcntVZ12".to_vec());
        let body = prop_oneof![
            Just(b"INSERT 0 1\0".to_vec()),
            Just(b"SELECT 3\0".to_vec()),
            Just(b"SERROR\0C23505\0Mno\0\0".to_vec()),
            prop::collection::vec(any::<u8>(), 0..200),
        ];
        (tags, body, prop::bool::weighted(0.05))
    }

    proptest! {
        #[test]
        fn what_was_packed_comes_out(
            messages in prop::collection::vec(message(), 0..40),
            keeps in any::<bool>(),
            status in prop::sample::select(vec![None, Some(TxnStatus::Open), Some(TxnStatus::Failed)]),
        ) {
            let mut reply = Reply::default();
            for (tag, body, pieces) in &messages {
                let frame = frame(*tag, body);
                if keeps {
                    reply.keep(*tag, &frame);
                }
                if *pieces {
                    reply.begin_large(&frame[..5]);
                    reply.more_large(&frame[5..], true);
                } else {
                    reply.add(*tag, &frame);
                }
            }
            reply.status = status;
            reply.kept.settle();
            let bytes = packed(&reply);
            let again = Reply::unpack(&bytes);
            prop_assert_eq!(&again, &reply);
            prop_assert_eq!(&again.commands, &reply.commands);
            prop_assert_eq!(again.kept.commands(), reply.kept.commands());
            prop_assert_eq!(packed(&again), bytes);
        }

        #[test]
        fn nonsense_is_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Reply::unpack(&bytes);
        }
    }

    /// What a row that is inserted leaves behind.
    #[test]
    fn a_plain_statement_takes_little() {
        let mut reply = Reply::default();
        for (tag, body) in [(b'1', b"".as_slice()), (b'2', b""), (b'n', b"")] {
            reply.add(tag, &frame(tag, body));
        }
        reply.add(b'C', &frame(b'C', b"INSERT 0 1\0"));
        reply.status = Some(TxnStatus::Open);
        assert!(packed(&reply).len() <= 40, "{}", packed(&reply).len());
    }
}
