//! What an agent must remember through its own death: `agent.json`.
//!
//! Written before it is acted on, whole or not at all ([`RecordFile`]). A file that cannot be read
//! stops the agent; it never starts from nothing while a data directory may be fenced.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use helios_api::agent::AgentError;
use helios_api::{Epoch, Lsn, Xid};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use crate::AgentFailure;
use crate::error::{failed, file_failed};
use crate::record::RecordFile;

/// The record itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Durable {
    /// Latest epoch seen.
    pub(crate) epoch: Epoch,
    /// The epoch whose fence is on: nothing of this epoch or an earlier one makes the instance
    /// writable.
    #[serde(default)]
    pub(crate) fenced_at: Option<Epoch>,
    /// The last promotion, so that the same command gets the same answer.
    #[serde(default)]
    pub(crate) promotion: Option<Promotion>,
    /// `pg_rewind` began and has not ended: the data directory may be half of each.
    #[serde(default)]
    pub(crate) torn: bool,
}

/// A promotion that was begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Promotion {
    /// The epoch that it begins.
    pub(crate) epoch: Epoch,
    /// What was read in recovery; worth something only if the new timeline begins there.
    #[serde(default)]
    pub(crate) evidence: Option<Evidence>,
}

/// A position in recovery, and the first id that was not completed when everything up to it had
/// been replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Evidence {
    pub(crate) replayed: Lsn,
    pub(crate) xid: Xid,
}

/// The record and the file it lives in.
#[derive(Debug)]
pub(crate) struct Store {
    record: Durable,
    file: Arc<Writer>,
    /// Number of the last write.
    writes: u64,
}

/// The file, written by one at a time and never with an older record over a newer one: a write
/// that was begun aside may come late.
#[derive(Debug)]
struct Writer {
    path: PathBuf,
    written: Mutex<(u64, RecordFile)>,
}

impl Writer {
    /// Whether the write of this number is on the disk.
    fn holds(&self, number: u64) -> bool {
        self.lock().0 == number
    }

    fn write(&self, number: u64, record: &Durable) -> Result<(), AgentError> {
        let (written, file) = &mut *self.lock();
        if number > *written {
            file.write(record)
                .map_err(file_failed("could not write state file", &self.path))?;
            *written = number;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, (u64, RecordFile)> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Reads the record; a missing file is a new instance.
    pub(crate) fn open(path: PathBuf) -> Result<Self, AgentFailure> {
        let (file, record) =
            RecordFile::open::<Durable>(path.clone()).map_err(|e| match e.kind() {
                ErrorKind::InvalidData | ErrorKind::UnexpectedEof => AgentFailure::StateFile {
                    path: path.clone(),
                    why: e.to_string(),
                },
                _ => AgentFailure::file("could not read", &path, e),
            })?;
        Ok(Self {
            record: record.unwrap_or_default(),
            file: Arc::new(Writer {
                path,
                written: Mutex::new((0, file)),
            }),
            writes: 0,
        })
    }

    /// The record.
    pub(crate) fn get(&self) -> &Durable {
        &self.record
    }

    /// Changes the record, durably when it returns.
    pub(crate) fn update(&mut self, change: impl FnOnce(&mut Durable)) -> Result<(), AgentError> {
        match self.change(change) {
            Some((number, record)) => self.file.write(number, &record),
            None => Ok(()),
        }
    }

    /// Changes the record at once and writes it while the caller does something else, which must
    /// be harmless should it never become durable.
    pub(crate) fn update_aside(&mut self, change: impl FnOnce(&mut Durable)) -> Pending {
        Pending(self.change(change).map(|(number, record)| {
            let file = Arc::clone(&self.file);
            tokio::task::spawn_blocking(move || file.write(number, &record))
        }))
    }

    /// What has to be written. In memory the change counts even if writing fails: a later epoch and
    /// a fence only ever refuse more.
    fn change(&mut self, change: impl FnOnce(&mut Durable)) -> Option<(u64, Durable)> {
        let before = self.record.clone();
        change(&mut self.record);
        if self.record == before && self.file.holds(self.writes) {
            return None;
        }
        self.writes += 1;
        Some((self.writes, self.record.clone()))
    }
}

/// A record on its way to the disk.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Pending(Option<JoinHandle<Result<(), AgentError>>>);

impl Pending {
    /// Resolves when the record is durable.
    pub(crate) async fn done(self) -> Result<(), AgentError> {
        match self.0 {
            Some(writing) => writing.await.map_err(failed)?,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_and_refuses_a_damaged_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.json");
        let mut store = Store::open(path.clone()).unwrap();
        assert_eq!(store.get(), &Durable::default());
        store.update(|d| d.epoch = Epoch(7)).unwrap();
        assert_eq!(Store::open(path.clone()).unwrap().get().epoch, Epoch(7));
        // One that comes late does not undo a later one.
        let late = Durable {
            epoch: Epoch(6),
            ..Durable::default()
        };
        store.file.write(1, &late).unwrap();
        assert_eq!(Store::open(path.clone()).unwrap().get().epoch, Epoch(7));
        std::fs::write(&path, "{\"epoch\":").unwrap();
        assert!(matches!(
            Store::open(path),
            Err(AgentFailure::StateFile { .. })
        ));
    }
}
