//! A small record that survives a power cut and is written in one flush of the disk.
//!
//! Two slots in one file, written in turn: the newer of those that are whole counts. The space is
//! there from the beginning, so that a write changes no metadata of the file system. Writing beside,
//! renaming and flushing the folder costs a commit of the file system's journal, which waits for
//! what PostgreSQL writes at the same time; a failover waits for such records several times.
//!
//! Invariant: the slot that counts is not touched while the other one is written.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read as _, Result, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::xxh3_64;

/// What a slot begins with.
const MAGIC: &str = "helios-record 1";
/// Bytes of a slot at first; it grows with what is written.
const SLOT: usize = 64 << 10;
/// Largest file that is read: none of ours comes near it.
const MAX_BYTES: u64 = 16 << 20;
/// Only its owner reads a record.
const MODE: u32 = 0o600;

/// The file, and which of its slots counts. One writer at a time: whoever holds the instance's or
/// the cluster's lock.
#[derive(Debug)]
pub struct RecordFile {
    path: PathBuf,
    /// Number of the last write.
    number: u64,
    /// Bytes of a slot; 0 while there is no file of slots.
    slot: usize,
}

impl RecordFile {
    /// Reads the record; `None` when there is no file. One that is plain JSON, without slots, is
    /// read as well.
    ///
    /// # Errors
    /// The file cannot be read, or (`InvalidData`) none of its slots is whole, or what is in it is
    /// no such record.
    pub fn open<T: DeserializeOwned>(path: PathBuf) -> Result<(Self, Option<T>)> {
        let none = Self {
            path,
            number: 0,
            slot: 0,
        };
        let text = match read(&none.path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok((none, None)),
            Err(e) => return Err(e),
        };
        let half = text.len() / 2;
        let (first, second) = text.split_at(half);
        let newest = [first, second]
            .into_iter()
            .filter_map(|slot| whole(slot, half))
            .max_by_key(|(number, _)| *number);
        let (record, content) = match newest {
            Some((number, content)) => (
                Self {
                    number,
                    slot: half,
                    ..none
                },
                content,
            ),
            None if text.starts_with(MAGIC.as_bytes()) || text.starts_with(b" ") => {
                return Err(Error::new(ErrorKind::InvalidData, "no slot is whole"));
            }
            None => (none, text.as_slice()),
        };
        let value = serde_json::from_slice(content)?;
        Ok((record, Some(value)))
    }

    /// Makes `value` the record; it is durable when this returns, and the former one counts when it
    /// fails.
    ///
    /// # Errors
    /// The disk is full or fails, or something else is in the file's place.
    pub fn write<T: Serialize>(&mut self, value: &T) -> Result<()> {
        let content = serde_json::to_vec(value)?;
        let number = self.number + 1;
        if self.slot == 0 || !self.in_place(number, &content)? {
            self.anew(number, &content)?;
        }
        self.number = number;
        Ok(())
    }

    /// Writes the slot that does not count; `false` when there is no place for it.
    fn in_place(&self, number: u64, content: &[u8]) -> Result<bool> {
        let Some(text) = filled(number, content, self.slot) else {
            return Ok(false);
        };
        let file = match OpenOptions::new().write(true).open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e),
        };
        let slot = self.slot as u64;
        if file.metadata()?.len() != 2 * slot {
            return Ok(false);
        }
        file.write_all_at(&text, (number % 2) * slot)?;
        file.sync_data()?;
        Ok(true)
    }

    /// Writes a new file beside the old one, with room to grow, and puts it in its place.
    fn anew(&mut self, number: u64, content: &[u8]) -> Result<()> {
        let mut slot = SLOT;
        let text = loop {
            match filled(number, content, slot) {
                Some(text) => break text,
                None => slot *= 2,
            }
        };
        let empty = vec![b' '; slot];
        let slots = match number % 2 {
            0 => [text, empty],
            _ => [empty, text],
        };
        replace(&self.path, &slots.concat(), MODE)?;
        self.slot = slot;
        Ok(())
    }
}

/// Replaces a file's content, whole or not at all, through a crash of the machine too: written
/// beside, flushed, renamed, the folder flushed.
///
/// # Errors
/// One of these fails; the old content is there then.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&beside)?;
    // An older file of that name keeps its mode otherwise.
    file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()?;
    drop(file);
    std::fs::rename(&beside, path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?
        .take(MAX_BYTES + 1)
        .read_to_end(&mut text)?;
    match text.len() as u64 > MAX_BYTES {
        true => Err(Error::new(ErrorKind::InvalidData, "too large")),
        false => Ok(text),
    }
}

/// A slot with this content; `None` when it is too small.
fn filled(number: u64, content: &[u8], slot: usize) -> Option<Vec<u8>> {
    let head = format!(
        "{MAGIC} {number} {slot} {} {:016x}\n",
        content.len(),
        checksum(number, content)
    );
    let mut text = head.into_bytes();
    text.extend_from_slice(content);
    if text.len() >= slot {
        return None;
    }
    // The file stays text.
    text.resize(slot - 1, b' ');
    text.push(b'\n');
    Some(text)
}

