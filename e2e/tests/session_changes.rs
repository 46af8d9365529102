//! State that a session changes itself while it moves: statements prepared and given up by SQL in a
//! transaction that is lost, DISCARD ALL and its kind in a pipeline.
//!
//! Every program also runs on PostgreSQL alone; what clients receive and what their sessions hold
//! afterwards is compared.

use std::sync::Arc;
use std::time::Duration;

use helios_e2e::driver::Target;
use helios_e2e::raw::{Message, RawClient, bind, execute, extended, parse, query, sync};
use helios_e2e::{Result, Shown};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_testkit::frames::Unit;
use helios_testkit::interpose::{Cut, Order, Way};

const SCHEMA: &str = "create table t (id int, v text)";

async fn bench() -> Result<Bench> {
    let bench = Bench::start(EngineOptions::default(), SCHEMA).await?;
    bench.known().await?;
    Ok(bench)
}

fn target(port: u16) -> Target {
    Target {
        host: "127.0.0.1".to_owned(),
        port,
        user: "postgres".to_owned(),
        password: String::new(),
        database: "postgres".to_owned(),
    }
}

/// What a client receives up to so many ReadyForQuery, without what may come at any time: tags,
/// values and SQLSTATEs.
async fn received(client: &mut RawClient, cycles: usize) -> Result<Vec<String>> {
    let (mut seen, mut ready) = (Vec::new(), 0);
    while ready < cycles {
        let message = client.receive().await?.ok_or("the connection was closed")?;
        ready += usize::from(message.tag == b'Z');
        if !matches!(message.tag, b'N' | b'S' | b'A' | b'T') {
            seen.push(shown(&message));
        }
    }
    Ok(seen)
}

fn shown(message: &Message) -> String {
    let tag = char::from(message.tag);
    match (message.tag, message.sqlstate()) {
        (_, Some(state)) => format!("{tag} {state}"),
        (b'D' | b'C' | b'Z', None) => {
            let printable = |b: &&u8| b.is_ascii_graphic() || **b == b' ';
            let text: Vec<u8> = message.body.iter().filter(printable).copied().collect();
            format!("{tag} {}", String::from_utf8_lossy(&text))
        }
        _ => tag.to_string(),
    }
}

async fn ask(client: &mut RawClient, sql: &str) -> Result<Vec<String>> {
    client.send(&query(sql)).await?;
    received(client, 1).await
}

/// What a session holds.
async fn state(client: &mut RawClient) -> Result<Vec<String>> {
    let sql = "select 'work_mem ' || current_setting('work_mem') union all \
               select name || ' ' || from_sql from pg_prepared_statements \
               where left(name, 7) <> '_helios' order by 1";
    ask(client, sql).await
}

/// Inside a transaction that a move then costs.
const LOST: [&str; 7] = [
    "begin",
    "prepare inside (int) as select $1 + 1",
    "deallocate gone; deallocate named",
    "deallocate again; prepare again as select 'new'",
    "prepare brief as select 1; deallocate brief",
    "savepoint s; prepare behind as select 'behind'; rollback to s",
    "insert into t values (1, gen_random_uuid()::text) returning v",
];

async fn transaction(client: &mut RawClient) -> Result<()> {
    for sql in [
        "set work_mem = '7MB'",
        "prepare gone as select 1",
        "prepare again as select 'old'",
        "prepare kept as select 'kept'",
    ] {
        ask(client, sql).await?;
    }
    for name in ["named", "stays"] {
        let prepared = [parse(name, "select 'of the protocol'"), sync()];
        client.send(&prepared.concat()).await?;
        client.until(b'Z').await?;
    }
    for sql in LOST {
        client.send(&query(sql)).await?;
        client.until(b'Z').await?;
    }
    let by_bind = "prepare by_bind as select 'bind'";
    client
        .send(&[extended(by_bind, &[]), sync()].concat())
        .await?;
    client.until(b'Z').await?;
    Ok(())
}

/// What is there behind the transaction, and whether the names may be used again.
async fn behind(client: &mut RawClient) -> Result<Vec<String>> {
    let mut all = state(client).await?;
    for sql in ["execute again", "execute inside (1)", "execute gone"] {
        all.extend(ask(client, sql).await?);
    }
    let again = [parse("named", "select 'again'"), bind("", "named", &[])];
    let again = [again.concat(), execute("", 0), sync()].concat();
    client.send(&again).await?;
    all.extend(received(client, 1).await?);
    Ok(all)
}

