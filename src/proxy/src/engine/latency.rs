//! Latency of the primary's heartbeats, as this proxy sees it, on a connection of its own. A witness
//! only: the controller decides whether the primary is left for it (`helios_cluster::slow`).
//!
//! The invariant: nothing is called slow that most heartbeats of the whole time asked for do not
//! call slow, and nothing is called well again before almost all of them are well below that. A
//! primary that cannot be reached is not slow, it is unreachable, which others look after.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use helios_api::Epoch;
use helios_api::control::Slowness;
use tokio::time::Instant;

use super::gate::Phase;
use super::link::Link;
use super::registry::lock;
use super::replay::simple;
use super::shared::Shared;
use crate::backend;

/// Heartbeats that are judged together.
const WINDOW: usize = 20;

/// What is slow, and for how long it has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatencyRule {
    /// A heartbeat that takes longer is slow.
    pub threshold: Duration,
    /// Most heartbeats have to be for so long.
    pub lasting: Duration,
}

impl LatencyRule {
    /// Time between two heartbeats.
    fn interval(&self) -> Duration {
        let even = self.lasting / u32::try_from(WINDOW).unwrap_or(1);
        even.clamp(Duration::from_millis(10), Duration::from_secs(1))
    }

    /// A heartbeat is not waited for any longer. It counts as slow then.
    fn limit(&self) -> Duration {
        (self.threshold * 4).max(Duration::from_secs(1))
    }
}

/// Judges heartbeats.
#[derive(Debug)]
struct Detector {
    rule: LatencyRule,
    last: VecDeque<(Instant, Duration)>,
    /// Since when the primary has been slow.
    since: Option<Instant>,
}

impl Detector {
    fn new(rule: LatencyRule) -> Self {
        Self {
            rule,
            last: VecDeque::with_capacity(WINDOW),
            since: None,
        }
    }

    /// A heartbeat was answered, or given up, at `at`.
    fn heard(&mut self, at: Instant, latency: Duration) {
        // Whoever pauses begins anew: what was before says nothing of the time between.
        let pause = self.rule.limit() + self.rule.interval() * 4;
        if self.last.back().is_some_and(|(last, _)| at - *last > pause) {
            self.last.clear();
            self.since = None;
        }
        if self.last.len() == WINDOW {
            self.last.pop_front();
        }
        self.last.push_back((at, latency));
        let over = |limit| self.last.iter().filter(|(_, l)| *l > limit).count();
        let begun = self.last.front().map_or(at, |(first, _)| *first);
        // A shorter interval than asked for must not make the time shorter.
        let whole = self.last.len() == WINDOW && at - begun >= self.rule.lasting * 9 / 10;
        let slow = match self.since {
            None => whole && over(self.rule.threshold) * 2 > WINDOW,
            // Well again: all but two are below half of the threshold.
            Some(_) => over(self.rule.threshold / 2) > WINDOW / 10,
        };
        self.since = slow.then(|| self.since.unwrap_or(begun));
    }

    fn slowness(&self, now: Instant) -> Option<Slowness> {
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let since = self.since?;
        let mut sorted: Vec<_> = self.last.iter().map(|(_, l)| *l).collect();
        sorted.sort_unstable();
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
        Some(Slowness {
            threshold_ms: millis(self.rule.threshold),
            median_ms: millis(median),
            for_ms: millis(now.saturating_duration_since(since)),
        })
    }
}

/// What is known of the primary's latency.
pub type Latency = Arc<Mutex<Option<Slowness>>>;

/// Watches until it is dropped.
pub async fn watch(shared: Arc<Shared>, rule: LatencyRule, latency: Latency) {
    let mut gate = shared.gate.watch();
    let mut detector = Detector::new(rule);
    let mut link: Option<(Epoch, Link)> = None;
    let mut seen = Epoch(0);
    loop {
        let state = gate.borrow_and_update().clone();
        let epoch = state.topology.epoch;
        if epoch != seen {
            // Another primary.
            (detector, link, seen) = (Detector::new(rule), None, epoch);
            *lock(&latency) = None;
        }
        if state.phase == Phase::Open {
            if link.is_none() {
                let at = &state.topology.primary.endpoint;
                let limit = shared.options.connect_timeout;
                let conn = backend::connect(at, &shared.tls, &shared.service, limit).await;
                link = conn.ok().map(|c| (epoch, Link::new(c.stream, c.buf)));
            }
            if let Some((_, open)) = &mut link {
                let sent = Instant::now();
                let answer = simple(open, &shared.options.check_query);
                let answer = tokio::time::timeout(rule.limit(), answer).await;
                let now = Instant::now();
                match answer {
                    Ok(Ok(_)) => detector.heard(now, now - sent),
                    // Unreachable, which is another matter; one that is out of step goes too.
                    Ok(Err(_)) => link = None,
                    Err(_) => {
                        detector.heard(now, rule.limit());
                        link = None;
                    }
                }
                show(&shared, &latency, detector.slowness(now));
            }
        }
        let _ = tokio::time::timeout(rule.interval(), gate.changed()).await;
    }
}

