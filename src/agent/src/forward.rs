//! PostgreSQL's log, passed on line by line: the output of a container is where people look for it.
//!
//! May read one file. Invariants: a line is passed on at most once, in order, and only when it is
//! whole (or too long); nothing here waits for a reader, and memory is bounded. What is written in
//! the moment before the file is emptied (`postmaster::trim_log`) stays in the copy that is set
//! aside, and is not passed on.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How often the file is looked at.
const PAUSE: Duration = Duration::from_millis(250);
/// How much is read at a time; there is more in the next round.
const CHUNK: u64 = 1 << 20;
/// A longer line is passed on in pieces.
const LINE: usize = 16 << 10;

/// Passes on what is appended to the file from now on, until cancelled. The file may come later.
pub async fn forward_log(path: PathBuf, stop: CancellationToken, pass: impl Fn(&str)) {
    let mut at = std::fs::metadata(&path).map_or(0, |m| m.len());
    let mut rest = Vec::new();
    loop {
        let last = stop.is_cancelled();
        let from = path.clone();
        match tokio::task::spawn_blocking(move || read(&from, at)).await {
            Ok(Ok((next, bytes))) => {
                if next < at {
                    rest.clear();
                }
                at = next;
                rest.extend(bytes);
                lines(&mut rest, &pass);
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => at = 0,
            Ok(Err(error)) => tracing::debug!(%error, "PostgreSQL's log could not be read"),
            Err(error) => tracing::debug!(%error, "PostgreSQL's log was not read"),
        }
        if last {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = stop.cancelled() => {}
        }
    }
}

/// What stands behind `at`, or in the whole file when it has been emptied; and where that ends.
fn read(path: &Path, at: u64) -> io::Result<(u64, Vec<u8>)> {
    let mut file = File::open(path)?;
    let from = if file.metadata()?.len() < at { 0 } else { at };
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    let read = file.take(CHUNK).read_to_end(&mut bytes)?;
    Ok((from + read as u64, bytes))
}

/// Passes on all lines that are whole or too long, and leaves the rest.
fn lines(bytes: &mut Vec<u8>, pass: &impl Fn(&str)) {
    let mut done = 0;
    loop {
        let left = &bytes[done..];
        let end = left.iter().take(LINE).position(|b| *b == b'\n');
        let (line, taken) = match end {
            Some(end) => (&left[..end], end + 1),
            None if left.len() >= LINE => (&left[..LINE], LINE),
            None => break,
        };
        if !line.is_empty() {
            pass(&String::from_utf8_lossy(line));
        }
        done += taken;
    }
    bytes.drain(..done);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::sync::{Arc, Mutex};

    #[test]
    fn only_whole_lines_are_passed_on() {
        let seen = Mutex::new(Vec::new());
        let pass = |line: &str| seen.lock().unwrap().push(line.len());
        let mut bytes = b"one\n\ntw".to_vec();
        lines(&mut bytes, &pass);
        assert_eq!(
            (&*bytes, seen.lock().unwrap().clone()),
            (&b"tw"[..], vec![3])
        );
        bytes.extend(b"o\n");
        bytes.extend(vec![b'x'; LINE + 5]);
        lines(&mut bytes, &pass);
        assert_eq!(bytes.len(), 5);
        assert_eq!(*seen.lock().unwrap(), [3, 3, LINE]);
    }

    #[tokio::test]
    async fn what_was_there_before_is_not_repeated_and_an_emptied_file_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("postgres.log");
        std::fs::write(&path, "old\n").unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (stop, to) = (CancellationToken::new(), Arc::clone(&seen));
        let task = tokio::spawn(forward_log(path.clone(), stop.clone(), move |line| {
            to.lock().unwrap().push(line.to_owned());
        }));
        let until = async |wanted: &[&str]| {
            while *seen.lock().unwrap() != wanted {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let append = |text: &str| {
            let mut file = File::options().append(true).open(&path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        };
        // Once it has looked at the file for the first time.
        tokio::time::sleep(PAUSE).await;
        append("one\ntwo\n");
        let limit = Duration::from_secs(20);
        let first = ["one", "two"];
        tokio::time::timeout(limit, until(&first)).await.unwrap();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(0)
            .unwrap();
        append("3\n");
        let then = ["one", "two", "3"];
        tokio::time::timeout(limit, until(&then)).await.unwrap();
        append("last\n");
        stop.cancel();
        tokio::time::timeout(limit, task).await.unwrap().unwrap();
        assert_eq!(*seen.lock().unwrap(), ["one", "two", "3", "last"]);
    }
}
