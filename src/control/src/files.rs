//! Files that belong together and are replaced while they are used: a certificate, its key, the
//! authorities.
//!
//! Reads files and remembers what they held; what becomes of it is the caller's. Invariant: what is
//! handed on was found twice in a row, so it is never half of what was there before and half of what
//! is there now: a Secret's volume is replaced by one link, but read file by file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::TlsError;

/// How often files are looked at that somebody else may replace. The kubelet takes a minute or two
/// to bring a changed Secret.
pub const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often in a row they may be found changed before that is left to the next look.
const ATTEMPTS: usize = 5;

/// Some files, and what they held at the last look.
#[derive(Debug)]
pub struct FileSet {
    paths: Vec<PathBuf>,
    seen: Option<Vec<Vec<u8>>>,
    /// What was last complained about: not with every look again.
    complaint: Option<String>,
}

impl FileSet {
    /// Files that were not looked at yet.
    #[must_use]
    pub fn new(paths: Vec<PathBuf>) -> Self {
        Self {
            paths,
            seen: None,
            complaint: None,
        }
    }

    /// Reads them for the first time.
    ///
    /// # Errors
    /// One cannot be read, or they change all the time.
    pub fn read(&mut self) -> Result<Vec<Vec<u8>>, TlsError> {
        let contents = settled(&self.paths)?;
        self.seen = Some(contents.clone());
        Ok(contents)
    }

    /// Looks again, and gives what is new to `take`. Whether it was taken. What cannot be read or is
    /// not taken is warned about once, and what was there before stays in use.
    pub fn look<E: std::fmt::Display>(
        &mut self,
        take: impl FnOnce(&[Vec<u8>]) -> Result<(), E>,
    ) -> bool {
        let contents = match settled(&self.paths) {
            Ok(contents) => contents,
            Err(error) => {
                self.complain(&error);
                return false;
            }
        };
        if self.seen.as_ref() == Some(&contents) {
            return false;
        }
        let taken = take(&contents);
        let before = self.seen.replace(contents);
        match taken {
            Ok(()) => {
                self.complaint = None;
                if before.is_some() {
                    tracing::info!(files = self.names(), "certificates were renewed");
                }
                true
            }
            Err(error) => {
                self.complain(&error);
                false
            }
        }
    }

    fn complain(&mut self, error: &impl std::fmt::Display) {
        let why = error.to_string();
        if self.complaint.as_ref() == Some(&why) {
            return;
        }
        tracing::warn!(
            error = why,
            files = self.names(),
            "certificates cannot be used, those before them stay in use"
        );
        self.complaint = Some(why);
    }

    fn names(&self) -> String {
        let names: Vec<String> = self.paths.iter().map(|p| p.display().to_string()).collect();
        names.join(", ")
    }
}

/// What the files hold, found twice in a row.
fn settled(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>, TlsError> {
    let all = || {
        let files = paths.iter().map(|path| read(path));
        files.collect::<Result<Vec<_>, _>>()
    };
    let mut before = all();
    for _ in 0..ATTEMPTS {
        let now = all();
        if before == now {
            return now;
        }
        before = now;
    }
    let path = paths.first().cloned().unwrap_or_default();
    let why = "it is being written".to_owned();
    Err(TlsError::File { path, why })
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|e| TlsError::File {
        path: path.to_owned(),
        why: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuse(_: &[Vec<u8>]) -> Result<(), TlsError> {
        Err(TlsError::Material("no".to_owned()))
    }

    fn accept(_: &[Vec<u8>]) -> Result<(), TlsError> {
        Ok(())
    }

    fn unasked(new: &[Vec<u8>]) -> Result<(), TlsError> {
        panic!("nothing was to be taken: {new:?}")
    }

    #[test]
    fn what_is_new_is_given_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("a"), "1").unwrap();
        std::fs::write(path("b"), "1").unwrap();
        let mut files = FileSet::new(vec![path("a"), path("b")]);
        assert_eq!(files.read().unwrap(), [b"1", b"1"]);
        assert!(!files.look(unasked));

        std::fs::write(path("b"), "2").unwrap();
        let mut got = Vec::new();
        assert!(files.look(|new| {
            got = new.to_vec();
            accept(new)
        }));
        assert_eq!(got, [b"1", b"2"]);

        // What was refused is not offered again; what is gone is not taken for empty.
        std::fs::write(path("b"), "3").unwrap();
        assert!(!files.look(refuse));
        assert!(!files.look(unasked));
        std::fs::remove_file(path("a")).unwrap();
        assert!(!files.look(unasked));
        assert!(files.complaint.as_ref().is_some_and(|c| c.contains("/a\"")));

        // What was there in the beginning is new again.
        std::fs::write(path("a"), "1").unwrap();
        std::fs::write(path("b"), "1").unwrap();
        assert!(files.look(accept));
        assert_eq!(files.complaint, None);
    }

    /// As the kubelet does it: the files are links into a folder that is a link, which is replaced.
    /// A reader beside it never finds one file of one version and one of another.
    #[test]
    fn a_swapped_link_is_never_read_by_halves() {
        use std::os::unix::fs::symlink;
        use std::sync::atomic::{AtomicBool, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let publish = {
            let root = root.clone();
            move |version: usize| {
                let folder = root.join(format!("..v{version}"));
                std::fs::create_dir(&folder).unwrap();
                for name in ["tls.crt", "tls.key"] {
                    std::fs::write(folder.join(name), version.to_string()).unwrap();
                }
                let new = root.join("..data_tmp");
                symlink(&folder, &new).unwrap();
                std::fs::rename(&new, root.join("..data")).unwrap();
                if let Some(old) = version.checked_sub(1) {
                    let _ = std::fs::remove_dir_all(root.join(format!("..v{old}")));
                }
            }
        };
        publish(0);
        for name in ["tls.crt", "tls.key"] {
            symlink(Path::new("..data").join(name), root.join(name)).unwrap();
        }
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                (1..400).for_each(&publish);
                done.store(true, Ordering::Relaxed);
            });
            let paths = vec![root.join("tls.crt"), root.join("tls.key")];
            let mut files = FileSet::new(paths);
            let mut seen = 0;
            while !done.load(Ordering::Relaxed) {
                seen += usize::from(files.look(|pair| {
                    assert_eq!(pair[0], pair[1]);
                    accept(pair)
                }));
            }
            assert!(seen > 1, "nothing was seen of the changes");
        });
    }
}
