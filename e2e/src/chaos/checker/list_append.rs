//! List-append histories, judged as Elle does: lists give away the order of their versions.
//!
//! Every appended value is unique, so that a list that was read names all writers of that version
//! in order. From there: what is lost, doubled, torn or phantom, and the graph of dependencies.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::graph::{Cycle, Dependency, Edge, Graph};
use super::{Anomaly, Finding};
use crate::chaos::history::{Key, Op, Outcome, Txn, Value};

/// The lists at the end, read when nobody wrote any more.
pub type Final = BTreeMap<Key, Vec<Value>>;

/// Findings of one kind that are reported.
const SHOWN: usize = 3;

/// All anomalies of a history, whether its level forbids them or not.
#[must_use]
pub fn check(txns: &[Txn], last: &Final) -> Vec<Finding> {
    let history = History::new(txns, last);
    let mut findings = Vec::new();
    findings.extend(first(history.internal()));
    findings.extend(first(history.contents()));
    findings.extend(first(history.reads()));
    findings.extend(first(history.stale()));
    findings.extend(history.cycles());
    findings
}

/// Those that the transactions' level forbids; a history has one level.
#[must_use]
pub fn forbidden(txns: &[Txn], last: &Final) -> Vec<Finding> {
    let Some(level) = txns.first().map(|t| t.level) else {
        return Vec::new();
    };
    let mut findings = check(txns, last);
    findings.retain(|f| f.anomaly.is_forbidden_at(level));
    findings
}

fn first(findings: Vec<Finding>) -> Vec<Finding> {
    let mut shown: BTreeMap<Anomaly, usize> = BTreeMap::new();
    let mut few = |f: &Finding| {
        let count = shown.entry(f.anomaly).or_default();
        *count += 1;
        *count <= SHOWN
    };
    findings.into_iter().filter(|f| few(f)).collect()
}

struct History<'a> {
    txns: &'a [Txn],
    last: &'a Final,
    /// Who wrote a value.
    writers: HashMap<(Key, Value), usize>,
    /// Transactions that have committed, for all that can be known.
    committed: BTreeSet<usize>,
}

impl<'a> History<'a> {
    fn new(txns: &'a [Txn], last: &'a Final) -> Self {
        let mut writers = HashMap::new();
        for (at, txn) in txns.iter().enumerate() {
            writers.extend(txn.appends().map(|write| (write, at)));
        }
        let present = |txn: &Txn| {
            txn.appends()
                .any(|(key, value)| last.get(&key).is_some_and(|l| l.contains(&value)))
        };
        let committed = txns.iter().enumerate().filter(|(_, t)| match t.outcome {
            Outcome::Ok => true,
            Outcome::Unknown => present(t),
            Outcome::Failed => false,
        });
        let committed = committed.map(|(at, _)| at).collect();
        Self {
            txns,
            last,
            writers,
            committed,
        }
    }

    fn committed(&self) -> impl Iterator<Item = (usize, &'a Txn)> {
        self.committed.iter().map(|&at| (at, &self.txns[at]))
    }

    fn line(&self, at: usize) -> String {
        self.txns[at].to_string()
    }

    /// Each transaction against itself, failed ones too: their clients saw it as well.
    fn internal(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for txn in self.txns {
            for key in keys(txn) {
                if let Some(what) = contradiction(txn, key) {
                    let finding = Finding::new(Anomaly::Internal, what);
                    findings.push(finding.with([txn.to_string()]));
                }
            }
        }
        findings
    }

    /// The final lists against what was sent and acknowledged.
    fn contents(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (&key, list) in self.last {
            let mut seen = BTreeSet::new();
            for &value in list {
                if !seen.insert(value) {
                    let what = format!("value {value} stands more than once in list {key}");
                    let writer = self.writers.get(&(key, value)).map(|&at| self.line(at));
                    findings.push(Finding::new(Anomaly::Duplicate, what).with(writer));
                    continue;
                }
                match self.writers.get(&(key, value)) {
                    None => {
                        let what = format!("value {value} in list {key} was never sent");
                        findings.push(Finding::new(Anomaly::Garbage, what));
                    }
                    Some(&at) if self.txns[at].outcome == Outcome::Failed => {
                        let what = format!("value {value} in list {key}");
                        let finding = Finding::new(Anomaly::FailedButPresent, what);
                        findings.push(finding.with([self.line(at)]));
                    }
                    Some(_) => {}
                }
            }
        }
        for txn in self.txns {
            findings.extend(self.missing(txn));
        }
        findings
    }

