//! How the disk does meanwhile: a small file beside the data directories is written and synced all
//! the time, as a commit does with its log.
//!
//! A commit waits for its disk, with or without a move. What clients wait for at a move on a disk
//! that has just stopped answering says nothing of the move; the report shows both.
//!
//! Touches one file of the workspace. Invariant: a sync that fails ends the measuring, and is told.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::record::histogram;
use super::windows::{AFTERMATH, Window};

/// Between two syncs.
const EVERY: Duration = Duration::from_millis(10);
/// A sync that takes longer is a stall: well below the pauses that are asked for, far above what a
/// disk needs.
pub(crate) const STALL: Duration = Duration::from_millis(50);
/// Size of a write: a page of PostgreSQL's log.
const PAGE: usize = 8192;
/// Pages of the file; it is written over and over.
const PAGES: u64 = 128;

/// What was seen of the disk.
#[derive(Debug)]
pub(crate) struct Disk {
    /// Durations of all syncs, in microseconds.
    pub(crate) syncs: Histogram<u64>,
    /// When it stalled.
    pub(crate) stalls: Vec<(Instant, Instant)>,
}

impl Disk {
    fn new() -> Self {
        Self {
            syncs: histogram(),
            stalls: Vec::new(),
        }
    }

    fn synced(&mut self, start: Instant, end: Instant) {
        let took = end - start;
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.syncs.saturating_record(micros.max(1));
        if took >= STALL {
            self.stalls.push((start, end));
        }
    }

    /// Whether the disk stalled while clients could feel the event.
    pub(crate) fn disturbed(&self, event: &Window) -> bool {
        // A request that begins at the last moment may meet a stall that begins just behind it.
        let until = event.moved.map(|moved| moved + AFTERMATH + STALL);
        self.stalls
            .iter()
            .any(|(start, end)| *end >= event.begun && until.is_none_or(|until| *start <= until))
    }
}

/// Measures until it is told to stop, or dropped.
#[derive(Debug)]
pub(crate) struct Probe {
    stop: Sender<()>,
    thread: JoinHandle<io::Result<Disk>>,
}

impl Probe {
    /// Begins, with a file in `dir`.
    pub(crate) fn start(dir: &Path) -> io::Result<Self> {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .open(dir.join("disk-probe"))?;
        let page = vec![b'x'; PAGE];
        for number in 0..PAGES {
            file.write_all_at(&page, number * PAGE as u64)?;
        }
        file.sync_all()?;
        let (stop, stopped) = mpsc::channel();
        let measure = move || {
            let mut disk = Disk::new();
            for number in (0..PAGES).cycle() {
                let start = Instant::now();
                file.write_all_at(&page, number * PAGE as u64)?;
                file.sync_data()?;
                disk.synced(start, Instant::now());
                if stopped.recv_timeout(EVERY) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
            Ok(disk)
        };
        let thread = std::thread::Builder::new()
            .name("demo-disk".to_owned())
            .spawn(measure)?;
        Ok(Self { stop, thread })
    }

    /// Ends; what was seen.
    pub(crate) fn finish(self) -> io::Result<Disk> {
        drop(self.stop);
        self.thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("it panicked")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::plan::EventKind;
    use crate::demo::windows::Windows;

    #[test]
    fn a_stall_disturbs_the_events_that_it_overlaps() {
        let windows = Windows::default();
        let begun = windows.begin(EventKind::Switchover);
        windows.moved();
        let [event] = windows.all()[..] else {
            panic!("one event");
        };
        let at = |ms: u64| begun + Duration::from_millis(ms);
        let disturbed = |start, end| {
            let mut disk = Disk::new();
            disk.synced(at(start), at(end));
            disk.disturbed(&event)
        };
        assert!(disturbed(0, 60));
        assert!(!disturbed(0, 40), "no stall");
        assert!(disturbed(250, 400));
        assert!(!disturbed(1000, 1100), "long after it");
    }

    #[test]
    fn the_disk_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        let probe = Probe::start(dir.path()).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let disk = probe.finish().unwrap();
        assert!(!disk.syncs.is_empty());
        assert!(Probe::start(&dir.path().join("missing")).is_err());
    }
}
