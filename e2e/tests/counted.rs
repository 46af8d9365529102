//! Statements that commit by themselves and whose answer is lost: it is counted in the log, or the
//! client is told that it is lost.
//!
//! One server behind a go-between that throws every answer away, while the server lives and with a
//! crash of it. Judged by what the client received and by the rows in the database.

use std::time::{Duration, Instant};

use helios_e2e::driver::Target;
use helios_e2e::raw::{Message, RawClient, bind, describe, execute, extended, parse, query, sync};
use helios_e2e::{Result, Shown};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_testkit::frames::Unit;
use helios_testkit::interpose::{Class, Cut, Order, Way};

const SCHEMA: &str = "\
    create table plain (id serial primary key, v text, n int default 0 check (n >= 0)); \
    create table child (id int references plain); \
    create view shown as select * from plain; \
    create table parts (v text) partition by list (v); \
    create table part partition of parts default; \
    create table noisy (v text); \
    create function echo() returns trigger language plpgsql as $$begin \
        if pg_trigger_depth() = 1 then insert into noisy values ('echo'); end if; return new; end$$; \
    create trigger echo after insert on noisy for each row execute function echo(); \
    create table quiet (v text); create unlogged table fleeting (v text); \
    create function drops() returns trigger language plpgsql as $$begin return null; end$$; \
    create trigger drops before insert on quiet for each row execute function drops(); \
    create table ruled (v text); \
    create rule more as on insert to ruled do also insert into plain (v) values (new.v); \
    create function own(v text) returns text language plpgsql as \
        $$begin insert into plain (v) values ('own'); return v; end$$";

/// Every table as it is before each statement.
const RESET: &str = "truncate plain, child, parts, noisy, quiet, fleeting, ruled restart identity; \
    insert into plain (v) select 'old' from generate_series(1, 3)";

/// What the client must have received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// This command tag.
    Tag(&'static str),
    /// 08007 that says that the statement has committed.
    Lost,
}

struct Case {
    id: &'static str,
    messages: Vec<u8>,
    wanted: Wanted,
    /// A query, and what it gives when the statement has run once.
    left: (&'static str, &'static str),
}

fn case(
    id: &'static str,
    messages: Vec<u8>,
    wanted: Wanted,
    left: (&'static str, &'static str),
) -> Case {
    Case {
        id,
        messages,
        wanted,
        left,
    }
}

/// By a statement that was prepared in an exchange before.
fn prepared(name: &str, parameters: &[&str]) -> Vec<u8> {
    let run = [
        bind("", name, parameters),
        describe('P', ""),
        execute("", 0),
        sync(),
    ];
    run.concat()
}

/// The statements that every session has prepared.
const PREPARED: [(&str, &str); 2] = [
    ("ins", "insert into plain (v) values ($1), ($1)"),
    ("upd", "update plain set n = n + 1 where id <= $1::int"),
];

fn cases() -> Vec<Case> {
    use Wanted::{Lost, Tag};
    let all = "select count(*) || ' ' || coalesce(sum(n), 0) from plain";
    let unnamed = [
        extended("insert into plain (v) values ($1)", &["x"]),
        sync(),
    ]
    .concat();
    // Too long for its page, and not to be compressed.
    let long: String = (0..20_000_u32)
        .map(|i| char::from(b'a' + (i.wrapping_mul(2_654_435_761) >> 27) as u8 % 26))
        .collect();
    let toasted = [
        extended("insert into plain (v) values ($1)", &[&long]),
        sync(),
    ]
    .concat();
    vec![
        case(
            "simple",
            query("insert into plain (v) values ('x')"),
            Tag("INSERT 0 1"),
            (all, "4 0"),
        ),
        case("unnamed", unnamed, Tag("INSERT 0 1"), (all, "4 0")),
        case(
            "prepared",
            prepared("ins", &["x"]),
            Tag("INSERT 0 2"),
            (all, "5 0"),
        ),
        case("toasted", toasted, Tag("INSERT 0 1"), (all, "4 0")),
        case(
            "update",
            prepared("upd", &["2"]),
            Tag("UPDATE 2"),
            (all, "3 2"),
        ),
        case(
            "nothing to do",
            prepared("upd", &["0"]),
            Tag("UPDATE 0"),
            (all, "3 0"),
        ),
        case(
            "delete",
            query("delete from public.plain where id > 1;"),
            Tag("DELETE 2"),
            (all, "1 0"),
        ),
        case(
            "foreign key",
            query("insert into child values (1), (2)"),
            Tag("INSERT 0 2"),
            ("select count(*) from child", "2"),
        ),
        case(
            "suppressed",
            query("insert into quiet values ('x')"),
            Lost,
            ("select count(*) from quiet", "0"),
        ),
        case(
            "not logged",
            query("insert into fleeting values ('x')"),
            Lost,
            ("select count(*) <= 1 from fleeting", "t"),
        ),
        case(
            "view",
            query("insert into shown (v) values ('x')"),
            Lost,
            (all, "4 0"),
        ),
        case(
            "partitions",
            query("insert into parts values ('x')"),
            Lost,
            ("select count(*) from parts", "1"),
        ),
        case(
            "trigger",
            query("insert into noisy values ('x')"),
            Lost,
            ("select count(*) from noisy", "2"),
        ),
        case(
            "rule",
            query("insert into ruled values ('x')"),
            Lost,
            ("select count(*) from ruled", "1"),
        ),
        case(
            "function",
            query("update plain set v = own(v) where id = 1"),
            Lost,
            (all, "4 0"),
        ),
        case(
            "rows of a set",
            query("insert into plain (n) values (generate_series(1, 2))"),
            Lost,
            (all, "5 3"),
        ),
    ]
}

