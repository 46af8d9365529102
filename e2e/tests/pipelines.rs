//! Requests that commit by themselves, sent without waiting for each other, cut off at each message:
//! each one is told its own outcome.

use std::sync::Arc;

use helios_e2e::driver::Target;
use helios_e2e::raw::{Message, RawClient, bind, describe, execute, parse, query, sync};
use helios_e2e::{Result, Shown};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_testkit::frames::Unit;
use helios_testkit::interpose::{Class, Cut, Order, Way};

/// Each row is written by one request.
const ROWS: [&str; 4] = ["a", "b", "c", "d"];
/// Messages of all of them there and back; a cut behind more of them hits nothing.
const MOST: u64 = 70;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// The connection breaks, the server lives.
    Broken,
    /// `kill -9` of the server at that moment.
    Crash,
}

fn extended(sql: &str) -> Vec<u8> {
    let run = [parse("", sql), bind("", "", &[]), describe('P', "")];
    [run.concat(), execute("", 0), sync()].concat()
}

fn extended_insert(row: &str) -> Vec<u8> {
    extended(&format!("insert into t values ('{row}')"))
}

/// One request for each row, of both protocols, and what their answers are.
fn requests() -> (Vec<u8>, [&'static str; 4]) {
    let insert = |row: &str| format!("insert into t values ('{row}')");
    let returning = |row: &str| format!("insert into t values ('{row}') returning v");
    let all = [
        query(&insert(ROWS[0])),
        extended(&insert(ROWS[1])),
        query(&returning(ROWS[2])),
        extended(&returning(ROWS[3])),
    ];
    (all.concat(), ["C", "12nC", "TDC", "12TDC"])
}

/// What each request was answered, up to its ReadyForQuery.
async fn answers(client: &mut RawClient) -> Result<Vec<Vec<Message>>> {
    let mut all = Vec::new();
    while all.len() < ROWS.len() {
        let mut one = Vec::new();
        loop {
            let message = client.receive().await?.ok_or("the connection was closed")?;
            match message.tag {
                b'Z' => break,
                b'N' | b'S' | b'A' => {}
                _ => one.push(message),
            }
        }
        all.push(one);
    }
    Ok(all)
}

/// Whether an answer fits what is in the table of its row.
fn fits(answer: &[Message], wanted: &str, rows: usize) -> bool {
    let tags: String = answer.iter().map(|m| char::from(m.tag)).collect();
    if tags == wanted {
        return rows == 1;
    }
    let Some((error, before)) = answer.split_last() else {
        return false;
    };
    let begun: String = before.iter().map(|m| char::from(m.tag)).collect();
    let unknown = wanted.starts_with(&begun) && error.sqlstate().as_deref() == Some("08007");
    let text = error.field(b'M').unwrap_or_default();
    match text.starts_with("the statement was committed") {
        true => unknown && rows == 1,
        false => unknown && rows <= 1,
    }
}

/// Runs them, cut at a message; whether it was met, and how many were told that nobody knows.
async fn cut(bench: &mut Bench, fault: Fault, cut: Cut) -> Result<(bool, usize)> {
    bench.direct.batch_execute("truncate t").await?;
    let target = Target::local(bench.proxy.port());
    let mut client = RawClient::log_in(&target).await?;
    let order = Order::new(cut, 1);
    set(bench, Some(Arc::clone(&order)), fault == Fault::Crash);
    let (messages, wanted) = requests();
    client.send(&messages).await?;
    if fault == Fault::Crash {
        bench.crash().await?;
    }
    set(bench, Some(Arc::clone(&order)), false);
    let answers = answers(&mut client).await?;
    let met = !order.hits().is_empty();
    set(bench, None, false);
    let mut unknown = 0;
    for ((row, wanted), answer) in ROWS.iter().zip(wanted).zip(&answers) {
        let there = format!("select v from t where v = '{row}'");
        let there = bench.column(&there).await?.len();
        if !fits(answer, wanted, there) {
            let told: Vec<_> = answers.iter().map(|a| shown(a)).collect();
            return Err(format!("row {row} is there {there} times, told {told:?}").into());
        }
        unknown += usize::from(answer.iter().any(|m| m.tag == b'E'));
    }
    client.send(&query("select 1")).await?;
    client.until(b'Z').await?;
    Ok((met, unknown))
}

fn shown(answer: &[Message]) -> String {
    let tags: String = answer.iter().map(|m| char::from(m.tag)).collect();
    let texts = answer.iter().filter_map(|m| m.field(b'M'));
    texts.fold(tags, |all, text| format!("{all} {text}"))
}

fn set(bench: &Bench, order: Option<Arc<Order>>, refuse: bool) {
    if let Some(between) = &bench.between {
        between.set(|rules| {
            rules.cut = order;
            rules.refuse = match refuse {
                true => vec![Class::Session, Class::Service],
                false => Vec::new(),
            };
        });
    }
}

async fn at_each_message(fault: Fault, step: usize) -> Result<()> {
    let schema = "create table t (v text)";
    let mut bench = Bench::start(EngineOptions::default(), schema).await?;
    bench.interpose()?;
    let (mut met, mut unknown) = (0, 0);
    for way in [Way::ToServer, Way::FromServer] {
        for after in (0..MOST).step_by(step) {
            bench.known().await?;
            let order = Cut {
                way,
                unit: Unit::Messages,
                after,
            };
            let done = cut(&mut bench, fault, order).await;
            let (hit, told) = done.map_err(|e| format!("{way:?} {after}: {e}"))?;
            met += usize::from(hit);
            unknown += told;
        }
    }
    eprintln!("{met} cuts were met, {unknown} requests were told 08007");
    match met >= 40 / step {
        true => Ok(()),
        false => Err(format!("only {met} cuts were met").into()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_is_told_its_own_outcome_when_the_connection_breaks() -> std::result::Result<(), Shown>
{
    Ok(Box::pin(at_each_message(Fault::Broken, 1)).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_is_told_its_own_outcome_after_a_crash() -> std::result::Result<(), Shown> {
    Ok(Box::pin(at_each_message(Fault::Crash, 5)).await?)
}

/// What is committed behind a deferred trigger, which waits for a lock that the test has: the answer
/// is told in front of a commit that does not end.
const WAITS: &str = "create table t (v text); \
    create function waits() returns trigger language plpgsql as \
    'begin perform pg_advisory_xact_lock(1); return null; end'; \
    create constraint trigger waits after insert on t deferrable initially deferred \
    for each row when (new.v = 'c') execute function waits()";

/// A statement runs again and is compared with what the client was given, before it may commit: what
/// the client has sent behind it is not to run in its transaction.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_compared_is_not_joined_by_what_follows() -> std::result::Result<(), Shown> {
    Ok(Box::pin(compared()).await?)
}

async fn compared() -> Result<()> {
    let mut bench = Bench::start(EngineOptions::default(), WAITS).await?;
    bench.known().await?;
    let lock = "select pg_advisory_lock(1)";
    bench.direct.batch_execute(lock).await?;
    let mut client = RawClient::log_in(&Target::local(bench.proxy.port())).await?;
    // More than is kept back until the commit.
    let seen = "insert into t values ('c') returning repeat('x', 1000000)";
    let behind = extended_insert("d");
    client
        .send(&[query(seen), behind, query("select 1")].concat())
        .await?;
    let before = client.until(b'C').await?;
    assert_eq!(shown(&before), "TDC");
    bench.crash().await?;
    let rest = [client.until(b'Z').await?, client.until(b'Z').await?];
    let rest: Vec<_> = rest.iter().map(|answer| shown(answer)).collect();
    assert_eq!(rest, ["Z", "12nCZ"]);
    assert_eq!(shown(&client.until(b'Z').await?), "TDCZ");
    let rows = "select v || count(*) over (partition by xmin::text) from t order by v";
    assert_eq!(
        bench.column(rows).await?,
        ["c1", "d1"],
        "each in its own transaction"
    );
    Ok(())
}

/// A COPY that is refused, and a statement that was sent behind it without waiting.
#[tokio::test(flavor = "multi_thread")]
async fn what_follows_a_refused_copy_runs() -> std::result::Result<(), Shown> {
    Ok(Box::pin(refused_copy()).await?)
}

async fn refused_copy() -> Result<()> {
    let bench = Bench::start(EngineOptions::default(), "create table t (v text)").await?;
    bench.known().await?;
    let mut client = RawClient::log_in(&Target::local(bench.proxy.port())).await?;
    let copy = query("copy t (nothing) from stdin");
    client
        .send(&[copy, extended_insert("d"), query("select 1")].concat())
        .await?;
    let mut told = Vec::new();
    while told.iter().filter(|t| **t == 'Z').count() < 3 {
        let message = client.receive().await?.ok_or("the connection was closed")?;
        told.push(char::from(message.tag));
    }
    assert_eq!(String::from_iter(told), "EZ12nCZTDCZ");
    assert_eq!(bench.column("select v from t").await?, ["d"]);
    Ok(())
}

/// What fails as long as `gate` says so.
const GATE: &str =
    "create table t (v text); create table gate (n int); insert into gate values (0)";
const FAILS: &str = "insert into t select 'lost' || 1 / n from gate";

/// A request with its own COMMIT that has failed in front of it, in each form; what was before it.
fn failing() -> [(&'static str, Vec<u8>, Vec<u8>); 3] {
    let whole = format!("begin; insert into t values ('lost'); {FAILS}; commit");
    let run = |sql: &str| [parse("", sql), bind("", "", &[]), execute("", 0)].concat();
    let pipeline = [run("begin"), run(FAILS), run("commit"), sync()].concat();
    let behind = query(&format!("{FAILS}; commit"));
    let before = query("begin; savepoint s");
    [
        ("one query", Vec::new(), query(&whole)),
        ("a pipeline", Vec::new(), pipeline),
        ("behind a savepoint", before, behind),
    ]
}

/// Its client knows that it has failed: run again, where the reason is gone, it would commit (seed
/// 20261566 of the experiments: a full disk).
async fn commits_behind_errors(crash: bool) -> Result<()> {
    let mut bench = Bench::start(EngineOptions::default(), GATE).await?;
    bench.known().await?;
    for (form, before, fails) in failing() {
        bench.direct.batch_execute("update gate set n = 0").await?;
        let mut client = RawClient::log_in(&Target::local(bench.proxy.port())).await?;
        client.send(&before).await?;
        if !before.is_empty() {
            client.until(b'Z').await?;
        }
        client.send(&fails).await?;
        client.until(b'E').await?;
        assert_eq!(
            client.until(b'Z').await?.last().map(|z| z.body.clone()),
            Some(b"E".to_vec())
        );
        let mut later = None;
        if form.contains("savepoint") {
            client.send(&query("rollback to s")).await?;
            client.until(b'Z').await?;
            later = Some("40001");
        }
        bench.direct.batch_execute("update gate set n = 1").await?;
        if crash {
            bench.crash().await?;
        } else {
            bench.switchover().await?;
        }
        client
            .send(&query("insert into t values ('behind')"))
            .await?;
        let told = client.until(b'E').await?;
        let told = told.last().and_then(Message::sqlstate);
        assert!(
            later.is_none() || told.as_deref() == later,
            "{form}: {told:?}"
        );
        client.until(b'Z').await?;
        client.send(&query("rollback")).await?;
        client.until(b'Z').await?;
        assert!(bench.column("select v from t").await?.is_empty(), "{form}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_in_front_of_its_commit_is_not_committed_by_a_switchover()
-> std::result::Result<(), Shown> {
    Ok(Box::pin(commits_behind_errors(false)).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_in_front_of_its_commit_is_not_committed_by_a_crash()
-> std::result::Result<(), Shown> {
    Ok(Box::pin(commits_behind_errors(true)).await?)
}

/// The same, cut off behind each message of the answer: behind the error, nothing is run again.
#[tokio::test(flavor = "multi_thread")]
async fn what_failed_in_front_of_its_commit_and_is_cut_off_there_is_not_committed()
-> std::result::Result<(), Shown> {
    Ok(Box::pin(cut_off_behind_errors()).await?)
}

async fn cut_off_behind_errors() -> Result<()> {
    let mut bench = Bench::start(EngineOptions::default(), GATE).await?;
    bench.interpose()?;
    let mut behind_the_error = 0;
    for (form, before, fails) in failing() {
        for after in 1..=12 {
            let reset = "update gate set n = 0; truncate t";
            bench.direct.batch_execute(reset).await?;
            bench.known().await?;
            let mut client = RawClient::log_in(&Target::local(bench.proxy.port())).await?;
            client.send(&before).await?;
            if !before.is_empty() {
                client.until(b'Z').await?;
            }
            let order = Order::new(
                Cut {
                    way: Way::FromServer,
                    unit: Unit::Messages,
                    after,
                },
                1,
            );
            set(&bench, Some(Arc::clone(&order)), true);
            client.send(&fails).await?;
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            bench.crash().await?;
            bench.direct.batch_execute("update gate set n = 1").await?;
            set(&bench, None, false);
            let mut told = Vec::new();
            while told.last() != Some(&'Z') {
                let message = client.receive().await?.ok_or("the connection was closed")?;
                told.push(char::from(message.tag));
            }
            behind_the_error += usize::from(order.hits().contains(&Some(b'E')));
            client.send(&query("rollback")).await?;
            client.until(b'Z').await?;
            let left = bench.column("select v from t").await?.len();
            let failed = told.contains(&'E');
            if failed && left > 0 {
                return Err(
                    format!("{form}, {after}: told {told:?}, {left} rows are there").into(),
                );
            }
        }
    }
    match behind_the_error {
        0 => Err("no cut was right behind the error".into()),
        _ => Ok(()),
    }
}
