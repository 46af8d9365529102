//! Every way a transaction can end, cut off at every message while the primary lives, and with a
//! crash of the server at that moment.
//!
//! One server behind a go-between. Judged by what each client received and by the rows in the
//! database: the true outcome, once.

use std::time::{Duration, Instant};

use helios_e2e::driver::Target;
use helios_e2e::raw::{
    Message, RawClient, bind, close, describe, execute, extended, frame, parse, query, sync,
};
use helios_e2e::{Result, Shown};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_testkit::frames::Unit;
use helios_testkit::interpose::{Class, Cut, Order, Way};

const SCHEMA: &str = "create table t (v text); create table ids (id serial, v text)";

/// One way to end a transaction.
struct Ending {
    id: &'static str,
    /// Run before, one exchange each.
    before: &'static [&'static str],
    /// In flight when the connection breaks.
    messages: Vec<u8>,
    /// Types of all messages that the client is to receive.
    wanted: &'static str,
    /// Rows that are left.
    rows: &'static str,
    /// An error that comes with it.
    error: Option<&'static str>,
    /// Answers of the server that have to arrive for its outcome to be known.
    needed: u64,
    /// What may come in place of `wanted`: the next transaction is told that it was lost.
    next: Option<&'static str>,
}

impl Default for Ending {
    fn default() -> Self {
        Self {
            id: "",
            before: &[],
            messages: Vec::new(),
            wanted: "CZ",
            rows: "1",
            error: None,
            needed: 0,
            next: None,
        }
    }
}

const PREPARED: &[&str] = &[
    "begin",
    "insert into t values ('x')",
    "prepare transaction 'g'",
];
const OPEN: &[&str] = &["begin", "insert into t values ('x')"];

const NOBODY: &str = "commit prepared, of no transaction";

/// Of the question for the prepared transaction.
const QUESTION: u64 = 6;

fn of_prepared() -> Vec<Ending> {
    let mut all = vec![
        Ending {
            id: "commit prepared",
            before: PREPARED,
            messages: query("commit prepared 'g'"),
            ..Ending::default()
        },
        Ending {
            id: "rollback prepared",
            before: PREPARED,
            messages: query("ROLLBACK PREPARED 'g'"),
            rows: "0",
            ..Ending::default()
        },
        Ending {
            id: "commit prepared, extended",
            before: PREPARED,
            messages: [extended("commit prepared 'g'", &[]), sync()].concat(),
            wanted: "12CZ",
            ..Ending::default()
        },
        Ending {
            id: NOBODY,
            messages: query("commit prepared 'nobody'"),
            wanted: "EZ",
            rows: "0",
            error: Some("42704"),
            ..Ending::default()
        },
    ];
    for ending in &mut all {
        // The answer of one that is cut right behind the question may be cut off with it.
        ending.needed = QUESTION + u64::from(ending.id == NOBODY);
    }
    all
}

fn of_blocks() -> Vec<Ending> {
    let closing = [close('S', "s"), sync(), query("commit")];
    vec![
        Ending {
            id: "closes in front of a commit",
            before: OPEN,
            messages: closing.concat(),
            wanted: "3ZCZ",
            ..Ending::default()
        },
        Ending {
            id: "commit and chain",
            before: OPEN,
            messages: query("commit and chain"),
            next: Some("40001"),
            ..Ending::default()
        },
    ]
}

fn by_themselves() -> Vec<Ending> {
    let insert = "insert into t values ('x')";
    let large = "insert into t select 'x' returning repeat('y', 300000)";
    let described = [
        parse("", insert),
        bind("", "", &[]),
        describe('P', ""),
        execute("", 0),
        sync(),
    ];
    vec![
        Ending {
            id: "insert",
            messages: query(insert),
            ..Ending::default()
        },
        Ending {
            id: "insert, extended",
            messages: described.concat(),
            wanted: "12nCZ",
            ..Ending::default()
        },
        Ending {
            id: "insert of an id",
            messages: query(
                "with i as (insert into ids (v) values ('x') returning id) insert into t select id from i returning v",
            ),
            wanted: "TDCZ",
            ..Ending::default()
        },
        Ending {
            id: "large result",
            messages: query(large),
            wanted: "TDCZ",
            ..Ending::default()
        },
        Ending {
            id: "behind discard",
            before: &["insert into ids (v) values ('before')", "discard all"],
            messages: query(insert),
            ..Ending::default()
        },
        Ending {
            id: "vacuum",
            messages: query("vacuum t"),
            rows: "0",
            ..Ending::default()
        },
    ]
}

