//! What a failover may do to a client (architecture.md, section 4).
//!
//! The primary moves, by plan or by a crash, exactly behind each message of a client's work, in
//! either way: the session is stopped there by a go-between until the primary has moved.

use std::sync::Arc;
use std::time::Duration;

use futures_util::SinkExt as _;
use helios_e2e::{Result, Shown};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_testkit::frames::Unit;
use helios_testkit::interpose::{Cut, Order, Way};
use tokio_postgres::{Client, Error};

/// How long a session stands still at most while a planned move waits for what it does.
const AHEAD: Duration = Duration::from_millis(50);
/// How long an answer may take; a move takes a second on a busy machine.
const ANSWER: Duration = Duration::from_secs(60);

/// Rows of a COPY.
const ONE: &[u8] = b"1\ta\n";
const TWO: &[u8] = b"2\tb\n";

/// What the client does; each leaves the rows 1 and 2.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// BEGIN to COMMIT, by simple and extended query, with a savepoint.
    Transaction,
    /// Single statements, by simple and extended query.
    Autocommit,
    /// COPY FROM STDIN, by itself.
    Copy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strike {
    Planned,
    Crash,
}

macro_rules! situations {
    ($($test:ident: $work:ident, $strike:ident, $least:literal;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $test() -> std::result::Result<(), Shown> {
                Ok(at_each_message(Work::$work, Strike::$strike, $least).await?)
            }
        )*
    };
}

// The last column: messages of the work that there must be, both ways together.
situations! {
    a_transaction_in_a_planned_move: Transaction, Planned, 30;
    a_transaction_in_a_crash: Transaction, Crash, 30;
    autocommit_statements_in_a_planned_move: Autocommit, Planned, 12;
    autocommit_statements_in_a_crash: Autocommit, Crash, 12;
    a_copy_in_a_planned_move: Copy, Planned, 6;
    a_copy_in_a_crash: Copy, Crash, 6;
}

async fn at_each_message(work: Work, strike: Strike, least: u64) -> Result<()> {
    let schema = "create table t (id int, v text)";
    let mut bench = Bench::start(EngineOptions::default(), schema).await?;
    bench.interpose()?;
    let client = Arc::new(bench.client().await?);
    let mut messages = 0;
    for way in [Way::ToServer, Way::FromServer] {
        for after in 1.. {
            bench.known().await?;
            bench.direct.batch_execute("truncate t").await?;
            let unit = Unit::Messages;
            let order = Order::waiting(Cut { way, unit, after }, 1);
            let judged = one(&mut bench, &client, work, strike, &order).await;
            let stopped = judged.map_err(|e| format!("behind message {after}, {way:?}: {e}"))?;
            if !stopped {
                messages += after - 1;
                break;
            }
        }
    }
    match messages >= least {
        true => Ok(()),
        false => Err(format!("only {messages} messages were met").into()),
    }
}

/// Does the work, and moves the primary when the order stops the session; whether it did.
async fn one(
    bench: &mut Bench,
    client: &Arc<Client>,
    work: Work,
    strike: Strike,
    order: &Arc<Order>,
) -> Result<bool> {
    set(bench, Some(Arc::clone(order)));
    let doing = Arc::clone(client);
    let mut working = tokio::spawn(async move { run(&doing, work).await });
    let stopped = tokio::select! {
        biased;
        () = order.hit() => true,
        done = &mut working => {
            judge(work, done?)?;
            false
        }
        () = tokio::time::sleep(ANSWER) => return Err("no answer".into()),
    };
    if stopped {
        match strike {
            Strike::Crash => bench.crash().await?,
            Strike::Planned => {
                let ahead = async {
                    tokio::time::sleep(AHEAD).await;
                    order.release();
                };
                tokio::join!(bench.drain(), ahead).0?;
                bench.resume().await?;
            }
        }
        order.release();
        judge(work, tokio::time::timeout(ANSWER, working).await??)?;
    }
    // The proxy closes the driver's statements behind the answer to COMMIT: one of these messages
    // may be the one that the order is for, when nobody waits for it any more.
    order.release();
    set(bench, None);
    let rows = bench.column("select id from t order by id").await?;
    match rows == ["1", "2"] {
        true => Ok(stopped),
        false => Err(format!("{rows:?} are in the table").into()),
    }
}

fn set(bench: &Bench, order: Option<Arc<Order>>) {
    if let Some(between) = &bench.between {
        between.set(|rules| rules.cut = order);
    }
}

/// Nothing is seen, but for a statement by itself whose answer died with the server: then the
/// client is told that it has committed.
fn judge(work: Work, told: std::result::Result<(), Told>) -> Result<()> {
    match (work, told) {
        (_, Ok(())) => Ok(()),
        (Work::Autocommit, Err(Told::Committed)) => Ok(()),
        (_, Err(told)) => Err(format!("{told:?}").into()),
    }
}

#[derive(Debug)]
enum Told {
    Committed,
    #[allow(dead_code)] // read by Debug
    Other(String),
}

impl From<Error> for Told {
    fn from(error: Error) -> Self {
        match error.as_db_error() {
            Some(e)
                if e.code().code() == "08007"
                    && e.message().starts_with("the statement was committed") =>
            {
                Self::Committed
            }
            Some(e) => Self::Other(format!("{}: {e} {:?}", e.code().code(), e.detail())),
            None => Self::Other(error.to_string()),
        }
    }
}

