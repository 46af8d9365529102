//! Several statements in one query, CALL and DO outside a transaction block, cut off at every
//! message while the primary lives, by a crash, and in their middle.
//!
//! One server behind a go-between. Judged by what each client received, next to what PostgreSQL
//! alone answers, and by the rows in the database.

use std::time::{Duration, Instant};

use helios_e2e::driver::Target;
use helios_e2e::raw::{
    Message, RawClient, bind, describe, execute, extended, frame, parse, query, sync,
};
use helios_e2e::{Result, Shown};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_testkit::frames::Unit;
use helios_testkit::interpose::{Class, Cut, Order, Way};

const SCHEMA: &str = "
    create table t (v int);
    create procedure whole(inout a int) language plpgsql as $$begin
      insert into t values (1); insert into t values (2); a := a + 1; end$$;
    create procedure parts() language plpgsql as $$begin
      for i in 1..3 loop insert into t values (i); commit; end loop; end$$;
    create procedure nested() language plpgsql as $$begin call parts(); end$$;
    create procedure waits(at int) language plpgsql as $$begin
      for i in 1..3 loop
        if i = at then perform pg_advisory_xact_lock(7); end if;
        insert into t values (i); commit;
      end loop; end$$;
    create procedure waits_whole() language plpgsql set search_path = public as $$begin
      insert into t values (1); perform pg_advisory_xact_lock(7); insert into t values (2); end$$;
    create procedure goes_back() language plpgsql as $$begin
      insert into t values (1); rollback;
      perform pg_advisory_xact_lock(7); insert into t values (2); end$$";

/// Its result was lost behind its commit: all of it is there.
const LOST: [&str; 2] = [
    "the statement was committed, but its result was lost",
    "the statements were committed, but their results were lost",
];
/// Something of it is there, and more may be.
const FIRST: &str = "the first transaction of the request was committed";
const UNKNOWN: &str = "the outcome of the transaction is unknown";

/// A request.
struct Form {
    id: &'static str,
    messages: Vec<u8>,
    /// Rows behind each of its transactions; the last of them behind the whole.
    rows: &'static [&'static str],
    /// It ends transactions in a way that leaves nobody who knows.
    in_doubt: bool,
}

impl Form {
    /// A procedure or a block that may commit on its way.
    fn may_commit(&self) -> bool {
        let query = String::from_utf8_lossy(&self.messages);
        query.contains("call ") || (query.contains("do $$") && query.contains("commit"))
    }
}

/// From PostgreSQL 18 on nothing that may commit on its way can have a mark in front.
async fn marks_calls(bench: &Bench) -> Result<bool> {
    let version = bench.column("show server_version_num").await?;
    Ok(version[0].parse::<u32>()? < 180_000)
}

