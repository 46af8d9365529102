//! Small files that must survive a power cut: written beside, fsynced, renamed, folder fsynced.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use helios_agent::record;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::LocalError;

/// Largest file that is read: none of ours comes near it.
const MAX_BYTES: u64 = 16 << 20;

/// Writes `value` so that after a crash the file holds either the old or the new content.
pub(crate) fn write_json<T: Serialize>(
    path: &Path,
    value: &T,
    mode: u32,
) -> Result<(), LocalError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| LocalError::Corrupt {
        path: path.to_owned(),
        why: e.to_string(),
    })?;
    text.push(b'\n');
    write(path, &text, mode)
}

/// Like [`write_json`] for bytes.
pub(crate) fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), LocalError> {
    record::replace(path, bytes, mode).map_err(|e| LocalError::io("write", path, e))
}

/// Reads a file; `None` when it does not exist.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, LocalError> {
    let corrupt = |why: String| LocalError::Corrupt {
        path: path.to_owned(),
        why,
    };
    match fs::metadata(path) {
        Ok(found) if found.len() > MAX_BYTES => return Err(corrupt("too large".to_owned())),
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(LocalError::io("read", path, e)),
    }
    let text = fs::read(path).map_err(|e| LocalError::io("read", path, e))?;
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| corrupt(e.to_string()))
}

/// The last `lines` lines of a log, for an error message; empty when there is none.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    use std::io::{Read as _, Seek as _, SeekFrom};
    const WINDOW: i64 = 8192;
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        if file.seek(SeekFrom::End(-WINDOW)).is_err() {
            file.seek(SeekFrom::Start(0))?;
        }
        let mut bytes = Vec::new();
        file.take(WINDOW.unsigned_abs()).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
