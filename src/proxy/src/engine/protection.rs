//! The protection report: what a failover would cost, counted before it happens.
//!
//! Counted for each database, user and application name, up to a number of them; the rest counts
//! as one. The invariant: a transaction is counted once, at its end, and a second of a session's
//! once. On the forwarding path nothing is locked and nothing allocated: an atomic addition for a
//! transaction, and a look at the clock where it begins and ends.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use helios_api::protection::{ProtectionReport, ProtectionRow, Unprotected};
use helios_telemetry::metrics::Metrics;
use prometheus::{Counter, IntCounter};

use super::registry::lock;

/// Databases, users and application names that are told apart: each is a few dozen series.
const MAX_KEYS: usize = 100;

/// Longest application name that is kept, in bytes, as PostgreSQL cuts it (`NAMEDATALEN`).
const MAX_NAME: usize = 63;

/// Protected, and every reason why not.
const VERDICTS: usize = 1 + Unprotected::ALL.len();

/// Whose sessions.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Who {
    /// Database.
    pub database: String,
    /// Role that logged in.
    pub user: String,
    /// `application_name` of the login.
    pub application: String,
}

impl Who {
    /// Cuts names that are too long and drops control characters: whoever logs in chooses them.
    #[must_use]
    pub fn cut(mut self) -> Self {
        for name in [&mut self.database, &mut self.user, &mut self.application] {
            let end = (0..=MAX_NAME.min(name.len())).rev();
            let end = end.into_iter().find(|at| name.is_char_boundary(*at));
            name.truncate(end.unwrap_or(0));
            if name.contains(char::is_control) {
                *name = name.replace(char::is_control, "?");
            }
        }
        self
    }
}

/// What is counted of one transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A transaction block.
    Transaction,
    /// A statement outside of one.
    Statement,
}

const UNITS: [(Unit, &str); 2] = [
    (Unit::Transaction, "transaction"),
    (Unit::Statement, "statement"),
];
/// Outside of a transaction block, and inside.
const STATES: [&str; 2] = ["idle", "in_transaction"];

fn verdict(reason: Option<Unprotected>) -> usize {
    reason.map_or(0, |r| 1 + r as usize)
}

fn reason(verdict: usize) -> Option<Unprotected> {
    Unprotected::ALL.get(verdict.checked_sub(1)?).copied()
}

fn label(verdict: usize) -> &'static str {
    reason(verdict).map_or("protected", Unprotected::name)
}

/// The counters of one database, user and application name. Those that count nothing yet are not
/// there.
#[derive(Debug)]
pub struct Counts {
    /// Whose.
    pub who: Who,
    metrics: Metrics,
    ended: [[OnceLock<IntCounter>; VERDICTS]; 2],
    seconds: [[OnceLock<Counter>; VERDICTS]; 2],
}

impl Counts {
    fn new(who: Who, metrics: Metrics) -> Self {
        Self {
            who,
            metrics,
            ended: Default::default(),
            seconds: Default::default(),
        }
    }

    /// Counts a transaction that has ended.
    pub fn ended(&self, unit: Unit, why: Option<Unprotected>) {
        let at = verdict(why);
        let (kind, name) = UNITS[unit as usize];
        let counter = self.ended[kind as usize][at].get_or_init(|| {
            let labels = self.labels(name, label(at));
            self.metrics.protection_transactions(&labels)
        });
        counter.inc();
    }

