//! What a server answered to one exchange, condensed: tags, counts, codes and hashes.
//!
//! Results are hashed as they pass (128-bit XXH3 over the wire bytes); none is held but a few small
//! rows of statements that insert ([`crate::kept`]). What differs
//! between two servers without being data is left out: text of errors, table OIDs in row
//! descriptions.

mod packed;

use helios_wire::backend;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::TxnStatus;
use crate::kept::Kept;

/// Longest command tag that is kept (`COMPLETION_TAG_BUFSIZE` is 64 in PostgreSQL, with the zero).
pub const MAX_TAG: usize = 63;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// CommandComplete, with its tag (row count included).
    Complete(Tag),
    /// ErrorResponse, with its SQLSTATE.
    Error([u8; 5]),
    /// PortalSuspended.
    Suspended,
    /// EmptyQueryResponse.
    Empty,
}

/// A command tag.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    len: u8,
    text: [u8; MAX_TAG],
}

impl Tag {
    /// Keeps a tag; a longer one is cut.
    #[must_use]
    pub fn new(tag: &[u8]) -> Self {
        let len = tag.len().min(MAX_TAG);
        let mut text = [0; MAX_TAG];
        text[..len].copy_from_slice(&tag[..len]);
        Self {
            len: u8::try_from(len).unwrap_or(0),
            text,
        }
    }

    /// The tag.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.text[..usize::from(self.len)]
    }
}

impl std::fmt::Debug for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.as_bytes()))
    }
}

/// One command of an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandResult {
    /// How it ended.
    pub outcome: Outcome,
    /// Rows (or copy data messages) that it returned.
    pub rows: u64,
    /// Their hash, in order.
    pub rows_hash: u128,
}

/// A reply as one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest {
    messages: u64,
    shape: u128,
    finished_rows: u128,
    open_rows: (u64, u128),
}

/// The reply to one exchange, as far as it has come.
#[derive(Clone, Default)]
pub struct Reply {
    /// Finished commands.
    pub commands: Vec<CommandResult>,
    /// Hash of everything but rows.
    pub shape: u128,
    /// Messages, without the asynchronous ones.
    pub messages: u64,
    /// Hash of the rows of all finished commands.
    all_rows: u128,
    rows: u64,
    rows_hash: u128,
    large: Option<Box<Xxh3>>,
    /// Small rows, where [`Self::keep`] was called for them.
    pub kept: Kept,
    /// Status at the end.
    pub status: Option<TxnStatus>,
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reply")
            .field("commands", &self.commands)
            .field("digest", &self.digest())
            .field("status", &self.status)
            .finish()
    }
}

impl PartialEq for Reply {
    fn eq(&self, other: &Self) -> bool {
        self.digest() == other.digest() && self.status == other.status
    }
}

fn fold(chain: u128, hash: u128) -> u128 {
    let mut pair = [0_u8; 32];
    pair[..16].copy_from_slice(&chain.to_le_bytes());
    pair[16..].copy_from_slice(&hash.to_le_bytes());
    xxh3_128(&pair)
}

impl Reply {
    /// Keeps a message's rows, if they are few and small; to be called before [`Self::add`].
    pub fn keep(&mut self, tag: u8, frame: &[u8]) {
        match tag {
            backend::DATA_ROW | backend::ROW_DESCRIPTION => {
                self.kept.add(tag, frame, self.commands.len());
            }
            backend::COMMAND_COMPLETE => self.kept.end(frame.get(5..), self.rows),
            backend::PORTAL_SUSPENDED => self.kept.suspend(self.rows),
            backend::ERROR_RESPONSE | backend::EMPTY_QUERY_RESPONSE => self.kept.end(None, 0),
            _ => {}
        }
    }

    /// Adds a whole message.
    pub fn add(&mut self, tag: u8, frame: &[u8]) {
        self.messages += 1;
        match tag {
            backend::DATA_ROW | backend::COPY_DATA => {
                self.rows += 1;
                self.rows_hash = fold(self.rows_hash, xxh3_128(frame));
            }
            backend::COMMAND_COMPLETE => {
                let tag = frame
                    .get(5..frame.len().saturating_sub(1))
                    .unwrap_or_default();
                self.end(Outcome::Complete(Tag::new(tag)), frame);
            }
            backend::ERROR_RESPONSE => {
                let code = sqlstate(frame);
                self.end(Outcome::Error(code), &code);
            }
            backend::PORTAL_SUSPENDED => self.end(Outcome::Suspended, frame),
            backend::EMPTY_QUERY_RESPONSE => self.end(Outcome::Empty, frame),
            backend::ROW_DESCRIPTION => {
                self.shape = fold(self.shape, row_description_hash(frame));
            }
            _ => self.shape = fold(self.shape, xxh3_128(frame)),
        }
    }

    fn end(&mut self, outcome: Outcome, frame: &[u8]) {
        self.commands.push(CommandResult {
            outcome,
            rows: self.rows,
            rows_hash: self.rows_hash,
        });
        self.shape = fold(self.shape, xxh3_128(frame));
        self.all_rows = fold(self.all_rows, self.rows_hash);
        self.rows = 0;
        self.rows_hash = 0;
    }

    /// Begins a message that comes in pieces (a large row).
    pub fn begin_large(&mut self, first: &[u8]) {
        self.kept.spoil();
        let mut hasher = Box::new(Xxh3::new());
        hasher.update(first);
        self.large = Some(hasher);
    }

