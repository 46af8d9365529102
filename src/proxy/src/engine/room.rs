//! Room for a session's journal: memory first, then a file, both within limits.
//!
//! The invariant: what a journal holds is accounted for before its session goes on, or the journal
//! is given up as a whole.

use std::path::PathBuf;
use std::sync::Arc;

use helios_api::protection::Unprotected;
use helios_journal::{Account, Overflow, Pool, SpillFile};
use helios_session::journal::Journal;

use super::shared::EngineOptions;

/// Where journals go that are too large for memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpillOptions {
    /// Folder of the files; they have no names in it.
    pub folder: PathBuf,
    /// Most bytes of one session.
    pub max_bytes: usize,
    /// Most bytes of all sessions together.
    pub max_total_bytes: usize,
}

/// What one session's journal may hold and holds.
#[derive(Debug)]
pub struct Room {
    memory: Account,
    /// The last journal that was accounted for is on disk.
    spilled: bool,
    disk: Box<Disk>,
}

#[derive(Debug)]
struct Disk {
    account: Account,
    options: Option<Arc<SpillOptions>>,
}

impl Room {
    /// Of two pools: memory, at most `max_bytes` of it, and disk.
    #[must_use]
    pub fn new(
        memory: &Arc<Pool>,
        max_bytes: usize,
        disk: &Arc<Pool>,
        spill: Option<&Arc<SpillOptions>>,
    ) -> Self {
        Self {
            memory: memory.account(max_bytes),
            spilled: false,
            disk: Box::new(Disk {
                account: disk.account(spill.map_or(0, |s| s.max_bytes)),
                options: spill.cloned(),
            }),
        }
    }

    /// Bytes held, in memory and on disk.
    #[must_use]
    pub fn used(&self) -> usize {
        self.memory.used() + self.disk.account.used()
    }

    /// Bytes held in memory.
    #[must_use]
    pub fn in_memory(&self) -> usize {
        self.memory.used()
    }

    /// Whether the accounts say what the journal holds.
    #[must_use]
    pub fn is_right(&self, journal: &Journal) -> bool {
        let spilled = journal.is_spilled();
        let same = journal.bytes() == self.memory.used() && spilled == self.spilled;
        // A place that has refused something is one elsewhere.
        let quiet = !spilled
            || (journal.spilled_bytes() == self.disk.account.used() && !journal.is_refused());
        same && quiet
    }

    /// Accounts for what the journal holds; it goes to disk when memory does not suffice.
    ///
    /// # Errors
    /// There is no room: the journal is to be given up, for this reason.
    pub fn hold(&mut self, journal: &mut Journal) -> Result<(), (Unprotected, String)> {
        if let Some(why) = journal.take_refusal() {
            return Err((Unprotected::JournalLimit, why));
        }
        if let Err(full) = self.memory.set(journal.bytes()) {
            if let Err(why) = spill(self.disk.options.as_deref(), journal) {
                return Err((reason(full), join(full, &why)));
            }
            let left = self.memory.set(journal.bytes());
            let without =
                |full| format!("{full} without its messages and answers, which are on disk");
            left.map_err(|full| (reason(full), without(full)))?;
        }
        self.spilled = journal.is_spilled();
        let disk = self.disk.account.set(journal.spilled_bytes());
        disk.map_err(|full| (reason(full), format!("{full} on disk")))
    }

    /// Takes note of what is left of a journal that was given up.
    pub fn shrink(&mut self, journal: &Journal) {
        // Less than before always fits.
        let _ = self.memory.set(journal.bytes());
        let _ = self.disk.account.set(journal.spilled_bytes());
        self.spilled = journal.is_spilled();
    }
}

/// Moves a journal's messages and answers to disk.
///
/// # Errors
/// Why not; empty where it is not to be done.
fn spill(options: Option<&SpillOptions>, journal: &mut Journal) -> Result<(), String> {
    if journal.is_spilled() {
        return Ok(());
    }
    let Some(options) = options else {
        return Err(String::new());
    };
    let folder = options.folder.display();
    let file = || {
        SpillFile::create(&options.folder, options.max_bytes)
            .map_err(|e| format!("no file for it in \"{folder}\": {e}"))
    };
    journal.spill(Box::new(file()?), Box::new(file()?))?;
    tracing::debug!(bytes = journal.spilled_bytes(), "a journal went to disk");
    Ok(())
}

/// The same for the journal of a replay, which is not accounted for before it is the session's: it
/// holds what the one before it holds. Without room it says so when it is accounted for.
pub(super) fn keep_small(options: &EngineOptions, journal: &mut Journal) {
    if journal.bytes() > options.max_journal_bytes
        && let Err(error) = spill(options.spill.as_deref(), journal)
    {
        tracing::debug!(%error, "the journal of a replay stays in memory");
    }
}

fn reason(overflow: Overflow) -> Unprotected {
    match overflow {
        Overflow::Session(_) => Unprotected::JournalLimit,
        Overflow::Total(_) => Unprotected::JournalTotalLimit,
    }
}

fn join(full: Overflow, why: &str) -> String {
    match why.is_empty() {
        true => full.to_string(),
        false => format!("{full}; {why}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that cannot go on has failed

    use super::*;

    fn journal(bytes: usize) -> Journal {
        let mut journal = Journal::default();
        journal.open(1, 0, 0);
        journal.append(&vec![7; bytes]);
        journal
    }

    fn room(folder: &str, memory: &Arc<Pool>, disk: &Arc<Pool>) -> Room {
        let spill = Arc::new(SpillOptions {
            folder: folder.into(),
            max_bytes: 4096,
            max_total_bytes: 6000,
        });
        Room::new(memory, 1000, disk, Some(&spill))
    }

    #[test]
    fn memory_first_then_disk_then_none() {
        let folder = tempfile::tempdir().unwrap();
        let (memory, disk) = (Pool::new(5000), Pool::new(6000));
        let at = folder.path().to_str().unwrap();
        let mut a = room(at, &memory, &disk);
        let mut small = journal(1000);
        a.hold(&mut small).unwrap();
        assert_eq!((memory.used(), disk.used()), (1000, 0));
        small.append(&[7]);
        assert!(!a.is_right(&small));
        a.hold(&mut small).unwrap();
        assert_eq!((memory.used(), disk.used()), (0, 1001));
        small.append(&[7; 3095]);
        a.hold(&mut small).unwrap();
        assert!(a.is_right(&small));
        assert_eq!((a.used(), a.in_memory()), (4096, 0));
        small.append(&[7]);
        let (why, text) = a.hold(&mut small).unwrap_err();
        assert_eq!(why, Unprotected::JournalLimit);
        assert!(text.contains("4096 bytes on disk"), "{text}");
        // All together.
        let mut b = room(at, &memory, &disk);
        let (why, text) = b.hold(&mut journal(2000)).unwrap_err();
        assert_eq!(why, Unprotected::JournalTotalLimit);
        assert!(text.contains("6000 bytes on disk"), "{text}");
        small.lose(why, text);
        a.shrink(&small);
        b.shrink(&Journal::default());
        assert_eq!((memory.used(), disk.used()), (0, 0));
    }

    #[test]
    fn without_a_folder_it_says_so() {
        let (memory, disk) = (Pool::new(5000), Pool::new(6000));
        let mut room = room("/nowhere/at/all", &memory, &disk);
        let (why, text) = room.hold(&mut journal(2000)).unwrap_err();
        assert_eq!(why, Unprotected::JournalLimit);
        assert!(text.contains("limit of 1000 bytes"), "{text}");
        assert!(text.contains("/nowhere/at/all"), "{text}");
    }
}
