//! A client at work: its connection, its random numbers, its notes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_util::sync::CancellationToken;

use super::temporary::Table;
use super::{Gone, Workload};
use crate::chaos::checker::Anomaly;
use crate::chaos::errors::{At, Verdict, judge};
use crate::chaos::history::{Level, Outcome};
use crate::chaos::notes::Notes;
use crate::chaos::wire::{Answer, Conn, Statement, Trouble};
use crate::driver::Target;

/// Pause before a new connection after one that failed.
const RECONNECT: Duration = Duration::from_millis(100);

/// The proxy looks for a primary so long (60 s, its default) before it gives up, less what the
/// client's clock may differ.
const OUTAGE_LIMIT: Duration = Duration::from_secs(55);

/// Violations that one client describes; a broken session has one a request.
const MAX_VIOLATIONS: usize = 3;

/// What all clients of an experiment share.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The proxy.
    pub target: Target,
    /// Schema of the experiment's tables.
    pub schema: String,
    /// What they do.
    pub workload: Workload,
    /// Isolation level of their transactions.
    pub level: Level,
    /// Seed of the experiment.
    pub seed: u64,
    /// No answer may take longer.
    pub limit: Duration,
    /// SQLSTATEs that the fault allows beside the list.
    pub extra: Vec<&'static str>,
    /// When the experiment began.
    pub clock: Instant,
    /// Gives unique numbers.
    pub ids: Arc<AtomicU64>,
    /// Clients end their transaction and stop.
    pub stop: CancellationToken,
}

/// How a client sends statements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Simple,
    Unnamed,
    Prepared,
}

/// A client.
#[derive(Debug)]
pub struct Worker {
    pub(super) setting: Setting,
    pub(super) client: usize,
    pub(super) rng: StdRng,
    pub(super) notes: Notes,
    /// Its temporary table, for the workload of that name.
    pub(super) table: Table,
    style: Style,
    conn: Option<Conn>,
    prepared: BTreeSet<String>,
}