    fn spent(&self, state: State, micros: u64) {
        let side = usize::from(state.inside);
        let counter = self.seconds[side][state.verdict].get_or_init(|| {
            let labels = self.labels(STATES[side], label(state.verdict));
            self.metrics.protection_seconds(&labels)
        });
        #[expect(
            clippy::cast_precision_loss,
            reason = "53 bits of microseconds are 285 years"
        )]
        counter.inc_by(micros as f64 / 1e6);
    }

    fn labels<'a>(&'a self, kind: &'a str, verdict: &'a str) -> [&'a str; 5] {
        let who = &self.who;
        [&who.database, &who.user, &who.application, kind, verdict]
    }

    fn rows(&self) -> impl Iterator<Item = ProtectionRow> + '_ {
        let count =
            |at: usize, unit: Unit| self.ended[unit as usize][at].get().map(IntCounter::get);
        let time = |at: usize, inside: usize| self.seconds[inside][at].get().map(Counter::get);
        (0..VERDICTS).filter_map(move |at| {
            let row = ProtectionRow {
                database: self.who.database.clone(),
                user: self.who.user.clone(),
                application: self.who.application.clone(),
                reason: reason(at),
                transactions: count(at, Unit::Transaction).unwrap_or(0),
                statements: count(at, Unit::Statement).unwrap_or(0),
                transaction_seconds: time(at, 1).unwrap_or(0.0),
                idle_seconds: time(at, 0).unwrap_or(0.0),
            };
            let spent = row.transaction_seconds + row.idle_seconds;
            (row.transactions + row.statements > 0 || spent > 0.0).then_some(row)
        })
    }
}

/// All counters of a proxy.
#[derive(Debug)]
pub struct Ledger {
    metrics: Metrics,
    since: SystemTime,
    keys: Mutex<HashMap<Who, Arc<Counts>>>,
    others: OnceLock<Arc<Counts>>,
}

impl Ledger {
    /// Empty.
    #[must_use]
    pub fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            since: SystemTime::now(),
            keys: Mutex::default(),
            others: OnceLock::new(),
        }
    }

    /// The counters for `who`, or those of all others where there are too many.
    pub fn counts(&self, who: &Who) -> Arc<Counts> {
        let mut keys = lock(&self.keys);
        if let Some(counts) = keys.get(who) {
            return Arc::clone(counts);
        }
        if keys.len() >= MAX_KEYS {
            let other = || "other".to_owned();
            let all = || Who {
                database: other(),
                user: other(),
                application: other(),
            };
            let others = || Arc::new(Counts::new(all(), self.metrics.clone()));
            return Arc::clone(self.others.get_or_init(others));
        }
        let counts = Arc::new(Counts::new(who.clone(), self.metrics.clone()));
        keys.insert(who.clone(), Arc::clone(&counts));
        counts
    }

    /// The report, of one role's sessions where one is given. Sessions' meters have to be read
    /// first, or it lacks the time since their last change.
    #[must_use]
    pub fn report(&self, of: Option<&str>) -> ProtectionReport {
        let mut all: Vec<_> = lock(&self.keys).values().cloned().collect();
        all.retain(|c| of.is_none_or(|user| c.who.user == user));
        all.sort_by(|a, b| {
            let key = |w: &Who| (w.database.clone(), w.user.clone(), w.application.clone());
            key(&a.who).cmp(&key(&b.who))
        });
        all.extend(self.others.get().filter(|_| of.is_none()).cloned());
        let since = self.since.duration_since(UNIX_EPOCH).unwrap_or_default();
        ProtectionReport {
            since: since.as_secs_f64(),
            rows: all.iter().flat_map(|c| c.rows()).collect(),
        }
    }
}

/// What a session's time counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    verdict: usize,
    inside: bool,
}

/// A session's clock: since when it counts as what, in one word, so that every moment is taken
/// once, by the session or by whoever reads the meter.
#[derive(Debug)]
pub struct Meter {
    /// Where it counts.
    pub counts: Arc<Counts>,
    clock: Instant,
    /// Microseconds since `clock`, then a byte: 0 when the session has ended, else the state.
    word: AtomicU64,
}

const INSIDE: u64 = 0x80;

fn pack(at: u64, state: Option<State>) -> u64 {
    let byte = state.map_or(0, |s| {
        (1 + s.verdict as u64) | if s.inside { INSIDE } else { 0 }
    });
    at << 8 | byte
}

fn unpack(word: u64) -> (u64, Option<State>) {
    let byte = word & 0xFF;
    let verdict = usize::try_from(byte & !INSIDE).unwrap_or(0);
    let state = verdict.checked_sub(1).map(|verdict| State {
        verdict: verdict.min(VERDICTS - 1),
        inside: byte & INSIDE != 0,
    });
    (word >> 8, state)
}