async fn run(client: &Client, work: Work) -> std::result::Result<(), Told> {
    match work {
        Work::Transaction => {
            client.batch_execute("begin").await?;
            let row = client
                .query_one("insert into t values (1, $1) returning id", &[&"a"])
                .await?;
            same(&[row.get(0)], &[1])?;
            client
                .batch_execute("savepoint s; insert into t values (2, 'b')")
                .await?;
            let rows = client.query("select id from t order by id", &[]).await?;
            let ids: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
            same(&ids, &[1, 2])?;
            Ok(client.batch_execute("commit").await?)
        }
        Work::Autocommit => {
            // What was told of one says nothing of the next.
            let first = client.batch_execute("insert into t values (1, 'a')").await;
            let second = client
                .execute("insert into t values ($1, 'b')", &[&2])
                .await;
            if let Ok(rows) = &second {
                same(&[i32::try_from(*rows).unwrap_or(-1)], &[1])?;
            }
            match (first.map_err(Told::from), second.map_err(Told::from)) {
                (Err(Told::Other(what)), _) | (_, Err(Told::Other(what))) => Err(Told::Other(what)),
                (Err(told), _) | (_, Err(told)) => Err(told),
                (Ok(()), Ok(_)) => Ok(()),
            }
        }
        Work::Copy => {
            let sink = client.copy_in("copy t from stdin").await?;
            let mut sink = std::pin::pin!(sink);
            sink.send(ONE).await?;
            sink.send(TWO).await?;
            let rows = sink.finish().await?;
            same(&[i32::try_from(rows).unwrap_or(-1)], &[2])?;
            // The driver returns at CommandComplete; the commit is at the Sync behind it.
            Ok(client.batch_execute("select 1").await?)
        }
    }
}

fn same(is: &[i32], must: &[i32]) -> std::result::Result<(), Told> {
    match is == must {
        true => Ok(()),
        false => Err(Told::Other(format!("{is:?} instead of {must:?}"))),
    }
}

/// Nobody is primary for longer than the limit: whoever asks for something is told so.
#[tokio::test(flavor = "multi_thread")]
async fn no_primary_within_the_limit() -> std::result::Result<(), Shown> {
    Ok(no_primary().await?)
}

async fn no_primary() -> Result<()> {
    let engine = EngineOptions {
        outage_limit: Duration::from_secs(1),
        ..EngineOptions::default()
    };
    let mut bench = Bench::start(engine, "create table t (id int)").await?;
    bench.known().await?;
    let (idle, open) = (bench.client().await?, bench.client().await?);
    open.batch_execute("begin; insert into t values (1)")
        .await?;
    bench.server.crash();
    // Both at once: the limit is each session's own, and runs from when it lost its server.
    let told = tokio::time::timeout(ANSWER, async {
        let read = idle.batch_execute("select 1");
        tokio::join!(read, open.batch_execute("insert into t values (2)"))
    });
    let (read, write) = told.await?;
    for (told, sql) in [(read, "the read"), (write, "the write")] {
        let code = told
            .err()
            .and_then(|e| e.code().map(|c| c.code().to_owned()));
        if code.as_deref() != Some("57P03") {
            return Err(format!("{sql}: told {code:?}").into());
        }
    }
    bench.server.boot().await?;
    let direct = bench.server.connect().await?;
    let rows: i64 = direct
        .query_one("select count(*) from t", &[])
        .await?
        .get(0);
    match rows {
        0 => Ok(()),
        n => Err(format!("{n} rows of a lost transaction").into()),
    }
}

/// A transaction over its journal's limit does not survive a planned move that cuts it off; the
/// reason is known beforehand.
#[tokio::test(flavor = "multi_thread")]
async fn a_journal_over_its_limit_in_a_planned_move() -> std::result::Result<(), Shown> {
    Ok(over_its_limit().await?)
}

async fn over_its_limit() -> Result<()> {
    let engine = EngineOptions {
        max_journal_bytes: 10_000,
        ..EngineOptions::default()
    };
    let mut bench = Bench::start(engine, "create table t (v text)").await?;
    let client = bench.client().await?;
    client.batch_execute("begin").await?;
    for _ in 0..5 {
        let long = "x".repeat(3000);
        client
            .execute("insert into t values ($1)", &[&long])
            .await?;
    }
    let sessions = bench.proxy.sessions();
    let why = sessions.first().and_then(|s| s.unprotected.clone());
    if !why
        .as_ref()
        .is_some_and(|why| why.contains("limit of 10000 bytes"))
    {
        return Err(format!("unprotected: {why:?}").into());
    }
    bench.switchover().await?;
    let told = client.batch_execute("commit").await;
    let code = told
        .err()
        .and_then(|e| e.code().map(|c| c.code().to_owned()));
    let rows = bench.column("select count(*) from t").await?;
    if code.as_deref() != Some("40001") || rows != ["0"] {
        return Err(format!("told {code:?}, {rows:?} rows").into());
    }
    // The session lives on.
    client.batch_execute("insert into t values ('y')").await?;
    match bench.column("select v from t").await? == ["y"] {
        true => Ok(()),
        false => Err("the session does not live on".into()),
    }
}