/// COPY FROM STDIN, all of it sent at once: a Sync in front of the data is ignored by the server.
fn copies() -> Vec<Ending> {
    let data = [frame(b'd', b"x\n"), frame(b'c', b"")].concat();
    let began = [parse("", "copy t from stdin"), bind("", "", &[])].concat();
    let began = [began, execute("", 0), sync()].concat();
    vec![
        Ending {
            id: "copy",
            messages: [query("copy t from stdin"), data.clone()].concat(),
            wanted: "GCZ",
            ..Ending::default()
        },
        Ending {
            id: "copy, extended",
            messages: [began, data, sync()].concat(),
            wanted: "12GCZ",
            ..Ending::default()
        },
    ]
}

async fn log_in(bench: &Bench) -> Result<RawClient> {
    let target = Target::local(bench.proxy.port());
    RawClient::log_in(&target).await
}

/// Everything up to the last ReadyForQuery, without what may come at any time.
async fn replies(client: &mut RawClient, wanted: &str) -> Result<Vec<Message>> {
    let cycles = wanted.matches('Z').count();
    let mut seen: Vec<Message> = Vec::new();
    while seen.iter().filter(|m| m.tag == b'Z').count() < cycles {
        let message = client.receive().await?.ok_or("the connection was closed")?;
        if !matches!(message.tag, b'N' | b'S' | b'A') {
            seen.push(message);
        }
    }
    Ok(seen)
}

fn shown(messages: &[Message]) -> String {
    let texts = messages.iter().filter(|m| m.tag == b'E').map(|m| {
        let field = |f| m.field(f).unwrap_or_default();
        format!(" {} {}: {}", field(b'C'), field(b'M'), field(b'D'))
    });
    let tags: String = messages.iter().map(|m| char::from(m.tag)).collect();
    tags + &texts.collect::<String>()
}

/// What happens when the message is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The connection breaks, the server lives.
    Broken,
    /// `kill -9` of the server at that moment.
    Crash,
}

/// Runs an ending that is cut after so many messages; whether it was.
async fn cut(bench: &mut Bench, ending: &Ending, fault: Fault, cut: Cut) -> Result<bool> {
    bench
        .direct
        .batch_execute("set lock_timeout = '10s'; truncate t, ids")
        .await?;
    let mut client = log_in(bench).await?;
    for sql in ending.before {
        client.send(&query(sql)).await?;
        client.until(b'Z').await?;
    }
    let logins = bench.logins();
    let (way, after) = (cut.way, cut.after);
    let order = Order::new(cut, 1);
    if let Some(between) = &bench.between {
        between.set(|rules| {
            rules.cut = Some(std::sync::Arc::clone(&order));
            if fault == Fault::Crash {
                rules.refuse = vec![Class::Session, Class::Service];
            }
        });
    }
    client.send(&ending.messages).await?;
    if fault == Fault::Crash {
        bench.crash().await?;
    }
    if let Some(between) = &bench.between {
        between.set(|rules| rules.refuse = Vec::new());
    }
    let answer = replies(&mut client, ending.wanted).await?;
    if let Some(between) = &bench.between {
        between.set(|rules| rules.cut = None);
    }
    // A cut of one way takes answers of the other with it: the one about a prepared transaction,
    // and results, but only when what commits has just passed.
    let committing = matches!(order.hits().last(), Some(Some(b'S' | b'Q')));
    let results_cut = match way {
        Way::FromServer => Some(after),
        Way::ToServer if ending.needed > 0 => Some(0),
        Way::ToServer => committing.then_some(u64::MAX),
    };
    judge(bench, ending, &answer, results_cut).await?;
    goes_on(&mut client, ending).await?;
    Ok(fault == Fault::Crash || bench.logins() != logins)
}