    /// What of a transaction's writes is not there, though it should be.
    fn missing(&self, txn: &Txn) -> Option<Finding> {
        let holds = |(key, value): &(Key, Value)| {
            self.last.get(key).is_some_and(|list| list.contains(value))
        };
        let (there, gone): (Vec<_>, Vec<_>) = txn.appends().partition(holds);
        let (key, value) = *gone.first()?;
        let anomaly = match txn.outcome {
            Outcome::Failed => return None,
            _ if !there.is_empty() => Anomaly::Fractured,
            Outcome::Ok => Anomaly::Lost,
            Outcome::Unknown => return None,
        };
        let what = format!("value {value} is not in list {key}");
        let list = format!("list {key} in the end: {:?}", self.last.get(&key));
        Some(Finding::new(anomaly, what).with([txn.to_string(), list]))
    }

    /// What committed transactions read.
    fn reads(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (reader, txn) in self.committed() {
            for (key, list) in reads(txn) {
                findings.extend(self.judge_read(reader, key, list));
            }
        }
        findings
    }

    fn judge_read(&self, reader: usize, key: Key, list: &[Value]) -> Vec<Finding> {
        let mut findings = Vec::new();
        let unique: BTreeSet<_> = list.iter().collect();
        if unique.len() != list.len() {
            let what = format!("a read of list {key} holds a value twice");
            findings.push(Finding::new(Anomaly::Duplicate, what).with([self.line(reader)]));
        }
        for &value in list {
            let Some(&writer) = self.writers.get(&(key, value)) else {
                let what = format!("value {value} was read from list {key}, but never sent");
                findings.push(Finding::new(Anomaly::Garbage, what).with([self.line(reader)]));
                continue;
            };
            if writer != reader && self.txns[writer].outcome == Outcome::Failed {
                let what = format!("value {value} of list {key} was read");
                let history = [self.line(writer), self.line(reader)];
                findings.push(Finding::new(Anomaly::G1a, what).with(history));
            }
        }
        if let Some(&value) = list.last()
            && let Some(&writer) = self.writers.get(&(key, value))
            && writer != reader
            && self.txns[writer].appends_to(key).last() != Some(value)
        {
            let what = format!("list {key} was read in the middle of its writer's work");
            let history = [self.line(writer), self.line(reader)];
            findings.push(Finding::new(Anomaly::G1b, what).with(history));
        }
        let empty = Vec::new();
        let order = self.last.get(&key).unwrap_or(&empty);
        // What is missing from the end is the writer's loss, reported there; here counts the order.
        let kept: Vec<_> = list.iter().filter(|v| order.contains(v)).copied().collect();
        if !order.starts_with(&kept) {
            let what = format!("a read of list {key} is no beginning of the list in the end");
            let history = [
                self.line(reader),
                format!("list {key} in the end: {order:?}"),
            ];
            findings.push(Finding::new(Anomaly::IncompatibleOrder, what).with(history));
        }
        if let Some(&gone) = list.iter().find(|v| !order.contains(v))
            && let Some(&writer) = self.writers.get(&(key, gone))
            && self.txns[writer].outcome == Outcome::Unknown
            && writer != reader
        {
            let what = format!("value {gone} of list {key} was read and is not there in the end");
            let history = [self.line(writer), self.line(reader)];
            findings.push(Finding::new(Anomaly::Lost, what).with(history));
        }
        findings
    }

    /// What was acknowledged before a statement was sent must be in its snapshot: PostgreSQL shows
    /// every statement what has been acknowledged before, at any level. A transaction's snapshot
    /// is as old as its first statement.
    fn stale(&self) -> Vec<Finding> {
        let mut acknowledged: BTreeMap<Key, Vec<(u64, Value, usize)>> = BTreeMap::new();
        for (at, txn) in self.txns.iter().enumerate() {
            if txn.outcome == Outcome::Ok {
                for (key, value) in txn.appends() {
                    let list = acknowledged.entry(key).or_default();
                    list.push((txn.ended, value, at));
                }
            }
        }
        let mut findings = Vec::new();
        for (reader, txn) in self.committed() {
            for op in &txn.ops {
                let Op::Read { key, list, sent } = op else {
                    continue;
                };
                let taken = if txn.level.is_snapshot() {
                    txn.began
                } else {
                    *sent
                };
                let values: BTreeSet<_> = list.iter().collect();
                let before = acknowledged.get(key).into_iter().flatten();
                let missed = before
                    .filter(|(ended, _, at)| *ended < taken && *at != reader)
                    .find(|(_, value, _)| !values.contains(value));
                if let Some((ended, value, at)) = missed {
                    let what = format!(
                        "value {value} of list {key}, acknowledged at {ended} us, is missing from a \
                         read whose snapshot was taken after {taken} us"
                    );
                    let history = [self.line(*at), self.line(reader)];
                    findings.push(Finding::new(Anomaly::StaleRead, what).with(history));
                }
            }
        }
        findings
    }

