//! What a run came to: figures, verdict, and both ways to show them.
//!
//! Pure. Invariant: [`Report::ok`] is true only if every event took place, no client saw an error,
//! and the ledger holds what the clients noted, on every instance.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::check::Findings;
use super::client::Outcome;
use super::disk::Disk;
use super::plan::EventKind;
use super::record::histogram;
use super::slow::{SlowRequest, longest};
use super::windows::Window;

/// Durations of one move's phases, in order, in microseconds.
pub(crate) type Phases = Vec<(&'static str, u64)>;

/// One event that took place.
#[derive(Debug, Clone)]
pub(crate) struct Done {
    pub(crate) kind: EventKind,
    pub(crate) phases: Phases,
}

/// Percentiles in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Percentiles {
    p50: f64,
    p95: f64,
    p99: f64,
    max: f64,
}

/// Picks one of them.
type Figure = fn(&Percentiles) -> f64;

/// One kind of event.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct KindReport {
    planned: usize,
    count: usize,
    client_errors: u64,
    /// Longest request of each client during each event; `null` without any.
    pause_ms: Option<Percentiles>,
    /// The same of the events during which the disk did not stall; `null` when it was not measured.
    while_disk_answers: Option<Answering>,
}

/// The events during which the disk did not stall.
#[derive(Debug, Clone, Serialize)]
struct Answering {
    count: usize,
    pause_ms: Option<Percentiles>,
}

/// The disk meanwhile, with or without an event.
#[derive(Debug, Clone, Serialize)]
struct DiskReport {
    /// A write and its sync, every 10 ms.
    sync_ms: Option<Percentiles>,
    /// Syncs of 50 ms and more.
    stalls: usize,
}

/// Outside of events.
#[derive(Debug, Clone, Serialize)]
struct Steady {
    client_errors: u64,
    request_ms: Option<Percentiles>,
}

/// The judge's verdict.
#[derive(Debug, Clone, Serialize)]
struct Ledger {
    acknowledged: u64,
    lost: u64,
    duplicated: u64,
    altered: u64,
    phantom: u64,
    unacknowledged_present: u64,
    balanced: bool,
}

/// Mean duration of each phase in milliseconds, by kind of event.
#[derive(Debug, Clone, Serialize)]
struct PhaseMeans {
    switchovers: BTreeMap<&'static str, f64>,
    crashes: BTreeMap<&'static str, f64>,
}

/// The whole run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    ok: bool,
    clients: usize,
    seed: u64,
    mode: String,
    seconds: f64,
    switchovers: KindReport,
    crashes: KindReport,
    steady: Steady,
    disk: Option<DiskReport>,
    ledger: Ledger,
    phases: PhaseMeans,
    /// The longest requests of all clients, in events and between them.
    slowest: Vec<SlowRequest>,
    /// Errors and findings, for people; the first of each.
    problems: Vec<String>,
    /// Phases in the order in which they happen, for the table.
    #[serde(skip)]
    phase_order: Vec<&'static str>,
}

/// What a report is made of.
pub(crate) struct Run<'a> {
    pub(crate) seed: u64,
    pub(crate) mode: &'a str,
    pub(crate) planned: (usize, usize),
    pub(crate) seconds: f64,
    /// Every event that was begun.
    pub(crate) windows: &'a [Window],
    pub(crate) done: &'a [Done],
    pub(crate) outcomes: &'a [Outcome],
    pub(crate) findings: &'a Findings,
    /// What was seen of the disk; `None`: it was not measured.
    pub(crate) disk: Option<&'a Disk>,
    /// What kept the run from being complete.
    pub(crate) faults: Vec<String>,
}

/// Client errors that the report shows in full.
const SHOWN_ERRORS: usize = 20;

