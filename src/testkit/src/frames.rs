//! Boundaries of the wire protocol's messages, counted as bytes pass. Pure.

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes, so that a message can be cut in its middle.
    Bytes,
    /// Whole messages.
    Messages,
}

/// Follows one way of a connection behind its start-up packet.
#[derive(Debug, Default)]
pub struct Counter {
    /// Bytes of the message's header that have been seen: type and length.
    header: Vec<u8>,
    /// Bytes of its body that are still to come.
    body: u64,
    left: Option<(Unit, u64)>,
    tag: Option<u8>,
    last: Option<u8>,
}

impl Counter {
    /// Type of the last whole message that passed.
    #[must_use]
    pub fn last(&self) -> Option<u8> {
        self.last
    }

    /// So many may still pass; `None`: all.
    pub fn limit(&mut self, left: Option<(Unit, u64)>) {
        self.left = left;
    }

    /// Whether the limit has been reached.
    #[must_use]
    pub fn is_used_up(&self) -> bool {
        matches!(self.left, Some((_, 0)))
            && (matches!(self.left, Some((Unit::Bytes, _))) || self.at_boundary())
    }

    fn at_boundary(&self) -> bool {
        self.header.is_empty() && self.body == 0
    }

    /// Takes note of bytes; returns how many of them may pass.
    pub fn pass(&mut self, bytes: &[u8]) -> usize {
        for (at, byte) in bytes.iter().enumerate() {
            if self.is_used_up() {
                return at;
            }
            self.step(*byte);
            if let Some((Unit::Bytes, left)) = &mut self.left {
                *left = left.saturating_sub(1);
            }
        }
        bytes.len()
    }

    fn step(&mut self, byte: u8) {
        if self.body > 0 {
            self.body -= 1;
        } else {
            self.header.push(byte);
            self.tag = self.header.first().copied();
            if let [_, length @ ..] = self.header.as_slice()
                && let Ok(length) = <[u8; 4]>::try_from(length)
            {
                self.body = u64::from(u32::from_be_bytes(length)).saturating_sub(4);
                self.header.clear();
            } else {
                return;
            }
        }
        if self.body > 0 {
            return;
        }
        self.last = self.tag;
        if let Some((Unit::Messages, left)) = &mut self.left {
            *left = left.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of 7 bytes, one of 5, one of 6.
    const THREE: &[u8] = &[
        b'Q', 0, 0, 0, 6, b'x', 0, b'S', 0, 0, 0, 4, b'Z', 0, 0, 0, 5, b'I',
    ];

    fn passed(unit: Unit, limit: u64, piece: usize) -> usize {
        let mut counter = Counter::default();
        counter.limit(Some((unit, limit)));
        let mut passed = 0;
        for bytes in THREE.chunks(piece) {
            let some = counter.pass(bytes);
            passed += some;
            if some < bytes.len() {
                break;
            }
        }
        passed
    }

    #[test]
    fn counts_messages_and_bytes_in_any_pieces() {
        for piece in 1..=THREE.len() {
            assert_eq!(passed(Unit::Messages, 1, piece), 7);
            assert_eq!(passed(Unit::Messages, 2, piece), 12);
            assert_eq!(passed(Unit::Messages, 3, piece), 18);
            assert_eq!(passed(Unit::Bytes, 9, piece), 9);
            assert_eq!(passed(Unit::Bytes, 99, piece), 18);
            assert_eq!(passed(Unit::Messages, 0, piece), 0);
        }
    }

    #[test]
    fn a_limit_counts_from_when_it_was_set() {
        let mut counter = Counter::default();
        assert_eq!(counter.pass(&THREE[..3]), 3);
        counter.limit(Some((Unit::Messages, 1)));
        assert_eq!(counter.pass(&THREE[3..]), 4);
        assert!(counter.is_used_up());
        assert_eq!(counter.last(), Some(b'Q'));
    }
}
