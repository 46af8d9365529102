//! What a client measures: latencies, pauses by event, errors.
//!
//! Touches only its own memory and the shared windows and counters. Invariant: every request that
//! a client makes passes [`Recorder::answered`], and every error [`Recorder::failed`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use hdrhistogram::Histogram;

use super::slow::{Longest, Request};
use super::windows::Windows;

/// Longest latency that the histograms hold: a minute, in microseconds.
const LONGEST: u64 = 60_000_000;
/// Errors that a client keeps in full; the rest is only counted.
const KEPT_ERRORS: usize = 200;

/// A histogram of microseconds with three significant digits.
#[expect(
    clippy::expect_used,
    reason = "the bounds are constants; any test that calls this proves them valid"
)]
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST, 3).expect("bounds are valid")
}

/// What a client was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    Connect,
    Prepare,
    Begin,
    Read,
    Write,
    Fetch,
    Ledger,
    Commit,
    Pipeline,
}

impl Phase {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Prepare => "prepare",
            Self::Begin => "begin",
            Self::Read => "read",
            Self::Write => "write",
            Self::Fetch => "fetch",
            Self::Ledger => "ledger",
            Self::Commit => "commit",
            Self::Pipeline => "pipeline",
        }
    }
}

/// A request that went wrong.
#[derive(Debug, Clone)]
pub(crate) struct Trouble {
    pub(crate) phase: Phase,
    pub(crate) sqlstate: Option<String>,
    pub(crate) message: String,
    pub(crate) start: Instant,
    pub(crate) end: Instant,
}

/// A trouble with its place among the events.
#[derive(Debug, Clone)]
pub(crate) struct ClientError {
    pub(crate) trouble: Trouble,
    /// Number of the event; `None`: none was going on.
    pub(crate) event: Option<usize>,
}

/// Counters for the progress line.
#[derive(Debug, Default)]
pub(crate) struct Live {
    pub(crate) acknowledged: AtomicU64,
    pub(crate) errors: AtomicU64,
}

/// The measurements of one client.
#[derive(Debug)]
pub(crate) struct Recorder {
    windows: Arc<Windows>,
    live: Arc<Live>,
    /// Longest request during each event, in microseconds.
    pub(crate) pauses: Vec<Option<u64>>,
    /// Latencies of all requests outside of events, in microseconds.
    pub(crate) steady: Histogram<u64>,
    pub(crate) longest: Longest,
    /// The first errors.
    pub(crate) errors: Vec<ClientError>,
    /// Errors by event; the last element of the pair counts.
    pub(crate) error_counts: Vec<(Option<usize>, u64)>,
}

impl Recorder {
    pub(crate) fn new(windows: Arc<Windows>, live: Arc<Live>) -> Self {
        Self {
            windows,
            live,
            pauses: Vec::new(),
            steady: histogram(),
            longest: Longest::default(),
            errors: Vec::new(),
            error_counts: Vec::new(),
        }
    }

    /// A request was under way, whatever came of it.
    pub(crate) fn answered(&mut self, request: Request) {
        let Request { start, end, .. } = request;
        self.longest.offer(request);
        let took = u64::try_from((end - start).as_micros()).unwrap_or(u64::MAX);
        let pauses = &mut self.pauses;
        let in_event = self.windows.pauses(start, end, |event| {
            if pauses.len() <= event {
                pauses.resize(event + 1, None);
            }
            let longest = &mut pauses[event];
            *longest = Some(longest.unwrap_or(0).max(took));
        });
        if !in_event {
            self.steady.saturating_record(took.clamp(1, LONGEST));
        }
    }

    /// A request failed.
    pub(crate) fn failed(&mut self, trouble: Trouble) {
        let event = self.windows.blame(trouble.start, trouble.end);
        match self.error_counts.iter_mut().find(|(e, _)| *e == event) {
            Some((_, count)) => *count += 1,
            None => self.error_counts.push((event, 1)),
        }
        self.live.errors.fetch_add(1, Ordering::Relaxed);
        if self.errors.len() < KEPT_ERRORS {
            self.errors.push(ClientError { trouble, event });
        }
    }

    /// `count` transfers were acknowledged.
    pub(crate) fn acknowledged(&self, count: u64) {
        self.live.acknowledged.fetch_add(count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::demo::plan::EventKind;

    #[test]
    fn the_longest_request_of_an_event_is_its_pause() {
        let windows = Arc::new(Windows::default());
        let mut recorder = Recorder::new(Arc::clone(&windows), Arc::default());
        let before = Instant::now();
        let request = |start, took| Request {
            phase: Phase::Read,
            start,
            end: start + took,
        };
        recorder.answered(request(before, Duration::from_micros(500)));
        // Let the event begin after the request before it has ended.
        std::thread::sleep(Duration::from_millis(2));
        let begun = windows.begin(EventKind::Crash);
        for ms in [3, 80, 7] {
            recorder.answered(request(begun, Duration::from_millis(ms)));
        }
        assert_eq!(recorder.pauses, [Some(80_000)]);
        assert_eq!(recorder.steady.len(), 1);
        recorder.failed(Trouble {
            phase: Phase::Commit,
            sqlstate: None,
            message: "closed".to_owned(),
            start: begun,
            end: begun,
        });
        assert_eq!(recorder.error_counts, [(Some(0), 1)]);
    }
}