impl Report {
    pub(crate) fn new(run: &Run<'_>) -> Self {
        let kind = |kind, planned| kind_report(run, kind, planned);
        let switchovers = kind(EventKind::Switchover, run.planned.0);
        let crashes = kind(EventKind::Crash, run.planned.1);
        let steady = Steady {
            client_errors: errors_where(run, |event| event.is_none()),
            request_ms: steady_latency(run),
        };
        let f = run.findings;
        let errors = switchovers.client_errors + crashes.client_errors + steady.client_errors;
        let complete = switchovers.count == switchovers.planned && crashes.count == crashes.planned;
        Self {
            ok: errors == 0 && f.good() && complete && run.faults.is_empty(),
            clients: run.outcomes.len(),
            seed: run.seed,
            mode: run.mode.to_owned(),
            seconds: run.seconds,
            phases: PhaseMeans {
                switchovers: means(run.done, EventKind::Switchover),
                crashes: means(run.done, EventKind::Crash),
            },
            switchovers,
            crashes,
            steady,
            disk: run.disk.map(|disk| DiskReport {
                sync_ms: percentiles(&disk.syncs),
                stalls: disk.stalls.len(),
            }),
            ledger: Ledger {
                acknowledged: f.acknowledged,
                lost: f.lost,
                duplicated: f.duplicated,
                altered: f.altered,
                phantom: f.phantom,
                unacknowledged_present: f.unacknowledged,
                balanced: f.balanced,
            },
            slowest: longest(run.outcomes, run.windows),
            problems: problems(run),
            phase_order: phase_order(run.done),
        }
    }

    pub(crate) fn ok(&self) -> bool {
        self.ok
    }

    /// One JSON object on one line.
    pub(crate) fn json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// The table for people.
    pub(crate) fn table(&self) -> String {
        let mut t = String::new();
        let _ = writeln!(t, "\n{:<22}{:>14}{:>14}", "", "switchovers", "crashes");
        let (s, c) = (&self.switchovers, &self.crashes);
        let mut row = |name: &str, a: String, b: String| {
            let _ = writeln!(t, "{name:<22}{a:>14}{b:>14}");
        };
        row(
            "events",
            format!("{}/{}", s.count, s.planned),
            format!("{}/{}", c.count, c.planned),
        );
        row(
            "client errors",
            s.client_errors.to_string(),
            c.client_errors.to_string(),
        );
        let figures: [(&str, Figure); 4] = [
            ("pause p50", |p| p.p50),
            ("pause p95", |p| p.p95),
            ("pause p99", |p| p.p99),
            ("pause max", |p| p.max),
        ];
        for (name, get) in figures {
            row(
                name,
                millis(s.pause_ms.as_ref().map(get)),
                millis(c.pause_ms.as_ref().map(get)),
            );
        }
        self.answering(&mut row);
        for phase in &self.phase_order {
            row(
                &format!("mean {phase}"),
                millis(self.phases.switchovers.get(phase).copied()),
                millis(self.phases.crashes.get(phase).copied()),
            );
        }
        self.totals(&mut t);
        t
    }

    /// Rows of the events during which the disk did not stall.
    fn answering(&self, row: &mut impl FnMut(&str, String, String)) {
        let both = [&self.switchovers, &self.crashes].map(|k| k.while_disk_answers.as_ref());
        if both.iter().all(Option::is_none) {
            return;
        }
        let [s, c] = both.map(|k| k.map_or_else(|| "-".to_owned(), |k| k.count.to_string()));
        row("disk did not stall", s, c);
        let figures: [(&str, Figure); 2] = [("  pause p50", |p| p.p50), ("  pause p99", |p| p.p99)];
        for (name, get) in figures {
            let [s, c] = both.map(|k| millis(k.and_then(|k| k.pause_ms.as_ref().map(get))));
            row(name, s, c);
        }
    }

    fn disk_sync(&self, get: Figure) -> String {
        let syncs = self.disk.as_ref().and_then(|d| d.sync_ms.as_ref());
        millis(syncs.map(get))
    }

