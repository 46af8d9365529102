//! A client of the demo: connects, runs transactions of its kind until told to stop, notes what
//! it sent and what was acknowledged, and counts every error and every closed connection.
//!
//! Talks to nothing but the address it is given, which may as well be a PostgreSQL without us.
//! Invariant: a transfer is noted as attempted before its COMMIT is sent, and as acknowledged only
//! after the answer came.

mod cursor;
mod extended;
mod text;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt;
use rand::rngs::StdRng;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};
use tokio_util::sync::CancellationToken;

use super::bank::{Accounts, Notes};
use super::plan::{ClientKind, client_rng};
use super::record::{Live, Phase, Recorder, Trouble};
use super::slow::Request;
use super::windows::Windows;

/// A request without an answer for so long is an error: nothing may hang.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Pause before a new connection after an error.
const RECONNECT_DELAY: Duration = Duration::from_millis(250);
/// Between two transactions of a client that is not slow, in milliseconds.
const BREATH: std::ops::Range<u64> = 10..50;

/// What all clients of a run share.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) windows: Arc<Windows>,
    pub(crate) live: Arc<Live>,
    /// Clients end their transaction and stop.
    pub(crate) stop: CancellationToken,
}

/// What a client leaves behind.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) index: usize,
    pub(crate) kind: ClientKind,
    pub(crate) notes: Notes,
    pub(crate) recorder: Recorder,
}

/// Runs client number `index` of `clients` until `shared.stop`.
pub(crate) async fn run(
    config: Config,
    seed: u64,
    index: usize,
    clients: usize,
    shared: Shared,
) -> Outcome {
    let kind = ClientKind::of(index, clients);
    let mut worker = Worker {
        kind,
        accounts: accounts(kind, index),
        known: Vec::new(),
        rng: client_rng(seed, index),
        notes: Notes::new(index),
        recorder: Recorder::new(shared.windows, shared.live),
        stop: shared.stop,
    };
    while !worker.stop.is_cancelled() {
        if let Err(trouble) = Box::pin(worker.session(&config)).await {
            worker.recorder.failed(trouble);
            tokio::time::sleep(RECONNECT_DELAY).await;
        }
    }
    Outcome {
        index,
        kind,
        notes: worker.notes,
        recorder: worker.recorder,
    }
}

/// Kinds that think inside a transaction have accounts of their own, so that nobody waits for
/// their locks; and so have those above READ COMMITTED, where a common row would be a legitimate
/// error 40001.
fn accounts(kind: ClientKind, index: usize) -> Accounts {
    match kind {
        ClientKind::Plain | ClientKind::Prepared | ClientKind::Pipelined => Accounts::COMMON,
        ClientKind::Slow
        | ClientKind::RepeatableRead
        | ClientKind::Serializable
        | ClientKind::Cursor => Accounts::private(index),
    }
}

struct Worker {
    kind: ClientKind,
    accounts: Accounts,
    /// Committed balances of the accounts, for kinds that own theirs; else empty.
    known: Vec<i64>,
    rng: StdRng,
    notes: Notes,
    recorder: Recorder,
    stop: CancellationToken,
}

impl Worker {
    /// One connection, for as long as it lasts.
    async fn session(&mut self, config: &Config) -> Result<(), Trouble> {
        let db = self.connect(config).await?;
        if self.accounts.first > Accounts::COMMON.last {
            self.known = self.read_known(&db).await?;
        }
        let statements = match self.kind {
            ClientKind::Prepared | ClientKind::Pipelined => {
                Some(extended::Statements::prepare(self, &db).await?)
            }
            _ => None,
        };
        while !self.stop.is_cancelled() {
            match (self.kind, &statements) {
                (ClientKind::Prepared, Some(s)) => extended::prepared(self, &db, s).await?,
                (ClientKind::Pipelined, Some(s)) => extended::pipelined(self, &db, s).await?,
                (ClientKind::Cursor, _) => cursor::transaction(self, &db).await?,
                (kind, _) => text::transfer(self, &db, &text::Style::of(kind)).await?,
            }
            self.think(BREATH).await;
        }
        Ok(())
    }

    async fn connect(&mut self, config: &Config) -> Result<Client, Trouble> {
        let opened = async {
            let (client, connection) = config.connect(NoTls).await?;
            // Ends with the client; an error of it reaches the client's next request as "closed".
            tokio::spawn(connection);
            Ok(client)
        };
        self.ask(Phase::Connect, opened).await
    }

    async fn read_known(&mut self, db: &Client) -> Result<Vec<i64>, Trouble> {
        let sql = format!(
            "SELECT balance FROM accounts WHERE id BETWEEN {} AND {} ORDER BY id",
            self.accounts.first, self.accounts.last
        );
        let rows = self.ask(Phase::Read, db.simple_query(&sql)).await?;
        Ok(numbers(&rows))
    }

    /// Makes a request: measures it, and gives up on it after [`ANSWER_LIMIT`].
    async fn ask<T>(
        &mut self,
        phase: Phase,
        request: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, Trouble> {
        let start = Instant::now();
        let answer = tokio::time::timeout(ANSWER_LIMIT, request).await;
        let end = Instant::now();
        self.recorder.answered(Request { phase, start, end });
        let (sqlstate, message) = match answer {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => describe(&error),
            Err(_) => (None, format!("no answer within {ANSWER_LIMIT:?}")),
        };
        Err(Trouble {
            phase,
            sqlstate,
            message,
            start,
            end,
        })
    }

    /// An answer that cannot be right, whatever the other clients do.
    fn wrong(&self, phase: Phase, message: String) -> Trouble {
        let now = Instant::now();
        Trouble {
            phase,
            sqlstate: None,
            message: format!("wrong answer: {message}"),
            start: now,
            end: now,
        }
    }

    /// Compares one number that the server returned with the only one possible.
    fn expect(&self, phase: Phase, got: Option<i64>, want: i64) -> Result<(), Trouble> {
        if got == Some(want) {
            return Ok(());
        }
        let got = got.map_or_else(|| "nothing".to_owned(), |n| n.to_string());
        Err(self.wrong(phase, format!("got {got}, must be {want}")))
    }

    /// Transfer `first` and all after it are committed, says the server.
    fn acknowledge(&mut self, first: i64) {
        let count = self.notes.acknowledge(first);
        self.recorder.acknowledged(count);
    }

    /// Place of an account in `known`.
    fn place(&self, id: i32) -> usize {
        usize::try_from(id - self.accounts.first).unwrap_or(usize::MAX)
    }

    /// Sleeps for a random time in milliseconds, cut short when the run ends.
    async fn think(&mut self, range: std::ops::Range<u64>) {
        let time = Duration::from_millis(self.rng.random_range(range));
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            () = self.stop.cancelled() => {}
        }
    }
}

/// SQLSTATE and text of an error, with what the server adds to it.
fn describe(error: &tokio_postgres::Error) -> (Option<String>, String) {
    let Some(db) = error.as_db_error() else {
        return (None, chain(error));
    };
    let mut message = db.message().to_owned();
    for (label, text) in [("detail", db.detail()), ("hint", db.hint())] {
        if let Some(text) = text {
            message.push_str(&format!("; {label}: {text}"));
        }
    }
    (Some(db.code().code().to_owned()), message)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

/// The first column of all rows, as numbers.
fn numbers(messages: &[SimpleQueryMessage]) -> Vec<i64> {
    messages
        .iter()
        .filter_map(|m| match m {
            SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
            _ => None,
        })
        .collect()
}