/// Number and content of a slot whose last write was not cut short. The head says how long a slot
/// is: in a file that lost its end, the older record would be found alone and be taken for the last.
fn whole(slot: &[u8], size: usize) -> Option<(u64, &[u8])> {
    let end = slot.iter().take(128).position(|byte| *byte == b'\n')?;
    let (head, rest) = slot.split_at(end);
    let head = std::str::from_utf8(head).ok()?.strip_prefix(MAGIC)?;
    let mut words = head.split_ascii_whitespace();
    let number = words.next()?.parse().ok()?;
    if words.next()?.parse() != Ok(size) {
        return None;
    }
    let length: usize = words.next()?.parse().ok()?;
    let sum = u64::from_str_radix(words.next()?, 16).ok()?;
    let content = rest.get(1..)?.get(..length)?;
    (checksum(number, content) == sum).then_some((number, content))
}

/// Of the number too: a slot is never taken for a newer one.
fn checksum(number: u64, content: &[u8]) -> u64 {
    xxh3_64(content) ^ xxh3_64(&number.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    type Record = Vec<String>;

    fn of(word: &str) -> Record {
        vec![word.to_owned()]
    }

    fn read_again(path: &Path) -> Record {
        RecordFile::open(path.to_owned()).unwrap().1.unwrap()
    }

    #[test]
    fn holds_what_was_written_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let (mut file, none) = RecordFile::open::<Record>(path.clone()).unwrap();
        assert_eq!(none, None);
        for number in 0..5 {
            let value = of(&number.to_string());
            file.write(&value).unwrap();
            assert_eq!(read_again(&path), value);
        }
        // One that is larger than its slot, and the next one in place again.
        let large = of(&"x".repeat(3 * SLOT));
        file.write(&large).unwrap();
        assert_eq!(read_again(&path), large);
        let (mut file, _) = RecordFile::open::<Record>(path.clone()).unwrap();
        file.write(&of("small")).unwrap();
        assert_eq!(read_again(&path), of("small"));
        // The file went away meanwhile.
        std::fs::remove_file(&path).unwrap();
        file.write(&of("back")).unwrap();
        assert_eq!(read_again(&path), of("back"));
    }

    /// A power cut leaves any mixture of old and new sectors in the slot that was being written.
    #[test]
    fn a_write_that_was_cut_short_leaves_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let (mut file, _) = RecordFile::open::<Record>(path.clone()).unwrap();
        let words = [
            "a".repeat(3000),
            "b".repeat(3000),
            "c".repeat(3000),
            "d".repeat(3000),
        ];
        for word in &words[..3] {
            file.write(&of(word)).unwrap();
        }
        let before = std::fs::read(&path).unwrap();
        file.write(&of(&words[3])).unwrap();
        let after = std::fs::read(&path).unwrap();
        for written in 0..(1_u32 << (3000 / 512 + 1)) {
            let mut torn = before.clone();
            for (at, sector) in after.chunks(512).enumerate() {
                let at_slot = at % (SLOT / 512);
                if at_slot > 6 || written & (1 << at_slot) != 0 {
                    torn[at * 512..(at + 1) * 512].copy_from_slice(sector);
                }
            }
            std::fs::write(&path, &torn).unwrap();
            let found = read_again(&path);
            let complete = torn == after;
            let expected = if complete { &words[3] } else { &words[2] };
            assert_eq!(found, of(expected), "sectors {written:b}");
            // The next write goes over the torn one.
            let (mut file, _) = RecordFile::open::<Record>(path.clone()).unwrap();
            file.write(&of("next")).unwrap();
            assert_eq!(read_again(&path), of("next"));
        }
    }

    #[test]
    fn plain_json_is_read_and_damage_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        std::fs::write(&path, r#"["plain"]"#).unwrap();
        let (mut file, plain) = RecordFile::open::<Record>(path.clone()).unwrap();
        assert_eq!(plain, Some(of("plain")));
        file.write(&of("slots")).unwrap();
        assert_eq!(read_again(&path), of("slots"));
        let mut text = std::fs::read(&path).unwrap();
        // A file that lost its end: what is left of it is not the last record.
        file.write(&of("later")).unwrap();
        let later = std::fs::read(&path).unwrap();
        let cut =
            [1, SLOT / 2, SLOT, SLOT + SLOT / 2].map(|lost| later[..2 * SLOT - lost].to_vec());
        for byte in &mut text {
            if *byte == b'"' {
                *byte = b'\'';
            }
        }
        let others = [text, b"[\"cut".to_vec(), Vec::new()];
        for damaged in cut.iter().chain(&others) {
            std::fs::write(&path, damaged).unwrap();
            let error = RecordFile::open::<Record>(path.clone()).unwrap_err();
            assert!(
                matches!(
                    error.kind(),
                    ErrorKind::InvalidData | ErrorKind::UnexpectedEof
                ),
                "{error}"
            );
        }
    }

    #[test]
    fn something_in_its_place_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let (mut file, _) = RecordFile::open::<Record>(path.clone()).unwrap();
        file.write(&of("a")).unwrap();
        let aside = dir.path().join("aside");
        std::fs::rename(&path, &aside).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(file.write(&of("b")).is_err());
        std::fs::remove_dir(&path).unwrap();
        std::fs::rename(&aside, &path).unwrap();
        file.write(&of("c")).unwrap();
        assert_eq!(read_again(&path), of("c"));
    }
}
