//! One supervisor a data directory: a lock that the kernel releases with the process, and the
//! process id in the file for people.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use crate::error::LocalError;

/// Held while the supervisor runs.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Takes it, or says who has it.
    pub(crate) fn take(path: &Path, data_dir: &Path) -> Result<Self, LocalError> {
        let failed = |e| LocalError::io("open", path, e);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed)?;
        let mut text = String::new();
        // What an earlier supervisor left; only for the message.
        let _ = (&mut file).take(32).read_to_string(&mut text);
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                let write = |file: &mut File| {
                    file.set_len(0)?;
                    std::io::Seek::rewind(file)?;
                    writeln!(file, "{}", std::process::id())
                };
                write(&mut file).map_err(|e| LocalError::io("write", path, e))?;
                Ok(Self { _file: file })
            }
            Err(_) => Err(LocalError::InUse {
                path: data_dir.to_owned(),
                pid: text.trim().parse().ok(),
            }),
        }
    }
}