async fn judge(
    bench: &Bench,
    ending: &Ending,
    answer: &[Message],
    results_cut: Option<u64>,
) -> Result<()> {
    let tags: String = answer.iter().map(|m| char::from(m.tag)).collect();
    let state = answer.iter().find_map(Message::sqlstate);
    let as_wanted = tags == ending.wanted && state.as_deref() == ending.error;
    // The go-between has thrown the result away, behind the commit: the truth is all there is.
    let told = "the statement was committed, but its result was lost";
    let is_told = |m: &Message| m.field(b'M').is_some_and(|text| text.starts_with(told));
    let in_doubt = state.as_deref() == Some("08007") && results_cut.is_some();
    if in_doubt && results_cut < Some(ending.needed) {
        for gid in bench.column("select gid from pg_prepared_xacts").await? {
            let end = format!("rollback prepared '{gid}'");
            bench.direct.batch_execute(&end).await?;
        }
        return Ok(());
    }
    let lost = in_doubt && answer.iter().any(is_told);
    if !as_wanted && !lost {
        return Err(format!("received {}", shown(answer)).into());
    }
    let rows = bench.column("select count(*) from t").await?;
    if rows != [ending.rows] {
        return Err(format!("{rows:?} rows are in the table").into());
    }
    // What the client was given is what is there.
    let given = answer.iter().find(|m| m.tag == b'D' && m.body.len() < 100);
    if let Some(given) = given.filter(|_| ending.id == "insert of an id") {
        let there = bench.column("select v from t").await?;
        let given = String::from_utf8_lossy(given.body.get(6..).unwrap_or_default()).into_owned();
        if there != [given.as_str()] {
            return Err(format!("given {given}, there is {there:?}").into());
        }
    }
    let left = bench.column("select gid from pg_prepared_xacts").await?;
    if !left.is_empty() {
        return Err(format!("{left:?} is still prepared").into());
    }
    Ok(())
}

/// The session lives on.
async fn goes_on(client: &mut RawClient, ending: &Ending) -> Result<()> {
    client.send(&query("select 1")).await?;
    let after = replies(client, "Z").await?;
    let state = after.iter().find_map(Message::sqlstate);
    if state.is_some() && state.as_deref() != ending.next {
        return Err(format!("afterwards {}", shown(&after)).into());
    }
    client.send(&query("rollback")).await?;
    client.until(b'Z').await.map(drop)
}

async fn at_each_message(endings: Vec<Ending>) -> Result<()> {
    let mut bench = start().await?;
    for ending in &endings {
        for way in [Way::ToServer, Way::FromServer] {
            for after in 0..40 {
                let order = Cut {
                    way,
                    unit: Unit::Messages,
                    after,
                };
                let done = cut(&mut bench, ending, Fault::Broken, order).await;
                if !done.map_err(|e| format!("{}, {way:?} {after}: {e}", ending.id))? {
                    break;
                }
            }
        }
    }
    Ok(())
}

async fn with_crashes(endings: Vec<Ending>) -> Result<()> {
    let mut bench = start().await?;
    for ending in &endings {
        for (way, after) in [
            (Way::ToServer, 2),
            (Way::FromServer, 0),
            (Way::FromServer, 3),
        ] {
            let order = Cut {
                way,
                unit: Unit::Messages,
                after,
            };
            let done = cut(&mut bench, ending, Fault::Crash, order).await;
            done.map_err(|e| format!("{}, {way:?} {after}: {e}", ending.id))?;
            bench.known().await?;
        }
    }
    Ok(())
}