    fn totals(&self, t: &mut String) {
        let l = &self.ledger;
        let lines = [
            ("clients", self.clients.to_string()),
            (
                "errors between events",
                self.steady.client_errors.to_string(),
            ),
            (
                "request p99 meanwhile",
                millis(self.steady.request_ms.map(|p| p.p99)),
            ),
            ("disk sync p99", self.disk_sync(|p| p.p99)),
            ("disk sync max", self.disk_sync(|p| p.max)),
            ("acknowledged", l.acknowledged.to_string()),
            ("lost", l.lost.to_string()),
            ("duplicated", l.duplicated.to_string()),
            ("altered or unasked", (l.altered + l.phantom).to_string()),
            (
                "unanswered, committed",
                l.unacknowledged_present.to_string(),
            ),
            (
                "ledger in balance",
                if l.balanced { "yes" } else { "NO" }.to_owned(),
            ),
            ("time", format!("{:.0} s", self.seconds)),
            ("seed", self.seed.to_string()),
        ];
        t.push('\n');
        for (name, value) in lines {
            let _ = writeln!(t, "{name:<22}{value:>14}");
        }
        if !self.problems.is_empty() {
            t.push('\n');
        }
        for problem in &self.problems {
            let _ = writeln!(t, "{problem}");
        }
        let verdict = if self.ok {
            "\nGOOD: no client saw an error, nothing was lost, nothing was applied twice"
        } else {
            "\nFAILED"
        };
        let _ = writeln!(t, "{verdict}");
    }
}

fn millis(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1} ms"))
}

fn kind_report(run: &Run<'_>, kind: EventKind, planned: usize) -> KindReport {
    let of_kind = |event: usize| run.windows.get(event).is_some_and(|w| w.kind == kind);
    KindReport {
        planned,
        count: run.done.iter().filter(|d| d.kind == kind).count(),
        client_errors: errors_where(run, |event| event.is_some_and(of_kind)),
        pause_ms: pauses(run, of_kind),
        while_disk_answers: run.disk.map(|disk| {
            let answers = |event: usize| {
                let window = run.windows.get(event);
                of_kind(event) && window.is_some_and(|w| !disk.disturbed(w))
            };
            Answering {
                count: (0..run.windows.len()).filter(|e| answers(*e)).count(),
                pause_ms: pauses(run, answers),
            }
        }),
    }
}

/// The longest requests of all clients during the events that `which` names.
fn pauses(run: &Run<'_>, which: impl Fn(usize) -> bool) -> Option<Percentiles> {
    let mut pauses = histogram();
    for outcome in run.outcomes {
        let seen = outcome.recorder.pauses.iter().enumerate();
        for (_, pause) in seen.filter(|(event, _)| which(*event)) {
            if let Some(micros) = pause {
                pauses.saturating_record((*micros).max(1));
            }
        }
    }
    percentiles(&pauses)
}

fn errors_where(run: &Run<'_>, which: impl Fn(Option<usize>) -> bool) -> u64 {
    run.outcomes
        .iter()
        .flat_map(|o| &o.recorder.error_counts)
        .filter(|(event, _)| which(*event))
        .map(|(_, count)| count)
        .sum()
}

fn steady_latency(run: &Run<'_>) -> Option<Percentiles> {
    let mut all = histogram();
    for outcome in run.outcomes {
        // The histograms are made alike, so that adding cannot fail.
        let _ = all.add(&outcome.recorder.steady);
    }
    percentiles(&all)
}

fn percentiles(h: &hdrhistogram::Histogram<u64>) -> Option<Percentiles> {
    if h.is_empty() {
        return None;
    }
    let at = |q| h.value_at_quantile(q) as f64 / 1000.0;
    Some(Percentiles {
        p50: at(0.5),
        p95: at(0.95),
        p99: at(0.99),
        max: h.max() as f64 / 1000.0,
    })
}

fn means(done: &[Done], kind: EventKind) -> BTreeMap<&'static str, f64> {
    let mut sums: BTreeMap<&'static str, (u64, u64)> = BTreeMap::new();
    for (phase, micros) in done
        .iter()
        .filter(|d| d.kind == kind)
        .flat_map(|d| &d.phases)
    {
        let sum = sums.entry(phase).or_default();
        sum.0 += micros;
        sum.1 += 1;
    }
    sums.into_iter()
        .map(|(phase, (micros, count))| (phase, micros as f64 / count as f64 / 1000.0))
        .collect()
}

fn phase_order(done: &[Done]) -> Vec<&'static str> {
    let mut order = Vec::new();
    // The longest list first: a crash has no drain, a switchover has all.
    let mut lists: Vec<_> = done.iter().map(|d| &d.phases).collect();
    lists.sort_by_key(|phases| std::cmp::Reverse(phases.len()));
    for (phase, _) in lists.into_iter().flatten() {
        if !order.contains(phase) {
            order.push(*phase);
        }
    }
    order
}

