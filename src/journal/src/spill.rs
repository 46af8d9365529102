//! A journal's messages on disk: what one open transaction has sent, once it is too large for
//! memory.
//!
//! Touches one file that has no name, so that nobody else can open or shorten it and nothing is
//! left when the process ends. It is written with `pwrite`, so that a full disk is an error, and
//! read through a mapping of its largest size. The invariant: only bytes that were written are
//! ever looked at.

use std::fs::File;
use std::io::Result;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use helios_session::journal::Spill;
use memmap2::{Mmap, MmapOptions};

/// A file of at most so many bytes.
#[derive(Debug)]
pub struct SpillFile {
    file: File,
    map: Mmap,
    len: usize,
}

impl SpillFile {
    /// Makes an empty one in `folder`, for at most `limit` bytes.
    ///
    /// # Errors
    /// The folder cannot be written to, or `limit` is more than can be mapped.
    #[allow(unsafe_code)] // the journal's memory mapping
    pub fn create(folder: &Path, limit: usize) -> Result<Self> {
        let file = tempfile::tempfile_in(folder)?;
        // SAFETY: the file has no name and its descriptor is ours alone and not inherited, so
        // nobody shortens it or writes to it but `append`, which needs this value mutably: no slice
        // of the mapping is held then. Pages behind the file's end are not touched: `bytes` ends
        // at `len`, and so many bytes have been written. The file is never made shorter.
        let map = unsafe { MmapOptions::new().len(limit).map(&file) }?;
        Ok(Self { file, map, len: 0 })
    }
}

impl Spill for SpillFile {
    fn append(&mut self, bytes: &[u8]) -> std::result::Result<(), String> {
        let end = self.len.saturating_add(bytes.len());
        if end > self.map.len() {
            let limit = self.map.len();
            return Err(format!(
                "journal over the limit of {limit} bytes on disk (transaction_buffer_size)"
            ));
        }
        self.file
            .write_all_at(bytes, self.len as u64)
            .map_err(|e| format!("journal cannot be written to disk: {e}"))?;
        self.len = end;
        Ok(())
    }

    fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    fn bytes(&self) -> &[u8] {
        self.map.get(..self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that cannot go on has failed

    use super::*;

    #[test]
    fn holds_what_was_written_and_no_more_than_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let mut spill = SpillFile::create(folder.path(), 1 << 20).unwrap();
        assert_eq!(spill.bytes(), b"");
        // Nothing that has a name is left anywhere.
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let piece: Vec<u8> = (0..=255).collect();
        for _ in 0..4096 {
            spill.append(&piece).unwrap();
        }
        assert_eq!(spill.bytes().len(), 1 << 20);
        assert!(spill.bytes().chunks(256).all(|chunk| chunk == piece));
        assert!(spill.append(b"x").unwrap_err().contains("1048576 bytes"));
        spill.truncate(3);
        spill.append(b"new").unwrap();
        assert_eq!(spill.bytes(), [0, 1, 2, b'n', b'e', b'w']);
    }

    #[test]
    fn a_folder_that_is_not_there_is_said() {
        assert!(SpillFile::create(Path::new("/nowhere/at/all"), 4096).is_err());
    }
}
