//! What an agent must remember through its own death: `agent.json`.
//!
//! Written before it is acted on, whole or not at all: a temporary file, fsync, rename, fsync of
//! the folder. A file that cannot be read stops the agent; it never starts from nothing while a
//! data directory may be fenced.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use helios_api::agent::AgentError;
use helios_api::{Epoch, Lsn, Xid};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use crate::AgentFailure;
use crate::error::{failed, file_failed};

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

impl Durable {
    fn encode(&self) -> Result<Vec<u8>, AgentError> {
        serde_json::to_vec_pretty(self).map_err(failed)
    }
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
    path: PathBuf,
    record: Durable,
}

impl Store {
    /// Reads the record; a missing file is a new instance.
    pub(crate) fn open(path: PathBuf) -> Result<Self, AgentFailure> {
        let record = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| AgentFailure::StateFile {
                path: path.clone(),
                why: e.to_string(),
            })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Durable::default(),
            Err(e) => return Err(AgentFailure::file("could not read", &path, e)),
        };
        Ok(Self { path, record })
    }

    /// The record.
    pub(crate) fn get(&self) -> &Durable {
        &self.record
    }

    /// Changes the record. When this returns an error, nothing has changed.
    pub(crate) fn update(&mut self, change: impl FnOnce(&mut Durable)) -> Result<(), AgentError> {
        let mut next = self.record.clone();
        change(&mut next);
        if next == self.record {
            return Ok(());
        }
        let bytes = next.encode()?;
        write_whole(&self.path, &bytes)
            .map_err(file_failed("could not write state file", &self.path))?;
        self.record = next;
        Ok(())
    }

    /// Writes a changed record while the caller does something else. What it resolves to becomes
    /// the record with [`Store::written`]; no other change may come between.
    pub(crate) fn write_aside(
        &self,
        change: impl FnOnce(&mut Durable),
    ) -> JoinHandle<Result<Durable, AgentError>> {
        let mut next = self.record.clone();
        change(&mut next);
        let path = self.path.clone();
        tokio::task::spawn_blocking(move || {
            let bytes = next.encode()?;
            write_whole(&path, &bytes).map_err(file_failed("could not write state file", &path))?;
            Ok(next)
        })
    }

    /// Takes over a record that [`Store::write_aside`] has written.
    pub(crate) fn written(&mut self, record: Durable) {
        self.record = record;
    }
}

/// Replaces a file's content, whole or not at all, through a crash of the machine too.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
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
        std::fs::write(&path, "{\"epoch\":").unwrap();
        assert!(matches!(
            Store::open(path),
            Err(AgentFailure::StateFile { .. })
        ));
    }
}