async fn log_in(bench: &Bench) -> Result<RawClient> {
    let mut client = RawClient::log_in(&Target::local(bench.proxy.port())).await?;
    for (name, sql) in PREPARED {
        client.send(&[parse(name, sql), sync()].concat()).await?;
        client.until(b'Z').await?;
    }
    Ok(client)
}

async fn start() -> Result<Bench> {
    let mut bench = Bench::start(EngineOptions::default(), SCHEMA).await?;
    bench.interpose()?;
    bench.known().await?;
    Ok(bench)
}

/// Sends `messages`, and stops what the server sends from the first byte on.
async fn unanswered(bench: &Bench, client: &mut RawClient, messages: &[u8]) -> Result<()> {
    let order = Order::waiting(first(Way::FromServer, 0), 1);
    let between = bench.between.as_ref().ok_or("nobody is in between")?;
    between.set(|rules| rules.cut = Some(std::sync::Arc::clone(&order)));
    client.send(messages).await?;
    order.hit().await;
    between.set(|rules| rules.cut = None);
    Ok(())
}

fn first(way: Way, after: u64) -> Cut {
    Cut {
        way,
        unit: Unit::Messages,
        after,
    }
}

/// What the client is told of the statement that was cut off, as a tag or a SQLSTATE.
async fn told(client: &mut RawClient) -> Result<String> {
    let mut messages: Vec<Message> = Vec::new();
    while messages.last().is_none_or(|m| m.tag != b'Z') {
        messages.push(client.receive().await?.ok_or("the connection was closed")?);
    }
    let lost = "the statement was committed, but its result was lost";
    let is_lost = |m: &Message| m.field(b'M').is_some_and(|text| text.starts_with(lost));
    let tag = |m: &Message| {
        String::from_utf8_lossy(&m.body)
            .trim_end_matches('\0')
            .to_owned()
    };
    let tags: Vec<String> = messages.iter().filter(|m| m.tag == b'C').map(tag).collect();
    match messages.iter().find(|m| m.tag == b'E') {
        Some(error) if is_lost(error) && tags.is_empty() => Ok("lost".to_owned()),
        Some(error) => {
            Err(format!("{tags:?} {:?} {:?}", error.sqlstate(), error.field(b'M')).into())
        }
        None => Ok(tags.concat()),
    }
}