async fn start() -> Result<Bench> {
    let mut bench = Bench::start(EngineOptions::default(), SCHEMA).await?;
    bench.interpose()?;
    bench.known().await?;
    Ok(bench)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_commits_by_itself_is_cut_at_each_message() -> std::result::Result<(), Shown> {
    Ok(Box::pin(at_each_message(by_themselves())).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_are_cut_at_each_message() -> std::result::Result<(), Shown> {
    Ok(Box::pin(at_each_message(copies())).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_of_prepared_transactions_are_cut_at_each_message() -> std::result::Result<(), Shown> {
    Ok(Box::pin(at_each_message(of_prepared())).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_of_blocks_are_cut_at_each_message() -> std::result::Result<(), Shown> {
    Ok(Box::pin(at_each_message(of_blocks())).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_them_meet_a_crash() -> std::result::Result<(), Shown> {
    let all = by_themselves()
        .into_iter()
        .chain(copies())
        .chain(of_prepared())
        .chain(of_blocks());
    Ok(Box::pin(with_crashes(all.collect())).await?)
}

/// The log that holds a statement's mark is recycled while the statement runs, which then breaks in
/// its middle, or behind its commit.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_recycled_under_a_long_statement() -> std::result::Result<(), Shown> {
    Ok(Box::pin(recycled()).await?)
}

/// Who waits for the advisory lock.
const WAITS: &str = "select pid from pg_stat_activity where wait_event = 'advisory'";

/// The old backend would commit when it gets its lock: it is ended first.
async fn ended(bench: &Bench, old: &[String]) -> Result<()> {
    assert_eq!(old.len(), 1, "{old:?} wait");
    let deadline = Instant::now() + Duration::from_secs(30);
    while bench.column(WAITS).await? == old {
        assert!(Instant::now() < deadline, "the old backend is not ended");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

async fn recycled() -> Result<()> {
    let asked = "select count(*) from pg_stat_activity where usename = 'helios' \
                 and query like '%pg_logical_emit_message(true%'";
    let oldest = "select min(name) from pg_ls_waldir() where name like '0%'";
    for behind_commit in [false, true] {
        let bench = start().await?;
        let keep = "alter system set wal_keep_size = 0";
        bench.direct.batch_execute(keep).await?;
        bench.column("select pg_reload_conf()").await?;
        let mut client = log_in(&bench).await?;
        // Close, Parse, Bind, Execute of the mark; five for the statement; not ReadyForQuery.
        let cut = Cut {
            way: Way::FromServer,
            unit: Unit::Messages,
            after: 9,
        };
        if let Some(between) = bench.between.as_ref().filter(|_| behind_commit) {
            between.set(|rules| rules.cut = Some(Order::new(cut, 1)));
        }
        let before = bench.column(oldest).await?;
        let sql = "insert into t select 'x' from pg_advisory_xact_lock(7)";
        bench
            .direct
            .batch_execute("select pg_advisory_lock(7)")
            .await?;
        client.send(&query(sql)).await?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while bench.column(asked).await? != ["1"] {
            assert!(Instant::now() < deadline, "nobody asks for its id");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut rounds = 0;
        while bench.column(oldest).await? == before {
            let recycle = "create table r (); drop table r; select pg_switch_wal(); checkpoint";
            bench.direct.simple_query(recycle).await?;
            rounds += 1;
            assert!(rounds < 20, "the log is not recycled");
        }
        if let Some(between) = bench.between.as_ref().filter(|_| !behind_commit) {
            let old = bench.column(WAITS).await?;
            between.close(Class::Session);
            ended(&bench, &old).await?;
        }
        bench
            .direct
            .batch_execute("select pg_advisory_unlock(7)")
            .await?;
        let answer = replies(&mut client, "Z").await?;
        let rows = bench.column("select count(*) from t").await?;
        let tags: String = answer.iter().map(|m| char::from(m.tag)).collect();
        if tags != "CZ" || rows != ["1"] {
            let told = shown(&answer);
            return Err(format!("behind the commit: {behind_commit}: {told}, {rows:?}").into());
        }
    }
    Ok(())
}
