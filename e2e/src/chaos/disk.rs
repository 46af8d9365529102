//! Small file systems under instances, so that a disk can be full without filling the machine's.
//!
//! Mounting needs a right that a container or an ordinary user lacks; then the fault is skipped,
//! and the run says so.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;

/// Room for two copies of a data directory (a clone is built beside the old one) and their WAL.
const SIZE: &str = "size=400m";
/// File that takes the room.
const FILLER: &str = "filler";
/// Written at a time.
const PIECE: usize = 1 << 16;

/// A mounted folder, unmounted on drop; what was in it is lost then.
#[derive(Debug)]
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Moves what is in `folder` onto a file system of its own in the same place.
    ///
    /// # Errors
    /// Mounting is not permitted, or a file could not be copied.
    pub fn under(folder: &Path) -> Result<Self> {
        let aside = folder.with_extension("aside");
        std::fs::rename(folder, &aside)?;
        std::fs::create_dir(folder)?;
        let mounted = run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", SIZE, "none"])
            .arg(folder));
        if let Err(error) = mounted {
            std::fs::remove_dir(folder)?;
            std::fs::rename(&aside, folder)?;
            return Err(error);
        }
        let disk = Self {
            path: folder.to_owned(),
        };
        // With owners and modes, the folder's own too.
        run(Command::new("cp")
            .arg("-a")
            .arg(aside.join("."))
            .arg(folder))?;
        std::fs::remove_dir_all(aside)?;
        Ok(disk)
    }

    /// Takes all the room there is; a server that needs more fails.
    ///
    /// # Errors
    /// Something else than a lack of room.
    pub fn fill(&self) -> Result<u64> {
        let mut file = std::fs::File::create(self.path.join(FILLER))?;
        let piece = vec![0; PIECE];
        let mut written = 0;
        loop {
            match file.write(&piece) {
                Ok(0) => return Ok(written),
                Ok(n) => written += u64::try_from(n)?,
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                    return Ok(written);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Gives the room back.
    pub fn free(&self) {
        // Nothing there is nothing taken.
        let _ = std::fs::remove_file(self.path.join(FILLER));
    }

    /// Puts the files onto the disk below, to be looked into.
    ///
    /// # Errors
    /// They could not be copied.
    pub fn keep(self) -> Result<()> {
        self.free();
        let (path, copy) = (self.path.clone(), self.path.with_extension("copy"));
        run(Command::new("cp").arg("-a").arg(&path).arg(&copy))?;
        drop(self);
        std::fs::remove_dir(&path)?;
        Ok(std::fs::rename(copy, path)?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Detached: a process that still has a file open there ends by itself.
        let _ = run(Command::new("umount").arg("-l").arg(&self.path));
    }
}

/// Whether this process may mount.
#[must_use]
pub fn is_permitted() -> bool {
    let Ok(dir) = helios_testkit::pg::server_dir("helios-disk-") else {
        return false;
    };
    let folder = dir.path().join("try");
    std::fs::create_dir(&folder).is_ok() && SmallDisk::under(&folder).is_ok()
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    let says = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?} failed: {}", says.trim()).into())
}