#[derive(Debug, Clone, Copy)]
enum Move {
    Planned,
    Crash,
}

/// PostgreSQL keeps what PREPARE and DEALLOCATE did through a rollback; so does a session whose
/// transaction is lost.
#[tokio::test(flavor = "multi_thread")]
async fn prepare_and_deallocate_outlive_a_lost_transaction() -> std::result::Result<(), Shown> {
    Ok(outlive().await?)
}

async fn outlive() -> Result<()> {
    let mut bench = bench().await?;
    let mut alone = RawClient::log_in(&target(bench.server.port())).await?;
    transaction(&mut alone).await?;
    ask(&mut alone, "rollback").await?;
    let wanted = behind(&mut alone).await?;
    for (how, twice) in [
        (Move::Planned, false),
        (Move::Crash, false),
        (Move::Planned, true),
    ] {
        let mut client = RawClient::log_in(&target(bench.proxy.port())).await?;
        transaction(&mut client).await?;
        for _ in 0..=usize::from(twice) {
            moved(&mut bench, how).await?;
        }
        let told = ask(&mut client, "select 1").await?;
        if told != ["E 40001", "Z E"] {
            return Err(format!("{how:?}: told {told:?}").into());
        }
        if twice {
            moved(&mut bench, Move::Crash).await?;
        }
        ask(&mut client, "rollback").await?;
        let is = behind(&mut client).await?;
        if is != wanted {
            return Err(format!("{how:?}: {is:?}, alone {wanted:?}").into());
        }
        // And they go on moving.
        let before = state(&mut client).await?;
        moved(&mut bench, how).await?;
        let after = state(&mut client).await?;
        if before != after {
            return Err(format!("{how:?}: {after:?}, before {before:?}").into());
        }
    }
    let rows = bench.column("select count(*) from t").await?;
    match rows == ["0"] {
        true => Ok(()),
        false => Err(format!("{rows:?} rows of lost transactions").into()),
    }
}

async fn moved(bench: &mut Bench, how: Move) -> Result<()> {
    match how {
        Move::Planned => Ok(bench.switchover().await?),
        Move::Crash => Ok(bench.crash().await?),
    }
}

