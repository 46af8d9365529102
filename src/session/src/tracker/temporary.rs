//! What a session's temporary tables were as of, and who made them.

use std::collections::BTreeMap;

use super::{MAX_CUSTOM, Tracker};
use crate::temporary::{OnCommit, made};

impl Tracker {
    /// Remembers the temporary tables that these texts make.
    pub(super) fn note_temporary(&mut self, texts: &[String]) {
        if self.temporary.len() < MAX_CUSTOM {
            self.temporary.extend(texts.iter().flat_map(|t| made(t)));
        }
    }

    /// Temporary tables that statements of this session have made, and what ON COMMIT does to them.
    #[must_use]
    pub fn temporary(&self) -> &BTreeMap<String, OnCommit> {
        &self.temporary
    }

    /// Whether statements of this session have asked for `currval` or `lastval`.
    #[must_use]
    pub fn asks_last_values(&self) -> bool {
        self.asks_last_values
    }

    /// Number of the last exchange.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether all exchanges behind this number are in the journal, or in flight: what was known
    /// then, with them, is what is now.
    #[must_use]
    pub fn covers_since(&self, sequence: u64) -> bool {
        let records = self.journal.records().first().map(|r| r.sequence);
        let in_flight = self.journal.in_flight().front().map(|e| e.sequence);
        match records.or(in_flight) {
            Some(first) => first == sequence + 1,
            None => self.sequence == sequence,
        }
    }
}