impl Worker {
    /// Client number `client`; its random numbers are its own.
    #[must_use]
    pub fn new(setting: Setting, client: usize) -> Self {
        let mixed = (client as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self {
            rng: StdRng::seed_from_u64(setting.seed ^ mixed),
            client,
            notes: Notes::default(),
            table: Table::None,
            style: match client % 3 {
                0 => Style::Simple,
                1 => Style::Unnamed,
                _ => Style::Prepared,
            },
            conn: None,
            prepared: BTreeSet::new(),
            setting,
        }
    }

    /// Works until told to stop; returns what was noted.
    pub async fn run(mut self) -> Notes {
        while !self.setting.stop.is_cancelled() {
            if self.connect().await.is_err() {
                tokio::time::sleep(RECONNECT).await;
                continue;
            }
            while !self.setting.stop.is_cancelled() {
                let workload = self.setting.workload;
                let stepped = Box::pin(workload.step(&mut self)).await;
                self.note_longest();
                if stepped.is_err() {
                    self.conn = None;
                    tokio::time::sleep(RECONNECT).await;
                    break;
                }
                self.pause(2..25).await;
            }
        }
        if let Some(conn) = self.conn.take() {
            conn.close().await;
        }
        self.notes
    }

    fn note_longest(&mut self) {
        let longest = self.conn.as_ref().map_or(Duration::ZERO, Conn::longest);
        let millis = u64::try_from(longest.as_millis()).unwrap_or(u64::MAX);
        self.notes.longest_ms = self.notes.longest_ms.max(millis);
    }

    async fn connect(&mut self) -> Result<(), Gone> {
        self.prepared.clear();
        self.table = Table::None;
        match Conn::open(&self.setting.target, self.setting.limit).await {
            Ok(conn) => {
                self.conn = Some(conn);
                Ok(())
            }
            Err(trouble) => {
                self.told(&trouble, At::Connect, "connect");
                Err(Gone)
            }
        }
    }

    /// Microseconds of the experiment.
    pub(super) fn now(&self) -> u64 {
        u64::try_from(self.setting.clock.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// A number that nobody else has.
    pub(super) fn id(&self) -> u64 {
        self.setting.ids.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn schema(&self) -> String {
        self.setting.schema.clone()
    }

    pub(super) async fn pause(&mut self, millis: std::ops::Range<u64>) {
        let time = Duration::from_millis(self.rng.random_range(millis));
        tokio::time::sleep(time).await;
    }

    /// Between two statements of a transaction: mostly nothing, sometimes long enough that a fault
    /// finds the transaction open.
    pub(super) async fn think(&mut self) {
        if self.rng.random_bool(0.4) {
            self.pause(1..40).await;
        }
    }

    /// A statement in this client's style.
    pub(super) async fn ask(&mut self, sql: &str, values: &[String]) -> Result<Answer, Trouble> {
        let style = self.style;
        let name = format!("s{}", short_hash(sql));
        let known = self.prepared.contains(&name);
        let conn = self.conn()?;
        match style {
            Style::Simple => conn.simple(&with_literals(sql, values), 1).await,
            Style::Unnamed => {
                let statement = Statement {
                    sql: sql.to_owned(),
                    parameters: values.to_vec(),
                };
                conn.pipeline(&[statement]).await
            }
            Style::Prepared => {
                if !known {
                    conn.prepare(&name, sql).await?;
                    self.prepared.insert(name.clone());
                }
                self.conn()?.prepared(&name, values).await
            }
        }
    }

    /// All prepared statements are about to go.
    pub(super) fn forget_prepared(&mut self) {
        self.prepared.clear();
    }

    /// The connection, for what has a form of its own.
    pub(super) fn conn(&mut self) -> Result<&mut Conn, Trouble> {
        self.conn
            .as_mut()
            .ok_or_else(|| Trouble::Closed("not connected".to_owned()))
    }

    /// Opens a transaction at the experiment's level.
    pub(super) async fn begin(&mut self) -> Result<(), Trouble> {
        let sql = format!("BEGIN ISOLATION LEVEL {}", self.setting.level.sql());
        let answer = self.conn()?.simple(&sql, 1).await?;
        expect_status(&answer, b'T')
    }

    /// Ends a transaction with `sql`, whose command tag must be `tag`; notes how it ended.
    pub(super) async fn end(&mut self, sql: &str, tag: &str) -> (Outcome, Result<(), Gone>) {
        self.end_in(sql, tag, b'I').await
    }

    /// The same where another transaction begins at once, for the transaction status that must
    /// follow.
    pub(super) async fn end_in(
        &mut self,
        sql: &str,
        tag: &str,
        status: u8,
    ) -> (Outcome, Result<(), Gone>) {
        let result = match self.conn() {
            Ok(conn) => conn.simple(sql, 1).await,
            Err(trouble) => Err(trouble),
        };
        let answer = match result {
            Ok(answer) => answer,
            Err(trouble) => return self.failed(&trouble, At::Commit, sql).await,
        };
        if answer.tags != [tag] || answer.status != status {
            let (tags, is) = (&answer.tags, char::from(answer.status));
            let text = format!("{sql} was answered with {tags:?} and status {is}");
            self.violation(&text);
            self.notes.count(Outcome::Failed);
            return (Outcome::Failed, Ok(()));
        }
        self.notes.count(Outcome::Ok);
        (Outcome::Ok, Ok(()))
    }

    /// A request failed: judges it, counts it, and leaves the session usable, or says that it has
    /// ended.
    pub(super) async fn failed(
        &mut self,
        trouble: &Trouble,
        at: At,
        what: &str,
    ) -> (Outcome, Result<(), Gone>) {
        let outcome = self.told(trouble, at, what);
        self.notes.count(outcome);
        if !matches!(trouble, Trouble::Sql { fatal: false, .. }) {
            return (outcome, Err(Gone));
        }
        // A query that opens a transaction by itself may leave it behind, failed.
        let open = self.conn.as_ref().is_some_and(Conn::in_transaction);
        if at != At::Statement && !open {
            return (outcome, Ok(()));
        }
        // Ours leaves the session idle, PostgreSQL's in a failed transaction; ROLLBACK suits both.
        let ended = match self.conn() {
            Ok(conn) => conn.simple("ROLLBACK", 1).await,
            Err(trouble) => Err(trouble),
        };
        match ended.and_then(|answer| expect_status(&answer, b'I')) {
            Ok(()) => (outcome, Ok(())),
            Err(trouble) => {
                self.told(&trouble, At::Statement, "ROLLBACK");
                (outcome, Err(Gone))
            }
        }
    }

    /// Notes what a client was told, and what follows for its request.
    pub(super) fn told(&mut self, trouble: &Trouble, at: At, what: &str) -> Outcome {
        let mut verdict = judge(trouble, at, &self.setting.extra);
        let waited = self.conn.as_ref().map_or(OUTAGE_LIMIT, Conn::longest);
        if verdict == Verdict::NoPrimary && waited < OUTAGE_LIMIT {
            verdict = Verdict::Violation;
        }
        if verdict == Verdict::Violation {
            let kind = match trouble {
                Trouble::Timeout(_) => Anomaly::Hung,
                _ => Anomaly::Client,
            };
            self.finding(kind, &format!("{trouble}, in answer to: {what}"));
        } else {
            *self.notes.told.entry(kind_of(trouble)).or_default() += 1;
        }
        if verdict == Verdict::NoPrimary {
            self.notes.tally.no_primary += 1;
        }
        match (verdict, at) {
            (Verdict::Committed, _) => Outcome::Ok,
            (_, At::Statement | At::Connect) | (Verdict::Aborted, _) => Outcome::Failed,
            _ => Outcome::Unknown,
        }
    }

    pub(super) fn violation(&mut self, what: &str) {
        self.finding(Anomaly::Client, what);
    }

    fn finding(&mut self, kind: Anomaly, what: &str) {
        if self.notes.violations.len() >= MAX_VIOLATIONS {
            return;
        }
        let (client, now) = (self.client, self.now());
        let level = self.setting.level.sql();
        let style = self.style;
        let what = format!("client {client} ({style:?}, {level}) at {now} us: {what}");
        self.notes.violation(kind, what);
    }
}

/// The transaction status that must follow.
pub(super) fn expect_status(answer: &Answer, status: u8) -> Result<(), Trouble> {
    if answer.status == status {
        return Ok(());
    }
    let (is, must) = (char::from(answer.status), char::from(status));
    Err(Trouble::Protocol(format!(
        "transaction status '{is}' behind {:?}, must be '{must}'",
        answer.tags
    )))
}

/// The command tag that must follow.
pub(super) fn expect_tag(answer: &Answer, tag: &str) -> Result<(), Trouble> {
    if answer.tags == [tag] {
        return Ok(());
    }
    Err(Trouble::Protocol(format!(
        "answered with {:?}, not {tag}",
        answer.tags
    )))
}

/// The statement with its values in place, for the simple protocol.
fn with_literals(sql: &str, values: &[String]) -> String {
    let mut text = sql.to_owned();
    for (at, value) in values.iter().enumerate().rev() {
        text = text.replace(&format!("${}", at + 1), &format!("'{value}'"));
    }
    text
}

/// The error without what differs from case to case: numbers, and PostgreSQL's details.
fn kind_of(trouble: &Trouble) -> String {
    let text = trouble.to_string();
    let text = match (text.find("; detail: "), text.contains("could not be moved")) {
        (Some(end), false) => text.get(..end).unwrap_or(&text).to_owned(),
        _ => text.split("; hint: ").next().unwrap_or(&text).to_owned(),
    };
    let words = text.split(' ').map(|word| match word.starts_with('/') {
        true => "<path>:",
        false => word,
    });
    let text = words.collect::<Vec<_>>().join(" ");
    let state_end = text.find(':').unwrap_or(0);
    let masked = text.chars().enumerate().map(|(at, c)| match c {
        '0'..='9' if at > state_end => '#',
        c => c,
    });
    let mut masked: String = masked.collect();
    while masked.contains("##") {
        masked = masked.replace("##", "#");
    }
    masked
}

/// FNV-1a, for names of statements.
fn short_hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash: u32, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_take_the_place_of_parameters() {
        let values: Vec<String> = (1..=10).map(|n| n.to_string()).collect();
        assert_eq!(with_literals("$1 $10 $2", &values), "'1' '10' '2'");
    }
}