/// A program whose messages are all sent at once, with the number of its ReadyForQuery.
type Pipeline = (&'static str, Vec<u8>, usize);

fn pipelines() -> Vec<Pipeline> {
    let discard = || query("discard all");
    let use_s = || [bind("", "s", &[]), execute("", 0), sync()].concat();
    let parse_s = || [parse("s", "select 'new'"), sync()].concat();
    let insert = || query("insert into t values (1, 'x')");
    let show = || query("show work_mem");
    let set = || query("set work_mem = '9MB'");
    let by_bind = || extended("discard all", &[]);
    vec![
        ("used behind", [discard(), use_s()].concat(), 2),
        (
            "prepared anew behind",
            [discard(), insert(), parse_s(), use_s()].concat(),
            4,
        ),
        (
            "extended, with more behind it",
            [by_bind(), extended("select 1", &[]), sync(), use_s()].concat(),
            2,
        ),
        (
            "extended, not the first",
            [extended("select 1", &[]), by_bind(), sync(), use_s()].concat(),
            2,
        ),
        (
            "extended, several exchanges",
            [by_bind(), sync(), insert(), use_s(), show()].concat(),
            4,
        ),
        ("a setting", [set(), insert(), show()].concat(), 3),
        (
            "a setting in a transaction",
            [query("begin"), set(), query("commit"), insert(), show()].concat(),
            5,
        ),
        (
            "deallocate",
            [query("deallocate s"), parse_s(), use_s()].concat(),
            3,
        ),
    ]
}

/// A new session with state of every kind that DISCARD ALL ends.
async fn with_state(port: u16) -> Result<RawClient> {
    let mut client = RawClient::log_in(&target(port)).await?;
    ask(&mut client, "set work_mem = '5MB'").await?;
    ask(&mut client, "prepare p as select 'p'").await?;
    client
        .send(&[parse("s", "select 'old'"), sync()].concat())
        .await?;
    client.until(b'Z').await?;
    Ok(client)
}

async fn count(bench: &Bench) -> Result<Vec<String>> {
    let rows = bench.column("select count(*) from t").await?;
    bench.direct.batch_execute("truncate t").await?;
    Ok(rows)
}

/// A move right behind a pipeline that changes the session, and between any two of the server's
/// answers to it.
#[tokio::test(flavor = "multi_thread")]
async fn pipelines_that_change_the_session_move() -> std::result::Result<(), Shown> {
    Ok(Box::pin(pipelined()).await?)
}

async fn pipelined() -> Result<()> {
    let mut bench = bench().await?;
    bench.interpose()?;
    let mut seen = Vec::new();
    for (name, messages, cycles) in pipelines() {
        let mut alone = with_state(bench.server.port()).await?;
        alone.send(&messages).await?;
        let wanted = received(&mut alone, cycles).await?;
        let holds = state(&mut alone).await?;
        let wanted = (wanted, holds, count(&bench).await?);
        // By plan, as soon as all is sent.
        let mut client = with_state(bench.proxy.port()).await?;
        client.send(&messages).await?;
        bench.switchover().await?;
        let got = received(&mut client, cycles).await?;
        let is = (got, state(&mut client).await?, count(&bench).await?);
        if is != wanted {
            return Err(format!("{name}, planned: {is:?}, alone {wanted:?}").into());
        }
        for after in 1.. {
            let cut = Cut {
                way: Way::FromServer,
                unit: Unit::Messages,
                after,
            };
            let crash = after % 6 == 3;
            let met = struck(&mut bench, &messages, cycles, cut, crash, &wanted).await;
            let met = met.map_err(|e| format!("{name}, behind answer {after}: {e}"))?;
            let Some(unseen) = met else { break };
            seen.push(unseen);
        }
    }
    let unseen = seen.iter().filter(|unseen| **unseen).count();
    // More than half of the answers belong to the question for the state, and are an error.
    match unseen * 4 > seen.len() {
        true => Ok(()),
        false => Err(format!("only {unseen} of {} moves were not seen", seen.len()).into()),
    }
}

type Wanted = (Vec<String>, Vec<String>, Vec<String>);

/// Strikes behind a message; whether the client was told of nothing, `None` when it was not met.
async fn struck(
    bench: &mut Bench,
    messages: &[u8],
    cycles: usize,
    cut: Cut,
    crash: bool,
    wanted: &Wanted,
) -> Result<Option<bool>> {
    let mut client = with_state(bench.proxy.port()).await?;
    let order = match crash {
        true => Order::waiting(cut, 1),
        false => Order::new(cut, 1),
    };
    set(bench, Some(Arc::clone(&order)));
    client.send(messages).await?;
    let receives = tokio::spawn(async move {
        let answers = received(&mut client, cycles).await;
        answers.map(|a| (a, client)).map_err(|e| e.to_string())
    });
    while !receives.is_finished() && order.hits().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let met = !order.hits().is_empty();
    if met && crash {
        bench.crash().await?;
        order.release();
    }
    let (answers, mut client) = receives.await??;
    set(bench, None);
    // Nobody knows of a statement that is not there whether it was not there before the crash either.
    let unknown = |(a, w): (&String, &String)| match (a.as_str(), w.as_str()) {
        ("E 08007", "E 26000") => w.clone(),
        _ => a.clone(),
    };
    let answers: Vec<String> = answers.iter().zip(&wanted.0).map(unknown).collect();
    let mut holds = state(&mut client).await?;
    // The answer to the proxy's own question for the new state was lost, or a result: an error, and
    // no doubt.
    let told = |a: &String| a == "E 40001" || a == "E 08007";
    let lost = answers.iter().chain(&holds).any(told);
    if holds.iter().any(told) {
        holds = state(&mut client).await?;
    }
    let rows = count(bench).await?;
    let is = (answers, holds, rows);
    let doubled = is.2 != ["0"] && is.2 != wanted.2;
    if doubled || (!lost && is != *wanted) {
        return Err(format!("{is:?}, alone {wanted:?}").into());
    }
    Ok(met.then_some(!lost))
}

fn set(bench: &Bench, order: Option<Arc<Order>>) {
    if let Some(between) = &bench.between {
        between.set(|rules| rules.cut = order);
    }
}
