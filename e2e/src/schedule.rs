//! Anomaly schedules: two or three clients whose steps follow one another in a fixed order.
//!
//! Like PostgreSQL's isolation tester: a step is over when it is answered, or when it waits for a
//! lock; who waits is looked up in the server. What a schedule gave through the proxy is allowed
//! when PostgreSQL alone gives the same, where a client whose transaction was aborted with 40001
//! rolls back at the moment of the move.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::Result;
use crate::driver::Target;

/// How long a step may take before it is called hung: an outage with everything behind it.
const STEP_LIMIT: Duration = Duration::from_secs(30);

/// The place of the isolation level in a step's text.
const LEVEL: &str = "LEVEL";

/// One client's statement.
pub type Step = (usize, &'static str);

/// A schedule over a table `t (id, v)`.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// Its name.
    pub name: &'static str,
    /// Client and statement, in order.
    pub steps: &'static [Step],
}

/// What a step gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Rows and tags.
    Rows(Vec<String>),
    /// SQLSTATE.
    Error(String),
    /// The client had lost its transaction: nothing was asked.
    Skipped,
}

impl Answer {
    fn is_abort(&self) -> bool {
        matches!(self, Self::Error(code) if code == "40001" || code == "40P01")
    }
}

/// What a run gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// One answer a step.
    pub answers: Vec<Answer>,
    /// For each step, the step during which its answer came.
    pub came_at: Vec<usize>,
    /// The table at the end.
    pub table: Vec<String>,
}

/// Who waits for a lock, by application name.
pub trait Waiting {
    /// The names.
    fn waiting(&self) -> impl Future<Output = Result<BTreeSet<String>>> + Send;
}

/// A client and the statement that it waits for.
struct Session {
    client: Option<Client>,
    pending: Option<(usize, JoinHandle<(Client, Answer)>)>,
    name: String,
    /// Its transaction is gone: it says nothing more.
    lost: bool,
}

/// A run of one schedule that stops between steps.
pub struct Run {
    schedule: Schedule,
    level: &'static str,
    sessions: Vec<Session>,
    target: Target,
    schema: String,
    history: History,
}

/// Where a client gives up by itself: (client, step before which it rolls back).
pub type GivesUp = BTreeMap<usize, usize>;

async fn connect(target: &Target, name: &str) -> Result<Client> {
    let mut config: tokio_postgres::Config = target.conninfo().parse()?;
    config.application_name(name);
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn ask(client: &Client, sql: &str) -> Answer {
    match client.simple_query(sql).await {
        Ok(messages) => Answer::Rows(messages.iter().filter_map(written).collect()),
        Err(error) => Answer::Error(
            error
                .code()
                .map_or_else(|| error.to_string(), |code| code.code().to_owned()),
        ),
    }
}

fn written(message: &SimpleQueryMessage) -> Option<String> {
    match message {
        SimpleQueryMessage::Row(row) => {
            let values: Vec<&str> = (0..row.len()).filter_map(|i| row.get(i)).collect();
            Some(values.join("|"))
        }
        SimpleQueryMessage::CommandComplete(count) => Some(format!("{count} done")),
        _ => None,
    }
}

impl Run {
    /// Makes the table, in a schema of its own, and connects the clients.
    ///
    /// # Errors
    ///
    /// A statement of the set-up failed.
    pub async fn start(
        schedule: Schedule,
        level: &'static str,
        schema: &str,
        target: &Target,
    ) -> Result<Self> {
        let reader = connect(target, schema).await?;
        let setup = format!(
            "drop schema if exists {schema} cascade; create schema {schema}; \
             set search_path = {schema}; create table t (id int primary key, v int); \
             insert into t values (1, 10), (2, 20)"
        );
        reader.batch_execute(&setup).await?;
        drop(reader);
        let clients = schedule.steps.iter().map(|(who, _)| who + 1).max();
        let mut sessions = Vec::new();
        for who in 0..clients.unwrap_or(0) {
            let name = format!("{schema}.{who}");
            let client = connect(target, &name).await?;
            let path = format!("set search_path = {schema}");
            client.batch_execute(&path).await?;
            sessions.push(Session {
                client: Some(client),
                pending: None,
                name,
                lost: false,
            });
        }
        let steps = schedule.steps.len();
        Ok(Self {
            schedule,
            level,
            sessions,
            target: target.clone(),
            schema: schema.to_owned(),
            history: History {
                answers: vec![Answer::Skipped; steps],
                came_at: vec![steps; steps],
                table: Vec::new(),
            },
        })
    }

    /// Runs step `at`, to its answer or until it waits for a lock.
    ///
    /// # Errors
    ///
    /// It hangs.
    pub async fn step(&mut self, at: usize, locks: &impl Waiting) -> Result<()> {
        let Some((who, sql)) = self.schedule.steps.get(at).copied() else {
            return Ok(());
        };
        // PostgreSQL's isolation tester as well: a client that waits holds its own next step up.
        self.answered(who, at, locks, true).await?;
        let sql = sql.replace(LEVEL, self.level);
        let session = &mut self.sessions[who];
        if !session.lost
            && let Some(client) = session.client.take()
        {
            let asked = tokio::spawn(async move {
                let answer = ask(&client, &sql).await;
                (client, answer)
            });
            session.pending = Some((at, asked));
        }
        self.settle(at, locks).await
    }

    /// Waits until every statement under way is answered or waits for a lock.
    ///
    /// # Errors
    ///
    /// One hangs.
    pub async fn settle(&mut self, at: usize, locks: &impl Waiting) -> Result<()> {
        for who in 0..self.sessions.len() {
            self.answered(who, at, locks, false).await?;
        }
        Ok(())
    }

    async fn answered(
        &mut self,
        who: usize,
        at: usize,
        locks: &impl Waiting,
        must: bool,
    ) -> Result<()> {
        let deadline = Instant::now() + STEP_LIMIT;
        loop {
            let session = &mut self.sessions[who];
            let Some((asked_at, asked)) = &mut session.pending else {
                return Ok(());
            };
            let asked_at = *asked_at;
            if let Ok(joined) = tokio::time::timeout(Duration::from_millis(5), asked).await {
                let (client, answer) = joined?;
                session.client = Some(client);
                session.pending = None;
                session.lost |= answer.is_abort();
                self.history.answers[asked_at] = answer;
                self.history.came_at[asked_at] = at;
                return Ok(());
            }
            if !must && locks.waiting().await?.contains(&session.name) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let name = &session.name;
                return Err(format!("{name} hangs in step {asked_at}").into());
            }
        }
    }

    /// The client rolls back, as if its transaction had been aborted here.
    async fn gives_up(&mut self, who: usize) -> Result<()> {
        let session = &mut self.sessions[who];
        session.lost = true;
        if let Some(client) = &session.client {
            client.batch_execute("rollback").await?;
        }
        Ok(())
    }

    /// Waits for what is left, and reads the table.
    ///
    /// # Errors
    ///
    /// Something hangs, or a session does not live on.
    pub async fn finish(mut self, locks: &impl Waiting) -> Result<History> {
        let end = self.schedule.steps.len();
        for who in 0..self.sessions.len() {
            self.answered(who, end, locks, true).await?;
            let session = &self.sessions[who];
            if let Some(client) = &session.client {
                client.batch_execute("rollback").await?;
            }
        }
        let table = format!("select * from {}.t order by id", self.schema);
        let reader = connect(&self.target, &self.schema).await?;
        match ask(&reader, &table).await {
            Answer::Rows(rows) => self.history.table = rows,
            answer => return Err(format!("the table cannot be read: {answer:?}").into()),
        }
        Ok(self.history)
    }
}

