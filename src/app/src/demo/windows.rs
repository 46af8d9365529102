//! When the events happened, and which of them a request or an error belongs to.
//!
//! Pure but for a mutex. Invariant: windows begin in order and only grow; a request belongs to
//! every event that it overlaps, an error to the latest one.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::plan::EventKind;

/// Requests that begin this long after an event count as its: what the move leaves behind (locks
/// handed over, caches cold) is part of what clients see.
pub(crate) const AFTERMATH: Duration = Duration::from_millis(250);

/// One event in time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    pub(crate) kind: EventKind,
    pub(crate) begun: Instant,
    /// A new primary takes work.
    pub(crate) moved: Option<Instant>,
    /// The cluster is redundant again.
    settled: Option<Instant>,
}

impl Window {
    fn pauses(&self, start: Instant, end: Instant) -> bool {
        end >= self.begun && self.moved.is_none_or(|moved| start <= moved + AFTERMATH)
    }

    fn covers(&self, start: Instant, end: Instant) -> bool {
        end >= self.begun
            && self
                .settled
                .is_none_or(|settled| start <= settled + AFTERMATH)
    }
}

/// All events so far; shared by the clients and the one who makes the events.
#[derive(Debug, Default)]
pub(crate) struct Windows(Mutex<Vec<Window>>);

impl Windows {
    fn lock(&self) -> MutexGuard<'_, Vec<Window>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event begins now.
    pub(crate) fn begin(&self, kind: EventKind) -> Instant {
        let begun = Instant::now();
        self.lock().push(Window {
            kind,
            begun,
            moved: None,
            settled: None,
        });
        begun
    }

    /// The event that began last has moved the primary.
    pub(crate) fn moved(&self) {
        if let Some(window) = self.lock().last_mut() {
            window.moved.get_or_insert_with(Instant::now);
        }
    }

    /// The event that began last is over.
    pub(crate) fn settled(&self) {
        self.moved();
        if let Some(window) = self.lock().last_mut() {
            window.settled.get_or_insert_with(Instant::now);
        }
    }

    /// All events so far.
    pub(crate) fn all(&self) -> Vec<Window> {
        self.lock().clone()
    }

    /// Calls `f` with the number of each event that a request from `start` to `end` overlaps;
    /// returns whether there was one.
    pub(crate) fn pauses(&self, start: Instant, end: Instant, mut f: impl FnMut(usize)) -> bool {
        let mut any = false;
        let windows = self.lock();
        // Windows are ordered in time: the first from behind that is over ends the search.
        for (i, w) in windows.iter().enumerate().rev() {
            if w.pauses(start, end) {
                f(i);
                any = true;
            } else if end >= w.begun {
                break;
            }
        }
        any
    }

    /// The event that an error of a request from `start` to `end` belongs to.
    pub(crate) fn blame(&self, start: Instant, end: Instant) -> Option<usize> {
        self.lock().iter().rposition(|w| w.covers(start, end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_belong_to_the_events_they_overlap() {
        let t = Instant::now();
        let at = |ms: u64| t + Duration::from_millis(ms);
        let window = |begun, moved: Option<u64>, settled: Option<u64>| Window {
            kind: EventKind::Crash,
            begun: at(begun),
            moved: moved.map(at),
            settled: settled.map(at),
        };
        let windows = Windows(Mutex::new(vec![
            window(1000, Some(1100), Some(2000)),
            window(5000, Some(5100), Some(6000)),
            window(9000, None, None),
        ]));
        let seen = |start, end| {
            let mut list = Vec::new();
            windows.pauses(at(start), at(end), |i| list.push(i));
            list
        };
        assert_eq!(seen(0, 900), [] as [usize; 0]);
        assert_eq!(seen(900, 1001), [0]);
        assert_eq!(seen(1340, 1341), [0]);
        assert_eq!(seen(1400, 1401), [] as [usize; 0]);
        assert_eq!(seen(1000, 5050), [1, 0]);
        assert_eq!(seen(9500, 9501), [2]);
        assert_eq!(windows.blame(at(0), at(10)), None);
        assert_eq!(windows.blame(at(1800), at(1900)), Some(0));
        assert_eq!(windows.blame(at(3000), at(3001)), None);
        assert_eq!(windows.blame(at(3000), at(9001)), Some(2));
    }
}