    /// Adds a piece of it; `last` ends it.
    pub fn more_large(&mut self, piece: &[u8], last: bool) {
        let Some(hasher) = self.large.as_mut() else {
            return;
        };
        hasher.update(piece);
        if last {
            let hash = hasher.digest128();
            self.large = None;
            self.messages += 1;
            self.rows += 1;
            self.rows_hash = fold(self.rows_hash, hash);
        }
    }

    /// Whether a large message has begun and not ended.
    #[must_use]
    pub fn inside_message(&self) -> bool {
        self.large.is_some()
    }

    /// Everything so far, as one value: two replies with the same digest are the same.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest {
            messages: self.messages,
            shape: self.shape,
            finished_rows: self.all_rows,
            open_rows: (self.rows, self.rows_hash),
        }
    }

    /// Rows of the command that has not ended yet.
    #[must_use]
    pub fn open_rows(&self) -> u64 {
        self.rows
    }

    /// Whether a command with this tag has completed.
    #[must_use]
    pub fn completed(&self, tag: &[u8]) -> bool {
        self.commands
            .iter()
            .any(|c| matches!(&c.outcome, Outcome::Complete(t) if t.as_bytes() == tag))
    }

    /// Whether the server could not read the text, and did nothing.
    #[must_use]
    pub fn is_syntax_error(&self) -> bool {
        let [only] = self.commands.as_slice() else {
            return false;
        };
        only.outcome == Outcome::Error(*b"42601")
    }

    /// Whether the server answered with an error.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.commands
            .iter()
            .any(|c| matches!(c.outcome, Outcome::Error(_)))
    }
}

/// The SQLSTATE of an ErrorResponse frame; `XX000` when it has none.
#[must_use]
pub fn sqlstate(frame: &[u8]) -> [u8; 5] {
    let mut rest = frame.get(5..).unwrap_or_default();
    while let [field, tail @ ..] = rest {
        if *field == 0 {
            break;
        }
        let end = tail.iter().position(|b| *b == 0).unwrap_or(tail.len());
        if *field == b'C'
            && let Ok(code) = tail[..end].try_into()
        {
            return code;
        }
        rest = tail.get(end + 1..).unwrap_or_default();
    }
    *b"XX000"
}

/// Hash of a RowDescription without the OID of the table that a column comes from: a temporary
/// table made again has another one.
#[must_use]
pub fn row_description_hash(frame: &[u8]) -> u128 {
    let mut hasher = Xxh3::new();
    let mut rest = frame.get(7..).unwrap_or_default();
    hasher.update(frame.get(5..7).unwrap_or_default());
    while let Some(end) = rest.iter().position(|b| *b == 0) {
        // name, 0, table OID (4), column number (2), then type OID (4), size (2), modifier (4),
        // format (2)
        let (Some(name), Some(kind)) = (rest.get(..=end), rest.get(end + 7..end + 19)) else {
            hasher.update(rest);
            break;
        };
        hasher.update(name);
        hasher.update(kind);
        rest = rest.get(end + 19..).unwrap_or_default();
    }
    hasher.digest128()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A whole message.
    pub(super) fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        out.extend_from_slice(body);
        out
    }

    #[test]
    fn rows_and_order_count() {
        let mut a = Reply::default();
        let mut b = Reply::default();
        for (x, y) in [(b"1", b"2"), (b"2", b"1")] {
            a.add(b'D', &frame(b'D', x));
            b.add(b'D', &frame(b'D', y));
        }
        assert_ne!(a, b);
        assert_eq!(a.open_rows(), 2);
        a.add(b'C', &frame(b'C', b"SELECT 2\0"));
        assert_eq!(a.commands[0].rows, 2);
        assert!(a.completed(b"SELECT 2"));
        b.add(b'C', &frame(b'C', b"SELECT 2\0"));
        assert_eq!(a.shape, b.shape);
        assert_ne!(a, b, "rows of finished commands count");
    }

    #[test]
    fn errors_are_compared_by_sqlstate_alone() {
        let mut a = Reply::default();
        let mut b = Reply::default();
        a.add(b'E', &frame(b'E', b"SERROR\0C23505\0Mone\0\0"));
        b.add(b'E', &frame(b'E', b"SERROR\0C23505\0Mtwo\0\0"));
        assert_eq!(a, b);
        assert!(a.failed());
    }

    #[test]
    fn table_oids_do_not_count_but_types_do() {
        let column = |table: u32, kind: u32| {
            let mut body = vec![0, 1];
            body.extend_from_slice(b"a\0");
            body.extend_from_slice(&table.to_be_bytes());
            body.extend_from_slice(&1_u16.to_be_bytes());
            body.extend_from_slice(&kind.to_be_bytes());
            body.extend_from_slice(&[0; 8]);
            row_description_hash(&frame(b'T', &body))
        };
        assert_eq!(column(1, 23), column(2, 23));
        assert_ne!(column(1, 23), column(1, 25));
    }

    #[test]
    fn large_rows_hash_like_themselves() {
        let row = frame(b'D', &[7; 1000]);
        let mut pieces = Reply::default();
        pieces.begin_large(&row[..10]);
        assert!(pieces.inside_message());
        pieces.more_large(&row[10..], true);
        let mut whole = Reply::default();
        whole.add(b'D', &row);
        assert_eq!(pieces, whole);
    }
}