impl Meter {
    /// Begins to count, outside of a transaction block.
    #[must_use]
    pub fn begin(counts: Arc<Counts>, clock: Instant, why: Option<Unprotected>) -> Self {
        let meter = Self {
            counts,
            clock,
            word: AtomicU64::new(0),
        };
        meter.set(why, false);
        meter
    }

    /// From now on the session's time counts so.
    pub fn set(&self, why: Option<Unprotected>, inside: bool) {
        let verdict = verdict(why);
        self.take(|_| Some(Some(State { verdict, inside })));
    }

    /// Counts the time up to now; not that of a session that has ended.
    pub fn read(&self) {
        self.take(|state| state.map(Some));
    }

    /// The session ends.
    pub fn end(&self) {
        self.take(|_| Some(None));
    }

    /// Why a failover now would cost the session an error.
    #[must_use]
    pub fn reason(&self) -> Option<Unprotected> {
        unpack(self.word.load(Ordering::Relaxed))
            .1
            .and_then(|s| reason(s.verdict))
    }

    fn take(&self, next: impl Fn(Option<State>) -> Option<Option<State>>) {
        let now = u64::try_from(self.clock.elapsed().as_micros()).unwrap_or(u64::MAX >> 8);
        let change = |word| {
            let (at, state) = unpack(word);
            next(state).map(|next| pack(now.max(at), next))
        };
        let taken = self
            .word
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
        if let Ok(old) = taken
            && let (at, Some(state)) = unpack(old)
        {
            self.counts.spent(state, now.saturating_sub(at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(application: &str) -> Who {
        Who {
            database: "shop".into(),
            user: "app".into(),
            application: application.into(),
        }
    }

    #[test]
    fn what_is_told_apart_is_bounded() {
        let metrics = Metrics::new();
        let ledger = Ledger::new(metrics.clone());
        for n in 0..3 * MAX_KEYS {
            let counts = ledger.counts(&who(&format!("client {n}")));
            counts.ended(Unit::Statement, None);
        }
        let rows = ledger.report(None).rows;
        assert_eq!(rows.len(), MAX_KEYS + 1);
        let other = rows.iter().find(|r| r.application == "other");
        assert_eq!(other.map(|r| r.statements), Some(2 * MAX_KEYS as u64));
        assert_eq!(rows.iter().map(|r| r.statements).sum::<u64>(), 300);
        assert_eq!(ledger.report(Some("app")).rows.len(), MAX_KEYS);
        assert!(ledger.report(Some("boss")).rows.is_empty());
        let series = metrics.render();
        let named = |l: &&str| l.starts_with("helios_protection_transactions_total{");
        assert_eq!(series.lines().filter(named).count(), MAX_KEYS + 1);
    }

    #[test]
    fn long_names_are_cut_between_characters() {
        let cut = who(&"ä".repeat(40)).cut();
        assert_eq!(cut.application, "ä".repeat(31));
    }

    /// Readers and the session itself, side by side: no moment is counted twice or not at all.
    #[test]
    fn every_moment_counts_once() {
        let ledger = Ledger::new(Metrics::new());
        let clock = Instant::now();
        let meter = Meter::begin(ledger.counts(&who("")), clock, None);
        let began = clock.elapsed().as_secs_f64();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..20_000).for_each(|_| meter.read()));
            }
            for n in 0..20_000 {
                meter.set(
                    (n % 3 == 0).then_some(Unprotected::CursorWithHold),
                    n % 2 == 0,
                );
            }
        });
        let least = clock.elapsed().as_secs_f64() - began;
        meter.end();
        let most = clock.elapsed().as_secs_f64();
        meter.read();
        meter.end();
        let rows = ledger.report(None).rows;
        let sum: f64 = rows
            .iter()
            .map(|r| r.transaction_seconds + r.idle_seconds)
            .sum();
        // The clock is cut to microseconds, once at either end.
        let bounds = least - 2e-6..most + 2e-6;
        assert!(bounds.contains(&sum), "{sum} of {bounds:?}");
        assert_eq!(rows.len(), 2);
        assert_eq!(meter.reason(), None);
    }
}