/// Runs a schedule from its beginning to its end on PostgreSQL alone; clients give up where told.
/// `schema` begins the name of its schema, which the level completes.
///
/// # Errors
///
/// It hangs.
pub async fn run_alone(
    schedule: Schedule,
    level: &'static str,
    schema: &str,
    target: &Target,
    locks: &impl Waiting,
    give_up: &GivesUp,
) -> Result<History> {
    let schema = format!("{schema}_{}", level.replace(' ', "_"));
    let mut run = Run::start(schedule, level, &schema, target).await?;
    for at in 0..schedule.steps.len() {
        for (who, before) in give_up {
            if *before == at {
                run.gives_up(*who).await?;
                run.settle(at, locks).await?;
            }
        }
        run.step(at, locks).await?;
    }
    run.finish(locks).await
}

/// Whether PostgreSQL alone allows a history; the message says what is wrong.
///
/// # Errors
///
/// The schedule cannot be run on PostgreSQL alone.
pub async fn allowed(
    schedule: Schedule,
    level: &'static str,
    schema: &str,
    history: &History,
    target: &Target,
    locks: &impl Waiting,
) -> Result<Option<String>> {
    let alone = run_alone(schedule, level, schema, target, locks, &GivesUp::new()).await?;
    if same(history, &alone, &BTreeSet::new()) {
        return Ok(None);
    }
    let candidates = aborts(schedule, history);
    let mut choices = vec![GivesUp::new()];
    for (who, moments) in &candidates {
        let grown = choices.iter().flat_map(|choice| {
            // An abort that PostgreSQL alone decides on as well needs no help.
            let unchanged = std::iter::once(choice.clone());
            unchanged.chain(moments.iter().map(move |at| {
                let mut choice = choice.clone();
                choice.insert(*who, *at);
                choice
            }))
        });
        choices = grown.collect();
    }
    for choice in choices.iter().filter(|choice| !choice.is_empty()) {
        let again = run_alone(schedule, level, schema, target, locks, choice).await?;
        let gone: BTreeSet<usize> = choice.keys().copied().collect();
        if same(history, &again, &gone) {
            return Ok(None);
        }
    }
    Ok(Some(format!("{history:?}\nPostgreSQL alone: {alone:?}")))
}

/// Clients that were aborted, and the steps before which that may have happened: after the last
/// one of theirs that was answered, up to the one during which the error came.
fn aborts(schedule: Schedule, history: &History) -> BTreeMap<usize, Vec<usize>> {
    let mut moments = BTreeMap::new();
    for (at, answer) in history.answers.iter().enumerate() {
        if !answer.is_abort() {
            continue;
        }
        let who = schedule.steps[at].0;
        let before = (0..at).rev().find(|i| schedule.steps[*i].0 == who);
        let first = before.map_or(0, |i| i + 1);
        let last = history.came_at[at].min(schedule.steps.len() - 1);
        moments.insert(who, (first..=last).collect());
    }
    moments
}

/// Whether two histories tell the same, but for what the clients that are gone were told.
fn same(history: &History, other: &History, gone: &BTreeSet<usize>) -> bool {
    let skipped = |a: &Answer| *a == Answer::Skipped || a.is_abort();
    let told = history.answers.iter().zip(&other.answers);
    history.table == other.table
        && told
            .into_iter()
            .all(|(a, b)| a == b || (!gone.is_empty() && skipped(a) && skipped(b)))
}
