//! The few small rows that an exchange inside a transaction gave, as they came.
//!
//! Results are hashed, not held ([`crate::reply`]); what a statement that inserts returned is the
//! exception, because a replay must give the same values of sequences again
//! ([`crate::sequences`]). The invariant: bounded, and nothing allocated for an exchange without
//! rows.

use helios_wire::{backend, peek_header};

/// Most bytes of rows that are kept of one exchange.
pub const ROW_BYTES: usize = 2048;

/// Longest row description that is kept.
pub const COLUMN_BYTES: usize = 4096;

/// Most rows of one SELECT that are kept.
const SELECT_ROWS: u64 = 8;

/// The end of a command among the frames.
const END: [u8; 5] = [backend::COMMAND_COMPLETE, 0, 0, 0, 4];

/// Row descriptions and rows, in the order in which they came.
#[derive(Debug, Clone, Default)]
pub struct Kept {
    frames: Vec<u8>,
    /// Where the frames of the command that runs begin.
    start: usize,
    row_bytes: usize,
    /// Number of the command that the first frames belong to.
    first: usize,
    /// The command that runs has given too much.
    over: bool,
}

/// What is kept of one command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptCommand<'a> {
    /// Its number in the exchange, from 0.
    pub index: usize,
    /// The row description (a whole frame) that came since the command before.
    pub columns: Option<&'a [u8]>,
    /// Its rows, whole frames.
    pub rows: Vec<&'a [u8]>,
}

impl Kept {
    /// Takes a RowDescription or DataRow of the exchange's command number `command`.
    pub fn add(&mut self, tag: u8, frame: &[u8], command: usize) {
        if self.over {
            return;
        }
        let row = tag == backend::DATA_ROW;
        let fits = if row {
            self.row_bytes + frame.len() <= ROW_BYTES
        } else {
            frame.len() <= COLUMN_BYTES && self.frames.len() <= ROW_BYTES + 2 * COLUMN_BYTES
        };
        if !fits {
            return self.spoil();
        }
        if self.frames.is_empty() {
            self.first = command;
        }
        if row {
            self.row_bytes += frame.len();
        }
        self.frames.extend_from_slice(frame);
    }

    /// Forgets the command that runs.
    pub fn spoil(&mut self) {
        self.over = true;
        self.frames.truncate(self.start);
    }

    /// The command that runs has ended, with a tag, having returned `rows`.
    pub fn end(&mut self, tag: Option<&[u8]>, rows: u64) {
        let wanted = tag.is_some_and(|t| {
            rows > 0 && (inserts(t) || (t.starts_with(b"SELECT") && rows <= SELECT_ROWS))
        });
        self.finish(wanted);
    }

    /// The command that runs has stopped at its limit of rows, having returned `rows`. Drivers
    /// read one row so; which command it is, no tag tells.
    pub fn suspend(&mut self, rows: u64) {
        self.finish(rows > 0 && rows <= SELECT_ROWS);
    }

    fn finish(&mut self, wanted: bool) {
        if !wanted {
            self.frames.truncate(self.start);
        }
        self.over = false;
        if self.frames.is_empty() {
            self.frames = Vec::new();
        } else {
            self.frames.extend_from_slice(&END);
        }
        self.start = self.frames.len();
    }

    /// The exchange has ended: gives back what is not needed.
    pub fn settle(&mut self) {
        self.frames.truncate(self.start);
        self.frames.shrink_to_fit();
    }

    /// What there is, for [`Self::unpacked`]: the number of the first command, and frames.
    #[must_use]
    pub(crate) fn packed(&self) -> (usize, &[u8]) {
        (self.first, &self.frames)
    }

    /// What was settled and packed.
    #[must_use]
    pub(crate) fn unpacked(first: usize, frames: &[u8]) -> Self {
        Self {
            frames: frames.to_vec(),
            start: frames.len(),
            first,
            ..Self::default()
        }
    }

    /// Whether nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Heap bytes held.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        self.frames.capacity()
    }

    /// The commands with rows.
    #[must_use]
    pub fn commands(&self) -> Vec<KeptCommand<'_>> {
        let mut out = Vec::new();
        let mut rest = self.frames.as_slice();
        let mut index = self.first;
        let (mut columns, mut rows) = (None, Vec::new());
        while let Ok(Some(header)) = peek_header(rest) {
            let Some((frame, tail)) = rest.split_at_checked(header.len) else {
                break;
            };
            match header.tag {
                backend::ROW_DESCRIPTION => columns = Some(frame),
                backend::DATA_ROW => rows.push(frame),
                _ => {
                    let (columns, rows) = (columns.take(), std::mem::take(&mut rows));
                    if !rows.is_empty() {
                        out.push(KeptCommand {
                            index,
                            columns,
                            rows,
                        });
                    }
                    index += 1;
                }
            }
            rest = tail;
        }
        out
    }
}

/// Whether a command with this tag makes rows, and may take values from sequences for them.
#[must_use]
pub fn inserts(tag: &[u8]) -> bool {
    tag.starts_with(b"INSERT") || tag.starts_with(b"MERGE")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(tag: u8, len: usize) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend_from_slice(&u32::try_from(len + 4).unwrap().to_be_bytes());
        out.resize(len + 5, 7);
        out
    }

    #[test]
    fn a_suspended_portal_keeps_a_few_rows() {
        let mut kept = Kept::default();
        kept.add(b'D', &frame(b'D', 5), 0);
        kept.suspend(1);
        assert_eq!(kept.commands().len(), 1);
        kept.add(b'D', &frame(b'D', 5), 1);
        kept.suspend(SELECT_ROWS + 1);
        assert_eq!(kept.commands().len(), 1);
    }

    #[test]
    fn small_results_of_inserts_stay() {
        let mut kept = Kept::default();
        kept.end(Some(b"BEGIN"), 0);
        assert_eq!(kept.heap_bytes(), 0);
        kept.add(b'T', &frame(b'T', 9), 1);
        kept.add(b'D', &frame(b'D', 5), 1);
        kept.add(b'D', &frame(b'D', 6), 1);
        kept.end(Some(b"INSERT 0 2"), 2);
        kept.add(b'T', &frame(b'T', 9), 2);
        kept.add(b'D', &frame(b'D', 5), 2);
        kept.end(Some(b"UPDATE 1"), 1);
        kept.add(b'D', &frame(b'D', 4), 3);
        kept.end(Some(b"SELECT 1"), 1);
        kept.add(b'T', &frame(b'T', 9), 4);
        kept.settle();
        let commands = kept.commands();
        assert_eq!(commands.len(), 2);
        assert_eq!((commands[0].index, commands[0].rows.len()), (1, 2));
        assert!(commands[0].columns.is_some());
        assert_eq!((commands[1].index, commands[1].rows.len()), (3, 1));
        assert!(commands[1].columns.is_none());
    }

    #[test]
    fn large_results_do_not() {
        let mut kept = Kept::default();
        for _ in 0..1000 {
            kept.add(b'D', &frame(b'D', 100), 0);
        }
        kept.end(Some(b"INSERT 0 1000"), 1000);
        assert!(kept.is_empty());
        assert_eq!(kept.heap_bytes(), 0);
        kept.add(b'D', &frame(b'D', 5), 1);
        kept.end(Some(b"SELECT 9"), 9);
        assert!(kept.is_empty());
    }
}