fn form(id: &'static str, rows: &'static [&'static str]) -> Form {
    Form {
        id,
        messages: query(id),
        rows,
        in_doubt: false,
    }
}

fn in_doubt(id: &'static str, rows: &'static [&'static str]) -> Form {
    Form {
        in_doubt: true,
        ..form(id, rows)
    }
}

fn messages(id: &'static str, messages: &[Vec<u8>], rows: &'static [&'static str]) -> Form {
    Form {
        messages: messages.concat(),
        ..form(id, rows)
    }
}

fn scripts() -> Vec<Form> {
    let copy = [
        query("insert into t values (1); copy t from stdin; insert into t values (3)"),
        frame(b'd', b"2\n"),
        frame(b'c', b""),
    ];
    vec![
        form(
            "insert into t values (1); insert into t values (2)",
            &["1,2"],
        ),
        form(
            "insert into t values (1); select v, ';' from t; insert into t values (2) returning v",
            &["1,2"],
        ),
        form(
            "insert into t values (1) returning repeat('x', 20000); insert into t values (2)",
            &["1,2"],
        ),
        form(
            "begin; insert into t values (1); savepoint s; insert into t values (8); \
             rollback to s; insert into t values (2); commit",
            &["1,2"],
        ),
        form("begin; insert into t values (1); rollback", &[""]),
        form("insert into t values (1); select 1 / 0", &[""]),
        form("set a.b = 'x'; insert into t values (1); vacuum t", &[""]),
        form("set search_path = public; insert into t values (1)", &["1"]),
        form(
            "insert into t values (1); commit; insert into t values (2); insert into t values (3)",
            &["1", "1,2,3"],
        ),
        in_doubt(
            "insert into t values (1); rollback; insert into t values (2)",
            &["2"],
        ),
        in_doubt(
            "begin isolation level serializable; insert into t values (1); commit",
            &["1"],
        ),
        messages("copy between statements", &copy, &["1,2,3"]),
    ]
}

fn calls() -> Vec<Form> {
    let described = |sql: &str| {
        let all = [
            parse("", sql),
            bind("", "", &[]),
            describe('P', ""),
            execute("", 0),
            sync(),
        ];
        all.concat()
    };
    vec![
        form("call whole(3)", &["1,2"]),
        messages("whole, extended", &[described("call whole(3)")], &["1,2"]),
        form("call parts()", &["1", "1,2", "1,2,3"]),
        messages(
            "parts, extended",
            &[extended("call parts()", &[]), sync()],
            &["1", "1,2", "1,2,3"],
        ),
        in_doubt("call nested()", &["1", "1,2", "1,2,3"]),
        form(
            "do $$begin insert into t values (1); raise notice 'x'; insert into t values (2); end$$",
            &["1,2"],
        ),
        form(
            "do $$begin for i in 1..3 loop insert into t values (i); commit; end loop; end$$",
            &["1", "1,2", "1,2,3"],
        ),
        in_doubt(
            "do $$begin insert into t values (1); rollback; insert into t values (2); commit; \
             insert into t values (3); end$$",
            &["2", "2,3"],
        ),
        form(
            "do $$begin insert into t values (1); perform 1 / 0; end$$",
            &[""],
        ),
    ]
}

async fn log_in(port: u16) -> Result<RawClient> {
    let target = Target::local(port);
    RawClient::log_in(&target).await
}

/// Everything up to ReadyForQuery.
async fn replies(client: &mut RawClient) -> Result<Vec<Message>> {
    let mut seen: Vec<Message> = Vec::new();
    while seen.last().is_none_or(|m| m.tag != b'Z') {
        seen.push(client.receive().await?.ok_or("the connection was closed")?);
    }
    Ok(seen)
}

/// Without notices, which a second run repeats.
fn quiet(messages: &[Message]) -> Vec<(u8, &[u8])> {
    let all = messages.iter().map(|m| (m.tag, m.body.as_slice()));
    all.filter(|(tag, _)| !matches!(tag, b'N' | b'S' | b'A'))
        .collect()
}

fn shown(messages: &[Message]) -> String {
    let one = |m: &Message| match m.tag {
        b'E' => format!(
            "E {:?} {:?} {:?}",
            m.sqlstate(),
            m.field(b'M'),
            m.field(b'D')
        ),
        tag => char::from(tag).to_string(),
    };
    messages.iter().map(one).collect::<Vec<_>>().join(" ")
}

async fn rows(bench: &Bench) -> Result<String> {
    let sql = "select coalesce(string_agg(v::text, ',' order by ctid), '') from t";
    let all = bench.column(sql).await?;
    Ok(all.into_iter().next().unwrap_or_default())
}

async fn reset(bench: &Bench) -> Result<()> {
    let sql = "set lock_timeout = '10s'; truncate t";
    Ok(bench.direct.batch_execute(sql).await?)
}

/// What PostgreSQL alone answers, and what it leaves.
async fn alone(bench: &Bench, form: &Form) -> Result<Vec<Message>> {
    reset(bench).await?;
    let mut client = log_in(bench.server.port()).await?;
    client.send(&form.messages).await?;
    let answer = replies(&mut client).await?;
    if Some(&rows(bench).await?.as_str()) != form.rows.last() {
        return Err(format!("{}: PostgreSQL alone leaves something else", form.id).into());
    }
    Ok(answer)
}

/// Whether what the client was told is true.
async fn judge(bench: &Bench, form: &Form, alone: &[Message], answer: &[Message]) -> Result<()> {
    let there = rows(bench).await?;
    let told = answer.iter().find(|m| m.tag == b'E');
    let told = told.and_then(|m| m.field(b'M')).unwrap_or_default();
    let all = form.rows.last() == Some(&there.as_str());
    let fine = if quiet(answer) == quiet(alone) {
        all
    } else if LOST.iter().any(|text| told.starts_with(text)) {
        all && form.rows.len() == 1
    } else if told.starts_with(FIRST) {
        form.rows.len() > 1 && form.rows.contains(&there.as_str())
    } else {
        let some = there.is_empty() || form.rows.contains(&there.as_str());
        let in_doubt = form.in_doubt || (form.may_commit() && !marks_calls(bench).await?);
        in_doubt && told.starts_with(UNKNOWN) && some
    };
    match fine {
        true => Ok(()),
        false => Err(format!("received {}, there is {there:?}", shown(answer)).into()),
    }
}

async fn goes_on(client: &mut RawClient) -> Result<()> {
    for _ in 0..2 {
        client.send(&query("select 1")).await?;
        let after = replies(client).await?;
        let state = after.iter().find_map(Message::sqlstate);
        // What a lost result has changed in the session is told once.
        if state.is_some_and(|state| state != "40001") {
            return Err(format!("afterwards {}", shown(&after)).into());
        }
    }
    client.send(&query("select 1")).await?;
    client.until(b'Z').await.map(drop)
}

/// Cuts a request after so many messages, or crashes the server there; whether it was cut.
async fn cut(bench: &mut Bench, form: &Form, crash: bool, cut: Cut) -> Result<bool> {
    let alone = alone(bench, form).await?;
    reset(bench).await?;
    let mut client = log_in(bench.proxy.port()).await?;
    let logins = bench.logins();
    let order = Order::new(cut, 1);
    if let Some(between) = &bench.between {
        between.set(|rules| {
            rules.cut = Some(std::sync::Arc::clone(&order));
            if crash {
                rules.refuse = vec![Class::Session, Class::Service];
            }
        });
    }
    client.send(&form.messages).await?;
    if crash {
        bench.crash().await?;
    }
    if let Some(between) = &bench.between {
        between.set(|rules| rules.refuse = Vec::new());
    }
    let answer = replies(&mut client).await?;
    if let Some(between) = &bench.between {
        between.set(|rules| rules.cut = None);
    }
    judge(bench, form, &alone, &answer).await?;
    goes_on(&mut client).await?;
    Ok(crash || bench.logins() != logins)
}

async fn start() -> Result<Bench> {
    let mut bench = Bench::start(EngineOptions::default(), SCHEMA).await?;
    // Many crashes, and a checkpoint behind each: the log must last.
    let keep = "alter system set wal_keep_size = '1GB'";
    bench.direct.batch_execute(keep).await?;
    bench.column("select pg_reload_conf()").await?;
    bench.interpose()?;
    bench.known().await?;
    Ok(bench)
}

fn order(way: Way, after: u64) -> Cut {
    Cut {
        way,
        unit: Unit::Messages,
        after,
    }
}

async fn at_each_message(forms: Vec<Form>) -> Result<()> {
    let mut bench = start().await?;
    for form in &forms {
        for way in [Way::ToServer, Way::FromServer] {
            for after in 0..40 {
                let done = cut(&mut bench, form, false, order(way, after)).await;
                if !done.map_err(|e| format!("{}, {way:?} {after}: {e}", form.id))? {
                    break;
                }
            }
        }
    }
    Ok(())
}

async fn with_crashes(forms: Vec<Form>) -> Result<()> {
    let mut bench = start().await?;
    for form in &forms {
        for (way, after) in [(Way::ToServer, 5), (Way::FromServer, 5)] {
            let done = cut(&mut bench, form, true, order(way, after)).await;
            done.map_err(|e| format!("{}, {way:?} {after}: {e}", form.id))?;
            bench.known().await?;
        }
    }
    Ok(())
}

/// Broken, or crashed, while it waits in its middle.
async fn in_the_middle(crash: bool) -> Result<()> {
    let mut bench = start().await?;
    let doubt = Some((UNKNOWN, ""));
    let wait = "select pg_advisory_xact_lock(7)";
    let insert = |v: i32| format!("insert into t values ({v})");
    let (one, two) = (insert(1), insert(2));
    let block = |body: &str| format!("do $$begin {body}; end$$").replace("select pg", "perform pg");
    let cases = [
        (format!("{one}; {wait}; {two}"), "1,2", None),
        (format!("begin; {one}; {wait}; {two}; commit"), "1,2", None),
        (format!("{one}; {wait}; commit; {two}"), "1,2", None),
        (
            format!("{one}; commit; {two}; {wait}"),
            "",
            Some((FIRST, "1")),
        ),
        (format!("{one}; rollback; {wait}; {two}"), "", doubt),
        ("call waits(1)".to_owned(), "1,2,3", None),
        ("call waits(2)".to_owned(), "", Some((FIRST, "1"))),
        ("call waits(3)".to_owned(), "", Some((FIRST, "1,2"))),
        ("call waits_whole()".to_owned(), "1,2", None),
        ("call goes_back()".to_owned(), "", doubt),
        (block(&format!("{one}; {wait}; {two}")), "1,2", None),
        (block(&format!("{one}; {wait}; commit; {two}")), "1,2", None),
        (
            block(&format!("{one}; commit; {wait}; {two}")),
            "",
            Some((FIRST, "1")),
        ),
        (block(&format!("{one}; rollback; {wait}; {two}")), "", doubt),
    ];
    let marks_calls = marks_calls(&bench).await?;
    for (sql, whole, told) in cases {
        let ends = sql.contains("commit") || sql.contains("rollback");
        if !marks_calls && (sql.contains("call") || (sql.contains("do $$") && ends)) {
            continue;
        }
        reset(&bench).await?;
        let lock = "select pg_advisory_lock(7)";
        bench.direct.batch_execute(lock).await?;
        let mut client = log_in(bench.proxy.port()).await?;
        client.send(&query(&sql)).await?;
        let pid = waits(&bench).await?;
        if crash {
            bench.crash().await?;
        } else {
            if let Some(between) = &bench.between {
                between.close(Class::Session);
            }
            // Not before it is gone: it would go on.
            let there = format!("select count(*) from pg_stat_activity where pid = {pid}");
            poll(&bench, &there, "0").await?;
            let unlock = "select pg_advisory_unlock(7)";
            bench.direct.batch_execute(unlock).await?;
        }
        let answer = replies(&mut client).await?;
        let error = answer.iter().find(|m| m.tag == b'E');
        let text = error.and_then(|m| m.field(b'M')).unwrap_or_default();
        let there = rows(&bench).await?;
        let fine = match told {
            None => error.is_none() && there == whole,
            Some((want, left)) => text.starts_with(want) && there == left,
        };
        if !fine {
            return Err(format!("{sql}: {}, there is {there:?}", shown(&answer)).into());
        }
        goes_on(&mut client).await?;
        bench.known().await?;
    }
    Ok(())
}

/// Waits until somebody waits for the lock; who.
async fn waits(bench: &Bench) -> Result<String> {
    let waiters = "from pg_locks where locktype = 'advisory' and not granted";
    poll(bench, &format!("select count(*) {waiters}"), "1").await?;
    let pid = bench.column(&format!("select pid {waiters}")).await?;
    Ok(pid.into_iter().next().unwrap_or_default())
}

async fn poll(bench: &Bench, sql: &str, until: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while bench.column(sql).await? != [until] {
        assert!(Instant::now() < deadline, "never {until}: {sql}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Answers through the proxy, byte by byte, and what is left, as of PostgreSQL alone.
async fn without_a_failure() -> Result<()> {
    let bench = start().await?;
    let more = [
        form("begin; insert into t values (1)", &[""]),
        form("vacuum t; insert into t values (1)", &[""]),
        form("set transaction read only; insert into t values (1)", &[""]),
        form(
            "set local a.b = 'x'; insert into t values (1); show a.b",
            &["1"],
        ),
        form("insert into t values (1); discard all", &[""]),
        form("insert into t values (1); savepoint s", &[""]),
        form("commit; insert into t values (1)", &["1"]),
        form(
            "insert into t values (1); commit and chain; select 1",
            &[""],
        ),
        form("lock t; insert into t values (1)", &["1"]),
        form("insert into t values (1);; -- ; '\n", &["1"]),
        form("insert into t select length(';')", &["1"]),
        form(
            "insert into t values (1); prepare p as select 1; execute p; deallocate p",
            &["1"],
        ),
        form("insert into t values (1); deallocate all; select 1", &["1"]),
        form("insert into t values (1); no sql", &[""]),
        form("do $$begin execute 'ca' || 'll parts()'; end$$", &[""]),
        form("call nobody()", &[""]),
        form("begin; call parts(); commit", &[""]),
        form(
            "create procedure x() begin atomic select 1; select 2; end; drop procedure x",
            &[""],
        ),
    ];
    for form in scripts().iter().chain(&calls()).chain(&more) {
        let want = alone(&bench, form).await?;
        let mut client = log_in(bench.proxy.port()).await?;
        // Twice: the mark's statement is there already the second time.
        for _ in 0..2 {
            reset(&bench).await?;
            client.send(&form.messages).await?;
            let got = replies(&mut client).await?;
            let there = rows(&bench).await?;
            let same = |m: &&Message| !matches!(m.tag, b'S');
            let same = got
                .iter()
                .filter(same)
                .map(|m| (m.tag, &m.body))
                .eq(want.iter().filter(same).map(|m| (m.tag, &m.body)));
            if !same || Some(&there.as_str()) != form.rows.last() {
                let told = (shown(&got), shown(&want));
                return Err(format!("{}: {told:?}, there is {there:?}", form.id).into());
            }
            client.send(&query("rollback")).await?;
            replies(&mut client).await?;
        }
    }
    Ok(())
}

/// The result of the first is lost behind its commit; what is behind it has not committed.
async fn pipelined() -> Result<()> {
    let bench = start().await?;
    let mut client = log_in(bench.proxy.port()).await?;
    client.send(&query("select pg_backend_pid()")).await?;
    let pid = client.until(b'Z').await?;
    let row = pid.iter().find(|m| m.tag == b'D').ok_or("no row")?;
    let pid = String::from_utf8_lossy(&row.body[6..]).into_owned();
    let lock = "select pg_advisory_lock(7)";
    bench.direct.batch_execute(lock).await?;
    // Close, Parse, Bind and Execute of the mark; the rest comes behind the commit.
    let order = Order::new(order(Way::FromServer, 4), 1);
    if let Some(between) = &bench.between {
        between.set(|rules| rules.cut = Some(std::sync::Arc::clone(&order)));
    }
    let requests = [
        query("insert into t values (1); insert into t values (2)"),
        query("insert into t select 3 from pg_advisory_xact_lock(7)"),
    ];
    client.send(&requests.concat()).await?;
    let there = format!("select count(*) from pg_stat_activity where pid = {pid}");
    poll(&bench, &there, "0").await?;
    let unlock = "select pg_advisory_unlock(7)";
    bench.direct.batch_execute(unlock).await?;
    let (first, second) = (replies(&mut client).await?, replies(&mut client).await?);
    let told = first.iter().find_map(|m| m.field(b'M')).unwrap_or_default();
    let there = rows(&bench).await?;
    let through = second.iter().all(|m| m.tag != b'E');
    if order.hits().is_empty() || !told.starts_with(LOST[1]) || !through || there != "1,2,3" {
        let told = (shown(&first), shown(&second));
        return Err(format!("{told:?}, there is {there:?}").into());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_behind_a_lost_result_has_its_own_outcome() -> std::result::Result<(), Shown> {
    Ok(Box::pin(pipelined()).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_are_cut_at_each_message() -> std::result::Result<(), Shown> {
    Ok(Box::pin(at_each_message(scripts())).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_cut_at_each_message() -> std::result::Result<(), Shown> {
    Ok(Box::pin(at_each_message(calls())).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_them_meet_a_crash() -> std::result::Result<(), Shown> {
    let all = scripts().into_iter().chain(calls());
    Ok(Box::pin(with_crashes(all.collect())).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn they_are_cut_off_in_their_middle() -> std::result::Result<(), Shown> {
    Ok(Box::pin(in_the_middle(false)).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_crashes_in_their_middle() -> std::result::Result<(), Shown> {
    Ok(Box::pin(in_the_middle(true)).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_failure_nothing_is_different() -> std::result::Result<(), Shown> {
    Ok(Box::pin(without_a_failure()).await?)
}