    fn cycles(&self) -> Vec<Finding> {
        let cycles = self.graph().cycles().into_iter();
        cycles
            .map(|(anomaly, cycle)| self.describe(anomaly, &cycle))
            .collect()
    }

    fn describe(&self, anomaly: Anomaly, cycle: &Cycle) -> Finding {
        let id = |at: usize| self.txns[at].id;
        let names: Vec<String> = cycle.iter().map(|e| format!("T{}", id(e.from))).collect();
        let mut lines: Vec<String> = cycle.iter().map(|e| self.line(e.from)).collect();
        for edge in cycle {
            let (a, b, key) = (id(edge.from), id(edge.to), edge.key);
            lines.push(match edge.kind {
                Dependency::WriteWrite => {
                    format!("T{a} < T{b}: T{b} appended to list {key} right behind T{a}")
                }
                Dependency::WriteRead => {
                    format!("T{a} < T{b}: T{b} read from list {key} what T{a} appended last")
                }
                Dependency::ReadWrite => {
                    format!("T{a} < T{b}: T{a} read list {key} without what T{b} appended next")
                }
            });
        }
        Finding::new(anomaly, names.join(" < ")).with(lines)
    }

    fn graph(&self) -> Graph {
        let mut graph = Graph::default();
        let writer = |key: Key, value: Value| self.writers.get(&(key, value)).copied();
        for (&key, list) in self.last {
            for pair in list.windows(2) {
                if let [a, b] = *pair
                    && let (Some(from), Some(to)) = (writer(key, a), writer(key, b))
                {
                    let kind = Dependency::WriteWrite;
                    graph.add(Edge {
                        from,
                        to,
                        kind,
                        key,
                    });
                }
            }
        }
        for (reader, txn) in self.committed() {
            for (key, list) in reads(txn) {
                self.add_read(&mut graph, reader, key, list);
            }
        }
        graph
    }

    fn add_read(&self, graph: &mut Graph, reader: usize, key: Key, list: &[Value]) {
        if let Some(&value) = list.last()
            && let Some(&from) = self.writers.get(&(key, value))
        {
            let (to, kind) = (reader, Dependency::WriteRead);
            graph.add(Edge {
                from,
                to,
                kind,
                key,
            });
        }
        let order = self.last.get(&key).map_or(&[][..], Vec::as_slice);
        let next = order
            .get(list.len())
            .and_then(|value| self.writers.get(&(key, *value)));
        if let Some(&to) = next.filter(|_| order.starts_with(list)) {
            let (from, kind) = (reader, Dependency::ReadWrite);
            graph.add(Edge {
                from,
                to,
                kind,
                key,
            });
        }
    }
}

fn keys(txn: &Txn) -> BTreeSet<Key> {
    let key = |op: &Op| match op {
        Op::Append { key, .. } | Op::Read { key, .. } => *key,
    };
    txn.ops.iter().map(key).collect()
}

fn reads(txn: &Txn) -> impl Iterator<Item = (Key, &[Value])> {
    txn.ops.iter().filter_map(|op| match op {
        Op::Read { key, list, .. } => Some((*key, list.as_slice())),
        Op::Append { .. } => None,
    })
}

/// What a transaction must see of one list, by itself: behind its own append nobody else appends
/// until it ends (the row is locked), and in a snapshot nobody does at all.
fn contradiction(txn: &Txn, wanted: Key) -> Option<String> {
    let mut known: Option<Vec<Value>> = None;
    let mut own: Vec<Value> = Vec::new();
    for op in &txn.ops {
        match op {
            Op::Append { key, value } if *key == wanted => {
                own.push(*value);
                if let Some(list) = known
                    .as_mut()
                    .filter(|_| txn.level.is_snapshot() || own.len() > 1)
                {
                    list.push(*value);
                } else {
                    known = None;
                }
            }
            Op::Read { key, list, .. } if *key == wanted => {
                if !list.ends_with(&own) {
                    return Some(format!(
                        "list {wanted} was read without its own appends {own:?}"
                    ));
                }
                if let Some(known) = known.as_ref().filter(|known| *known != list) {
                    return Some(format!(
                        "list {wanted} must be {known:?}, but {list:?} was read"
                    ));
                }
                let stable = txn.level.is_snapshot() || !own.is_empty();
                known = stable.then(|| list.clone());
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
#[path = "list_append_tests.rs"]
mod tests;
