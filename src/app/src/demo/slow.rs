//! The longest requests of a run, and where among the events each of them lies: what a figure
//! such as p99 came from.
//!
//! Pure. Invariant: a [`Longest`] never holds more than [`KEPT`] requests, the longest first.

use std::time::Instant;

use serde::Serialize;

use super::client::Outcome;
use super::record::Phase;
use super::windows::Window;

/// Requests that are kept.
const KEPT: usize = 20;

/// One request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) phase: Phase,
    pub(crate) start: Instant,
    pub(crate) end: Instant,
}

impl Request {
    fn micros(&self) -> u128 {
        (self.end - self.start).as_micros()
    }
}

/// The longest requests of one client.
#[derive(Debug, Default)]
pub(crate) struct Longest(Vec<Request>);

impl Longest {
    /// Takes the request if it is one of the longest.
    pub(crate) fn offer(&mut self, request: Request) {
        let full = self.0.len() == KEPT;
        if full
            && self
                .0
                .last()
                .is_some_and(|l| l.micros() >= request.micros())
        {
            return;
        }
        let place = self.0.partition_point(|r| r.micros() >= request.micros());
        self.0.insert(place, request);
        self.0.truncate(KEPT);
    }
}

/// One of the longest requests, as the report shows it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct SlowRequest {
    ms: f64,
    client: usize,
    kind: &'static str,
    phase: &'static str,
    /// Number of the last event that began before the request ended, from 1.
    event: Option<usize>,
    event_kind: Option<&'static str>,
    /// When the request began, in milliseconds after that event's beginning; negative: before.
    began_after_ms: Option<f64>,
    /// When a new primary took work, in milliseconds after that event's beginning.
    moved_after_ms: Option<f64>,
}

/// The longest requests of all clients.
pub(crate) fn longest(outcomes: &[Outcome], windows: &[Window]) -> Vec<SlowRequest> {
    let mut all: Vec<(&Outcome, &Request)> = outcomes
        .iter()
        .flat_map(|o| o.recorder.longest.0.iter().map(move |r| (o, r)))
        .collect();
    all.sort_by_key(|(_, r)| std::cmp::Reverse(r.micros()));
    all.truncate(KEPT);
    all.into_iter().map(|(o, r)| shown(o, r, windows)).collect()
}

fn shown(outcome: &Outcome, request: &Request, windows: &[Window]) -> SlowRequest {
    let event = windows.iter().rposition(|w| w.begun <= request.end);
    let window = event.map(|number| &windows[number]);
    SlowRequest {
        ms: millis(request.start, request.end),
        client: outcome.index,
        kind: outcome.kind.label(),
        phase: request.phase.label(),
        event: event.map(|number| number + 1),
        event_kind: window.map(|w| w.kind.label()),
        began_after_ms: window.map(|w| millis(w.begun, request.start)),
        moved_after_ms: window.and_then(|w| w.moved.map(|moved| millis(w.begun, moved))),
    }
}

/// Milliseconds from one to the other; negative if `to` is earlier.
fn millis(from: Instant, to: Instant) -> f64 {
    let (forth, back) = (
        to.saturating_duration_since(from),
        from.saturating_duration_since(to),
    );
    (forth.as_secs_f64() - back.as_secs_f64()) * 1000.0
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_the_longest_are_kept_and_in_order() {
        let start = Instant::now();
        let mut longest = Longest::default();
        for ms in (1..=50).chain([7, 60, 2]) {
            longest.offer(Request {
                phase: Phase::Read,
                start,
                end: start + Duration::from_millis(ms),
            });
        }
        let kept: Vec<u128> = longest.0.iter().map(|r| r.micros() / 1000).collect();
        let want: Vec<u128> = std::iter::once(60).chain((32..=50).rev()).collect();
        assert_eq!(kept, want);
    }
}
