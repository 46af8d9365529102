//! The write-ahead log on a volume of its own: `pg_wal` is a link into [`AgentConfig::wal_dir`].
//!
//! Each data directory has a folder there, as `initdb --waldir` and `pg_basebackup --waldir` lay it
//! out (<https://www.postgresql.org/docs/current/wal-internals.html>), so that a new one can be built
//! beside the one that it replaces. `pg_rewind` follows the link and leaves it alone
//! (`src/bin/pg_rewind/file_ops.c`). Invariants: the folder that a data directory links to is never
//! removed while the data directory is there; a server starts only where the link leads to the
//! volume.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use helios_api::agent::AgentError;

use crate::AgentConfig;
use crate::error::{file_failed, refused};
use crate::files::{own, remove_tree};

/// Names of the folders: never both in use but while a data directory is built.
const FOLDERS: [&str; 2] = ["pg_wal.1", "pg_wal.2"];

/// Where `pg_wal` of the data directory leads to, if it is a link.
fn target(data_dir: &Path) -> Option<PathBuf> {
    std::fs::read_link(data_dir.join("pg_wal")).ok()
}

/// Removes what no data directory links to.
pub(crate) async fn sweep(config: &AgentConfig) -> Result<(), AgentError> {
    let Some(volume) = &config.wal_dir else {
        return Ok(());
    };
    let used = target(&config.data_dir);
    for folder in FOLDERS.map(|name| volume.join(name)) {
        if used.as_ref() != Some(&folder) {
            remove_tree(&folder).await?;
        }
    }
    Ok(())
}

/// Makes an empty folder for the log of a data directory that is about to be built; `None` where
/// logs have no volume. What an earlier attempt left is removed.
pub(crate) async fn start_building(config: &AgentConfig) -> Result<Option<PathBuf>, AgentError> {
    use std::os::unix::fs::PermissionsExt as _;
    let Some(volume) = &config.wal_dir else {
        return Ok(None);
    };
    sweep(config).await?;
    let used = target(&config.data_dir);
    let free = |folder: &PathBuf| used.as_ref() != Some(folder);
    let mut folders = FOLDERS.iter().map(|name| volume.join(name));
    let Some(folder) = folders.find(free) else {
        return Err(refused("no folder is free for a write-ahead log"));
    };
    let failed = |e| file_failed("could not create", &folder)(e);
    std::fs::create_dir_all(&folder).map_err(failed)?;
    own(config, &folder).map_err(failed)?;
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
    Ok(Some(folder))
}

/// Whether the data directory's log was lost with its volume: the link leads nowhere.
pub(crate) fn are_lost(config: &AgentConfig) -> bool {
    let there = |folder: PathBuf| match std::fs::metadata(folder) {
        Err(e) => e.kind() != ErrorKind::NotFound,
        Ok(_) => true,
    };
    target(&config.data_dir).is_some_and(|folder| !there(folder))
}

/// Checks that the data directory has its log where the configuration says.
pub(crate) fn check(config: &AgentConfig) -> Result<(), AgentError> {
    let Some(volume) = &config.wal_dir else {
        return Ok(());
    };
    let dir = config.data_dir.display();
    match target(&config.data_dir) {
        Some(folder) if folder.parent() != Some(volume) => Err(refused(format_args!(
            "pg_wal of data directory \"{dir}\" leads to \"{}\", not into \"{}\"",
            folder.display(),
            volume.display()
        ))),
        Some(_) if are_lost(config) => Err(refused(format_args!(
            "write-ahead log of data directory \"{dir}\" is not on \"{}\": that volume is empty \
             or another one; bring it back, or remove the data directory to have it cloned",
            volume.display()
        ))),
        Some(_) => Ok(()),
        None => Err(refused(format_args!(
            "data directory \"{dir}\" holds its write-ahead log itself, and not on \"{}\"; \
             remove it to have it cloned",
            volume.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn config(home: &Path, volume: &Path) -> AgentConfig {
        let mut config = AgentConfig::local(
            "a".parse().unwrap(),
            home,
            home,
            5432,
            Path::new("/usr/bin"),
        );
        config.wal_dir = Some(volume.to_owned());
        std::fs::create_dir(&config.data_dir).unwrap();
        config
    }

    #[tokio::test]
    async fn a_log_is_built_beside_the_one_in_use() {
        let (home, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = config(home.path(), volume.path());
        let first = start_building(&config).await.unwrap().unwrap();
        std::fs::write(first.join("left by an earlier attempt"), "").unwrap();
        assert_eq!(start_building(&config).await.unwrap().unwrap(), first);
        assert_eq!(std::fs::read_dir(&first).unwrap().count(), 0);
        symlink(&first, config.data_dir.join("pg_wal")).unwrap();
        check(&config).unwrap();
        // A volume has folders of the file system's own.
        std::fs::create_dir(volume.path().join("lost+found")).unwrap();
        let second = start_building(&config).await.unwrap().unwrap();
        assert!(second != first && first.is_dir());
        sweep(&config).await.unwrap();
        assert!(!second.exists() && first.is_dir());
        assert!(volume.path().join("lost+found").is_dir());
    }

    #[test]
    fn a_log_elsewhere_or_lost_is_named() {
        let (home, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = config(home.path(), volume.path());
        let link = config.data_dir.join("pg_wal");
        std::fs::create_dir(&link).unwrap();
        let refused = |says: &str| {
            let error = check(&config).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        refused("itself");
        assert!(!are_lost(&config));
        std::fs::remove_dir(&link).unwrap();
        symlink("/somewhere/else", &link).unwrap();
        refused("/somewhere/else");
        std::fs::remove_file(&link).unwrap();
        symlink(volume.path().join(FOLDERS[0]), &link).unwrap();
        refused("another one");
        assert!(are_lost(&config));
    }
}