fn show(shared: &Shared, latency: &Latency, now: Option<Slowness>) {
    let before = std::mem::replace(&mut *lock(latency), now);
    if before.is_some() != now.is_some() {
        let primary = shared.gate.now().topology.primary.name.clone();
        let median_ms = now.or(before).map(|s| s.median_ms);
        tracing::info!(%primary, slow = now.is_some(), median_ms, "primary's latency changed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: LatencyRule = LatencyRule {
        threshold: Duration::from_millis(100),
        lasting: Duration::from_secs(10),
    };

    /// Whether the primary is slow behind each of these heartbeats, in milliseconds.
    fn judged(heartbeats: impl IntoIterator<Item = u64>) -> Vec<bool> {
        let mut detector = Detector::new(RULE);
        let mut at = Instant::now();
        let each = |ms| {
            at += RULE.interval();
            detector.heard(at, Duration::from_millis(ms));
            detector.slowness(at).is_some()
        };
        heartbeats.into_iter().map(each).collect()
    }

    fn last(heartbeats: impl IntoIterator<Item = u64>) -> bool {
        judged(heartbeats).last().copied().unwrap()
    }

    #[test]
    fn slow_is_what_is_slow_for_the_whole_time() {
        let table: &[(&str, Vec<u64>, bool)] = &[
            ("always well", vec![1; 40], false),
            ("at the threshold", vec![100; 40], false),
            ("over it, too short", vec![101; 19], false),
            ("over it, long enough", vec![101; 20], true),
            (
                "one moment of nine seconds",
                [vec![1; 20], vec![900; 10], vec![1; 10]].concat(),
                false,
            ),
            ("half of them", [1, 200].repeat(20), false),
            ("two in three", [1, 200, 200].repeat(14), true),
            ("one in three", [200, 1, 1].repeat(14), false),
        ];
        for (what, heartbeats, slow) in table {
            assert_eq!(last(heartbeats.iter().copied()), *slow, "{what}");
        }
    }

    #[test]
    fn well_again_only_well_below_the_threshold() {
        let then = |more: Vec<u64>| judged([vec![200; 20], more].concat());
        // Around the threshold nothing changes, however long.
        assert!(then([60, 110].repeat(50)).iter().skip(19).all(|slow| *slow));
        assert!(then(vec![51; 100]).iter().skip(19).all(|slow| *slow));
        // Half of it and below, but for two in twenty.
        assert!(!then(vec![50; 20]).last().unwrap());
        assert!(then(vec![50; 17]).last().unwrap());
        let few = [vec![1; 9], vec![300]].concat().repeat(3);
        assert!(!then(few).last().unwrap());
    }

    #[test]
    fn it_tells_the_median_and_since_when() {
        let mut detector = Detector::new(RULE);
        let start = Instant::now();
        for n in 1..=30_u32 {
            let latency = if n % 3 == 0 { 1 } else { 150 };
            detector.heard(start + RULE.interval() * n, Duration::from_millis(latency));
        }
        let slowness = detector.slowness(start + RULE.interval() * 30).unwrap();
        assert_eq!((slowness.threshold_ms, slowness.median_ms), (100, 150));
        assert!((14_000..=15_000).contains(&slowness.for_ms), "{slowness:?}");
    }

    /// A gate that was closed, or a proxy that stood still, leaves a gap.
    #[test]
    fn a_gap_begins_anew() {
        let mut detector = Detector::new(RULE);
        let mut at = Instant::now();
        for _ in 0..30 {
            at += RULE.interval();
            detector.heard(at, Duration::from_millis(500));
        }
        assert!(detector.slowness(at).is_some());
        at += Duration::from_secs(30);
        detector.heard(at, Duration::from_millis(500));
        assert!(detector.slowness(at).is_none());
    }

    /// Heartbeats that come faster than they should make nothing slow sooner.
    #[test]
    fn the_time_is_a_time_not_a_number() {
        let mut detector = Detector::new(RULE);
        let mut at = Instant::now();
        for _ in 0..100 {
            at += Duration::from_millis(20);
            detector.heard(at, Duration::from_millis(500));
        }
        assert!(detector.slowness(at).is_none());
    }
}
