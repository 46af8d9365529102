//! Getting a whole data directory onto the disk.
//!
//! PostgreSQL and `pg_rewind` sync every file by itself, and the file system has the disk empty its
//! cache for each: a thousand times for a database without tables. Where the disk is shared with
//! the new primary, its commits wait meanwhile. `syncfs` does all at once, but waits for what
//! everybody else has written to the file system, too: minutes, beside a large build.
//! <https://www.postgresql.org/docs/current/runtime-config-error-handling.html#GUC-RECOVERY-INIT-SYNC-METHOD>
//!
//! Touches nothing but the file systems below the data directory. Invariant: `syncfs` is relied on
//! only where it reports a write that failed, and used only where little waits to be written.

use std::fs::File;
use std::path::{Path, PathBuf};

use helios_api::agent::AgentError;
use nix::sys::utsname::uname;
use nix::unistd::syncfs;

use crate::error::file_failed;

/// Since this version of Linux `syncfs` reports errors of earlier writes.
const REPORTS_ERRORS: (u32, u32) = (5, 8);

/// With more than this waiting to be written, by whomever, files are synced one by one. In KiB: a
/// disk of 100 MB/s has it done in 0.6 s.
const LITTLE: u64 = 64 * 1024;

/// Whether `syncfs` is the better way now: it tells of every write that failed, and little waits to
/// be written.
pub(crate) fn can_sync_at_once() -> bool {
    let memory = std::fs::read_to_string("/proc/meminfo");
    reports_errors() && memory.is_ok_and(|text| waiting(&text).is_some_and(|kib| kib <= LITTLE))
}

/// What `/proc/meminfo` says of pages that have to be written or are being written, in KiB.
/// <https://docs.kernel.org/filesystems/proc.html#meminfo>
fn waiting(meminfo: &str) -> Option<u64> {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    Some(field("Dirty:")? + field("Writeback:")?)
}

fn reports_errors() -> bool {
    let Ok(system) = uname() else {
        return false;
    };
    let release = system.release().to_str().and_then(version);
    system.sysname() == "Linux" && release.is_some_and(|v| v >= REPORTS_ERRORS)
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next()?.parse().ok();
    Some((next()?, next()?))
}

/// Waits until everything in the data directory, its log and its tablespaces is on the disk.
///
/// # Errors
/// The disk has lost something.
pub(crate) async fn sync_at_once(data_dir: &Path) -> Result<(), AgentError> {
    let dir = data_dir.to_owned();
    let synced = tokio::task::spawn_blocking(move || roots(&dir)?.iter().try_for_each(sync));
    match synced.await {
        Ok(result) => result,
        Err(e) => Err(crate::error::failed(format_args!("sync ended: {e}"))),
    }
}

fn sync(dir: &PathBuf) -> Result<(), AgentError> {
    let failed = |e| file_failed("could not sync", dir)(e);
    let handle = File::open(dir).map_err(failed)?;
    syncfs(&handle).map_err(|e| failed(e.into()))
}

/// A directory on each file system that the server may have files on.
fn roots(data_dir: &Path) -> Result<Vec<PathBuf>, AgentError> {
    let mut list = vec![data_dir.to_owned(), data_dir.join("pg_wal")];
    let spaces = data_dir.join("pg_tblspc");
    let failed = |e| file_failed("could not list", &spaces)(e);
    for entry in std::fs::read_dir(&spaces).map_err(failed)? {
        list.push(entry.map_err(failed)?.path());
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_as_numbers() {
        assert_eq!(version("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(version("5.10.0-28-amd64"), Some((5, 10)));
        assert_eq!(version("6.1-rc2"), Some((6, 1)));
        assert_eq!(version("unknown"), None);
        assert!(version("5.10.0") > Some(REPORTS_ERRORS));
        assert!(version("4.19.0") < Some(REPORTS_ERRORS));
    }

    #[test]
    fn what_waits_to_be_written_is_read() {
        let text = "MemTotal:  24000000 kB\nDirty:   1536 kB\nWriteback:     512 kB\n\
                    WritebackTmp:       7 kB\n";
        assert_eq!(waiting(text), Some(2048));
        assert_eq!(waiting("Dirty: 1536 kB\n"), None);
        assert_eq!(waiting("Dirty: many kB\nWriteback: 1 kB\n"), None);
        let here = std::fs::read_to_string("/proc/meminfo").unwrap();
        assert!(waiting(&here).is_some());
    }

    #[tokio::test]
    async fn a_directory_with_its_log_and_tablespaces_elsewhere_is_synced() {
        let (data, log, space) = (
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
        );
        std::os::unix::fs::symlink(log.path(), data.path().join("pg_wal")).unwrap();
        std::fs::create_dir(data.path().join("pg_tblspc")).unwrap();
        let link = data.path().join("pg_tblspc/16384");
        std::os::unix::fs::symlink(space.path(), &link).unwrap();
        assert_eq!(roots(data.path()).unwrap().len(), 3);
        sync_at_once(data.path()).await.unwrap();
        drop(space);
        let error = sync_at_once(data.path()).await.unwrap_err();
        assert!(error.to_string().contains("16384"), "{error}");
    }
}