/// Waits until whatever a session did last has committed: the go-between has the answer, and the
/// rows are there or nothing is to come.
async fn committed(bench: &Bench) -> Result<()> {
    let busy = "select count(*) from pg_stat_activity where backend_type = 'client backend' \
                and pid <> pg_backend_pid() and state <> 'idle'";
    let deadline = Instant::now() + Duration::from_secs(20);
    while bench.column(busy).await? != ["0"] {
        if Instant::now() > deadline {
            return Err("a statement does not end".into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

fn refuse(bench: &Bench, classes: Vec<Class>) {
    if let Some(between) = &bench.between {
        between.set(|rules| rules.refuse = classes);
    }
}

async fn one(bench: &mut Bench, mut client: RawClient, case: &Case, crash: bool) -> Result<()> {
    bench.direct.batch_execute(RESET).await?;
    unanswered(bench, &mut client, &case.messages).await?;
    committed(bench).await?;
    if crash {
        // Nobody gets at the server that is about to die.
        refuse(bench, vec![Class::Session, Class::Service]);
        bench.crash().await?;
    }
    if let Some(between) = &bench.between {
        between.close(Class::Session);
    }
    refuse(bench, Vec::new());
    let told = told(&mut client).await?;
    let wanted = match case.wanted {
        Wanted::Tag(tag) => tag,
        Wanted::Lost => "lost",
    };
    if told != wanted {
        return Err(format!("told {told}").into());
    }
    let (sql, left) = case.left;
    let found = bench.column(sql).await?;
    if found != [left] {
        return Err(format!("{sql}: {found:?}").into());
    }
    // The session goes on, with what it had prepared.
    client.send(&prepared("ins", &["y"])).await?;
    client.until(b'Z').await?;
    Ok(())
}

async fn every(crash: bool) -> Result<()> {
    let mut bench = start().await?;
    // The first time all are flushed, and looked at meanwhile.
    for _ in 0..2 {
        for case in &cases() {
            let client = log_in(&bench).await?;
            let done = one(&mut bench, client, case, crash).await;
            done.map_err(|e| format!("{}: {e}", case.id))?;
            bench.known().await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_a_broken_connection_took_is_counted() -> std::result::Result<(), Shown> {
    Ok(Box::pin(every(false)).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_a_crash_took_is_counted() -> std::result::Result<(), Shown> {
    Ok(Box::pin(every(true)).await?)
}

/// A session whose simple queries have paid for the domain that marks are bound with, where the
/// server's version needs one.
async fn seasoned(bench: &Bench) -> Result<RawClient> {
    let mut client = log_in(bench).await?;
    let needed = "select (current_setting('server_version_num')::int >= 180000)::int";
    let made = "select count(*) from pg_type where typname = '_helios_mark'";
    let needed = bench.column(needed).await?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while bench.column(made).await? != needed {
        if Instant::now() > deadline {
            return Err("there is no domain".into());
        }
        for _ in 0..50 {
            client
                .send(&query("insert into plain (v) values ('x')"))
                .await?;
            client.until(b'Z').await?;
        }
    }
    Ok(client)
}

/// What is told as done is there for everybody, behind whatever mark.
async fn is_committed(bench: &Bench, client: &mut RawClient) -> Result<()> {
    let rows = "select count(*) from plain";
    for _ in 0..2 {
        bench.direct.batch_execute(RESET).await?;
        let insert = query("insert into plain (v) values ('x')");
        client.send(&insert).await?;
        client.until(b'Z').await?;
        assert_eq!(bench.column(rows).await?, ["4"]);
    }
    Ok(())
}

async fn bound() -> Result<()> {
    let mut bench = start().await?;
    is_committed(&bench, &mut seasoned(&bench).await?).await?;
    for crash in [false, true] {
        for case in cases().iter().filter(|c| c.messages.starts_with(b"Q")) {
            let client = seasoned(&bench).await?;
            let done = one(&mut bench, client, case, crash).await;
            done.map_err(|e| format!("{}, {crash}: {e}", case.id))?;
            bench.known().await?;
        }
    }
    Ok(())
}

/// From PostgreSQL 18 on, behind a mark that was set by a Bind.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_behind_a_bound_mark_is_counted() -> std::result::Result<(), Shown> {
    Ok(Box::pin(bound()).await?)
}

/// The last message of a prepared INSERT and the mark in front of it that the server gets in front
/// of the commit.
async fn last_before_commit(bench: &Bench, client: &mut RawClient) -> Result<u8> {
    let between = bench.between.as_ref().ok_or("nobody is in between")?;
    // Bind and Execute of the mark, Bind, Describe and Execute of the client's.
    let order = Order::waiting(first(Way::ToServer, 6), 1);
    between.set(|rules| rules.cut = Some(std::sync::Arc::clone(&order)));
    client.send(&prepared("ins", &["x"])).await?;
    let seen = tokio::select! {
        () = order.hit() => order.hits().first().copied().flatten().unwrap_or_default(),
        // It was the last one of all.
        done = client.until(b'Z') => {
            done?;
            b'S'
        }
    };
    between.set(|rules| rules.cut = None);
    order.release();
    if seen != b'S' {
        client.until(b'Z').await?;
    }
    Ok(seen)
}

/// What the log can tell is not flushed, once the proxy has looked at it, and is again when the
/// table gets a trigger and another statement asks.
#[tokio::test(flavor = "multi_thread")]
async fn a_plain_statement_is_not_flushed() -> std::result::Result<(), Shown> {
    Ok(Box::pin(not_flushed()).await?)
}

async fn not_flushed() -> Result<()> {
    let bench = start().await?;
    let mut client = log_in(&bench).await?;
    client.send(&prepared("ins", &["x"])).await?;
    client.until(b'Z').await?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while last_before_commit(&bench, &mut client).await? == b'H' {
        if Instant::now() > deadline {
            return Err("the statement is flushed for good".into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// A trigger that was there when the statement ran, and is gone when its answer is looked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_was_changed_since_tells_nothing() -> std::result::Result<(), Shown> {
    Ok(Box::pin(changed_since()).await?)
}

async fn changed_since() -> Result<()> {
    let bench = start().await?;
    for change in [
        "drop trigger echo on noisy",
        "alter table plain add column w int",
        "create table elsewhere.plain (v text)",
    ] {
        let mut client = log_in(&bench).await?;
        let sql = match change.contains("echo") {
            true => "insert into noisy values ('x')",
            false => "insert into plain (v) values ('x')",
        };
        bench.direct.batch_execute(RESET).await?;
        bench
            .direct
            .batch_execute("create schema if not exists elsewhere")
            .await?;
        unanswered(&bench, &mut client, &query(sql)).await?;
        committed(&bench).await?;
        bench.direct.batch_execute(change).await?;
        if let Some(between) = &bench.between {
            between.close(Class::Session);
        }
        let told = told(&mut client)
            .await
            .map_err(|e| format!("{change}: {e}"))?;
        if told != "lost" {
            return Err(format!("{change}: told {told}").into());
        }
    }
    Ok(())
}
