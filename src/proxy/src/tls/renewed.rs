//! What is made of files, and made anew when they hold something else.
//!
//! Reads the files when it is told to look. Invariant: what cannot be used changes nothing, and
//! whoever has taken what was made before goes on with it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use helios_control::FileSet;

use super::TlsError;

/// A file and what it held.
#[derive(Clone, Copy)]
pub(super) struct Text<'a> {
    pub(super) path: &'a Path,
    pub(super) pem: &'a [u8],
}

type Make<T> = dyn Fn(&[Text<'_>]) -> Result<T, TlsError> + Send + Sync;

/// Something that is made of files.
pub(super) struct Renewed<T> {
    now: RwLock<Arc<T>>,
    files: Mutex<FileSet>,
    paths: Vec<PathBuf>,
    make: Box<Make<T>>,
}

impl<T> Renewed<T> {
    /// Made for the first time; `make` gets the files in the order of `paths`.
    pub(super) fn new(
        paths: Vec<PathBuf>,
        make: impl Fn(&[Text<'_>]) -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        let mut files = FileSet::new(paths.clone());
        let first = make(&texts(&paths, &files.read()?))?;
        Ok(Self {
            now: RwLock::new(Arc::new(first)),
            files: Mutex::new(files),
            paths,
            make: Box::new(make),
        })
    }

    /// What was made last.
    pub(super) fn now(&self) -> Arc<T> {
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at the files; whether something new was made of them.
    pub(super) fn look(&self) -> bool {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.look(|contents| {
            let made = (self.make)(&texts(&self.paths, contents))?;
            *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(made);
            Ok::<(), TlsError>(())
        })
    }
}

fn texts<'a>(paths: &'a [PathBuf], contents: &'a [Vec<u8>]) -> Vec<Text<'a>> {
    let both = paths.iter().zip(contents);
    both.map(|(path, pem)| Text { path, pem }).collect()
}