fn problems(run: &Run<'_>) -> Vec<String> {
    let mut list: Vec<String> = run.faults.clone();
    let errors = run
        .outcomes
        .iter()
        .flat_map(|o| o.recorder.errors.iter().map(move |e| (o, e)));
    for (outcome, error) in errors.take(SHOWN_ERRORS) {
        let place = match error.event {
            Some(event) => {
                let kind = run.windows.get(event).map_or("event", |w| w.kind.label());
                format!("event {} ({kind})", event + 1)
            }
            None => "between events".to_owned(),
        };
        let t = &error.trouble;
        list.push(format!(
            "client {} ({}), {place}, {}: {} {}",
            outcome.index,
            outcome.kind.label(),
            t.phase.label(),
            t.sqlstate.as_deref().unwrap_or("-----"),
            t.message
        ));
    }
    list.extend(run.findings.details.iter().cloned());
    list
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::demo::bank::Notes;
    use crate::demo::plan::ClientKind;
    use crate::demo::record::{Phase, Recorder, Trouble};
    use crate::demo::slow::Request;
    use crate::demo::windows::Windows;

    fn outcome(error: bool) -> (Outcome, Vec<Window>) {
        let windows = Arc::new(Windows::default());
        let mut recorder = Recorder::new(Arc::clone(&windows), Arc::default());
        let begun = windows.begin(EventKind::Crash);
        recorder.answered(Request {
            phase: Phase::Commit,
            start: begun,
            end: begun + Duration::from_millis(100),
        });
        if error {
            recorder.failed(Trouble {
                phase: Phase::Commit,
                sqlstate: Some("08007".to_owned()),
                message: "outcome unknown".to_owned(),
                start: begun,
                end: begun,
            });
        }
        let outcome = Outcome {
            index: 0,
            kind: ClientKind::Plain,
            notes: Notes::new(0),
            recorder,
        };
        (outcome, windows.all())
    }

    fn report(error: bool, balanced: bool, crashes: usize) -> Report {
        let (outcome, begun) = outcome(error);
        Report::new(&Run {
            seed: 1,
            mode: "transaction",
            planned: (0, crashes),
            seconds: 1.0,
            windows: &begun,
            done: &[Done {
                kind: EventKind::Crash,
                phases: vec![("promote", 12_000), ("replay", 3_000)],
            }],
            outcomes: &[outcome],
            findings: &Findings {
                balanced,
                ..Findings::default()
            },
            disk: None,
            faults: Vec::new(),
        })
    }

    #[test]
    fn the_verdict_needs_everything() {
        assert!(report(false, true, 1).ok());
        assert!(!report(true, true, 1).ok());
        assert!(!report(false, false, 1).ok());
        assert!(!report(false, true, 2).ok(), "an event is missing");
    }

    #[test]
    fn json_has_the_promised_keys() {
        let json: serde_json::Value =
            serde_json::from_str(&report(true, true, 1).json().unwrap()).unwrap();
        assert_eq!(json["clients"], 1);
        assert_eq!(json["crashes"]["count"], 1);
        assert_eq!(json["crashes"]["client_errors"], 1);
        let p50 = json["crashes"]["pause_ms"]["p50"].as_f64().unwrap();
        assert!((p50 - 100.0).abs() < 0.2, "{p50}");
        assert_eq!(json["switchovers"]["client_errors"], 0);
        assert!(json["switchovers"]["pause_ms"].is_null());
        assert_eq!(json["ledger"]["lost"], 0);
        assert_eq!(json["ledger"]["balanced"], true);
        assert_eq!(json["phases"]["crashes"]["promote"], 12.0);
        assert_eq!(json["slowest"][0]["phase"], "commit");
        assert_eq!(json["slowest"][0]["event_kind"], "crash");
        assert_eq!(json["slowest"][0]["began_after_ms"], 0.0);
        assert!(json["problems"][0].as_str().unwrap().contains("08007"));
    }

    #[test]
    fn the_table_names_what_went_wrong() {
        let table = report(true, false, 1).table();
        for part in ["1/1", "08007", "mean promote", "NO", "FAILED", "12.0 ms"] {
            assert!(table.contains(part), "{part} not in {table}");
        }
    }
}
