//! Bugs of other proxies, tried on ours. Each test has the name of the bug that it is about.

use std::time::Duration;

use helios_e2e::{Result, Shown};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_testkit::interpose::Class;
use tokio_postgres::{Client, SimpleQueryMessage};

async fn bench(schema: &str) -> Result<Bench> {
    let bench = Bench::start(EngineOptions::default(), schema).await?;
    bench.known().await?;
    Ok(bench)
}

fn code(error: &tokio_postgres::Error) -> String {
    match error.code() {
        Some(code) => code.code().to_owned(),
        None => format!("closed: {error}"),
    }
}

async fn first(client: &Client, sql: &str) -> Result<String> {
    let messages = client.simple_query(sql).await?;
    let value = messages.iter().find_map(|m| match m {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("null").to_owned()),
        _ => None,
    });
    Ok(value.ok_or("no row")?)
}

fn must(holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(what().into()) }
}

macro_rules! bugs {
    ($($(#[$doc:meta])* $test:ident: $body:ident;)*) => {
        $(
            $(#[$doc])*
            #[tokio::test(flavor = "multi_thread")]
            async fn $test() -> std::result::Result<(), Shown> {
                Ok($body().await?)
            }
        )*
    };
}

bugs! {
    /// Autocommit writes while the server restarts: the table holds what the clients were told,
    /// once, and nobody is told that it may or may not be there.
    maxscale_mxs_5258_and_5041_autocommit_write_is_not_executed_twice: never_twice;
    /// Replays that overlap: a move begins while the one before still replays. Nothing of the
    /// first runs outside the transaction.
    maxscale_mxs_5355_overlapping_replays_run_nothing_outside_the_transaction: overlapping;
    /// The server fails again in the middle of a switchover.
    maxscale_mxs_5359_second_failure_during_a_switchover_does_not_stall: second_failure;
    /// A primary that turns read-only is no primary: clients wait for one, and none is told 25006
    /// by a server in recovery, nor stays there.
    maxscale_mxs_5268_and_pgbouncer_1311_read_only_errors_do_not_leak: read_only;
    /// What a client sends while its transaction is replayed comes behind the replay.
    maxscale_mxs_2419_next_query_is_not_mixed_into_the_replay: not_mixed;
    /// After a replay that failed nothing runs before the client has heard of it.
    maxscale_mxs_2587_nothing_is_routed_after_a_failed_replay: after_a_failed_replay;
    /// An administrator's kill ends the session for good.
    maxscale_mxs_5023_administrators_kill_does_not_resurrect_the_session: no_resurrection;
    /// Journals of all kinds of transactions give all their memory back.
    maxscale_mxs_4656_and_4586_journal_memory_is_accounted_right: memory;
    /// A SET inside the transaction is part of it; statements are prepared under the session's
    /// search_path.
    cockroach_173334_set_in_transaction_and_search_path_are_restored_in_order: order_of_state;
    /// Names of ours cannot be taken over by objects on a session's search_path.
    cve_2026_55769_search_path_does_not_redirect_our_own_queries: own_names;
    /// After the move every connection works at once.
    pgdog_1318_no_dead_connection_is_handed_out_after_the_move: no_dead_connection;
}

async fn never_twice() -> Result<()> {
    const CLIENTS: usize = 6;
    let mut bench = bench("create table t (client int, n int)").await?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut writers = Vec::new();
    for client in 0..CLIENTS {
        let connection = bench.client().await?;
        let stopped = stopped.clone();
        writers.push(tokio::spawn(async move {
            let mut told = Vec::new();
            let mut n = 0;
            while !*stopped.borrow() {
                let sql = format!("insert into t values ({client}, {n})");
                match connection.batch_execute(&sql).await {
                    Ok(()) => told.push(n),
                    // Its tag may have died with the server; that it has committed is certain.
                    Err(error) if is_committed(&error) => told.push(n),
                    Err(error) => return Err(said(&error)),
                }
                n += 1;
            }
            Ok(told)
        }));
    }
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        bench.crash().await?;
    }
    tokio::time::sleep(Duration::from_millis(150)).await;
    stop.send(true)?;
    for (client, writer) in writers.into_iter().enumerate() {
        let told = writer.await??;
        let sql = format!("select n from t where client = {client} order by n");
        let rows: Vec<i32> = bench
            .column(&sql)
            .await?
            .iter()
            .flat_map(|n| n.parse())
            .collect();
        let mut once = rows.clone();
        once.dedup();
        must(once == rows, || {
            format!("something was executed twice: {rows:?}")
        })?;
        must(told.iter().all(|n| rows.contains(n)), || {
            "an acknowledged write is lost".into()
        })?;
        must(rows.iter().all(|n| told.contains(n)), || {
            "a write is there that nobody was told of".into()
        })?;
        must(!told.is_empty(), || "nothing was written".into())?;
    }
    Ok(())
}

/// 08007 that says that the statement has committed.
fn is_committed(error: &tokio_postgres::Error) -> bool {
    let says = |e: &tokio_postgres::error::DbError| {
        e.code().code() == "08007" && e.message().starts_with("the statement was committed")
    };
    error.as_db_error().is_some_and(says)
}

fn said(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(
        || error.to_string(),
        |e| format!("{}: {e}", e.code().code()),
    )
}

async fn overlapping() -> Result<()> {
    let mut bench = bench("create table t (id int primary key)").await?;
    bench.interpose()?;
    let client = bench.client().await?;
    client
        .batch_execute("begin; insert into t values (1)")
        .await?;
    client.batch_execute("insert into t values (2)").await?;
    if let Some(between) = &bench.between {
        between.set(|rules| rules.delay = Duration::from_millis(5));
    }
    let mut moves = Vec::new();
    for _ in 0..4 {
        let (proxy, next) = (bench.proxy.clone(), bench.next_topology()?);
        moves.push(tokio::spawn(async move { proxy.resume(next).await }));
        tokio::time::sleep(Duration::from_millis(15)).await;
        if let Some(between) = &bench.between {
            between.close(Class::Session);
        }
    }
    for ended in moves {
        ended.await??;
    }
    if let Some(between) = &bench.between {
        between.set(|rules| rules.delay = Duration::ZERO);
    }
    let rows = first(&client, "select count(*) from t").await?;
    must(rows == "2", || format!("{rows} rows in the transaction"))?;
    let outside = bench.column("select count(*) from t").await?;
    must(outside == ["0"], || {
        format!("{outside:?} rows outside the transaction")
    })?;
    client.batch_execute("rollback").await?;
    let outside = bench.column("select count(*) from t").await?;
    must(outside == ["0"], || {
        format!("{outside:?} rows outside the transaction")
    })
}

async fn second_failure() -> Result<()> {
    let mut bench = bench("create table t (id int primary key)").await?;
    bench.interpose()?;
    let client = bench.client().await?;
    client
        .batch_execute("begin; insert into t values (1)")
        .await?;
    if let Some(between) = &bench.between {
        between.set(|rules| rules.refuse = vec![Class::Session]);
    }
    bench.drain().await?;
    let proxy = bench.proxy.clone();
    let next = bench.next_topology()?;
    let resume = tokio::spawn(async move { proxy.resume(next).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    bench.crash().await?;
    if let Some(between) = &bench.between {
        between.set(|rules| rules.refuse = Vec::new());
    }
    resume.await??;
    client.batch_execute("insert into t values (2)").await?;
    client.batch_execute("commit").await?;
    let rows = bench.column("select id from t order by id").await?;
    must(rows == ["1", "2"], || format!("{rows:?}"))
}

async fn read_only() -> Result<()> {
    let mut bench = bench("create table t (id int primary key)").await?;
    let client = bench.client().await?;
    client
        .batch_execute("begin; insert into t values (1)")
        .await?;
    // The server comes back as a standby of nobody, and is promoted a little later.
    bench.server.crash();
    let signal = bench.server.data_dir().join("standby.signal");
    std::fs::write(&signal, "")?;
    bench.server.boot().await?;
    let (old, new) = (
        client.batch_execute("insert into t values (2)"),
        bench.client(),
    );
    let promote = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let direct = bench.server.connect().await?;
        direct.query_one("select pg_promote()", &[]).await?;
        Ok::<_, tokio_postgres::Error>(direct)
    };
    let (old, new, direct) = tokio::join!(old, new, promote);
    old?;
    client.batch_execute("commit").await?;
    new?.batch_execute("insert into t values (3)").await?;
    bench.direct = direct?;
    let rows = bench.column("select id from t order by id").await?;
    must(rows == ["1", "2", "3"], || format!("{rows:?}"))
}

async fn not_mixed() -> Result<()> {
    let mut bench = bench("create table t (n serial, what text)").await?;
    bench.interpose()?;
    let client = bench.client().await?;
    client.batch_execute("begin").await?;
    for n in 0..20 {
        client
            .batch_execute(&format!("insert into t (what) values ('before {n}')"))
            .await?;
    }
    if let Some(between) = &bench.between {
        between.set(|rules| rules.delay = Duration::from_millis(5));
    }
    let (proxy, next) = (bench.proxy.clone(), bench.next_topology()?);
    let resume = tokio::spawn(async move { proxy.resume(next).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    // All at once, while the replay is under way.
    let sql = [
        "insert into t (what) values ('after 0')",
        "insert into t (what) values ('after 1')",
        "commit",
    ];
    let sent = futures_util::future::try_join_all(sql.map(|sql| client.batch_execute(sql)));
    sent.await?;
    resume.await??;
    let rows = bench.column("select what from t order by n").await?;
    let wanted: Vec<String> = (0..20).map(|n| format!("before {n}")).collect();
    let after = ["after 0".to_owned(), "after 1".to_owned()];
    must(rows == [wanted, after.to_vec()].concat(), || {
        format!("{rows:?}")
    })
}

async fn after_a_failed_replay() -> Result<()> {
    let mut bench = bench("create table t (id int primary key, u uuid)").await?;
    let client = bench.client().await?;
    client.batch_execute("begin").await?;
    let random = "insert into t values (1, gen_random_uuid()) returning u";
    client.simple_query(random).await?;
    bench.switchover().await?;
    // Pipelined: the error is on its way to the client when the rest arrives.
    let sql = [
        "insert into t values (2)",
        "insert into t values (3)",
        "commit",
        "select 42",
    ];
    let answers = futures_util::future::join_all(sql.map(|sql| client.batch_execute(sql))).await;
    let codes: Vec<String> = answers
        .iter()
        .map(|a| a.as_ref().map_or_else(code, |()| "ok".to_owned()))
        .collect();
    must(codes == ["40001", "25P02", "ok", "ok"], || {
        format!("{codes:?}")
    })?;
    let rows = bench.column("select count(*) from t").await?;
    must(rows == ["0"], || {
        format!("{rows:?} rows of an aborted transaction")
    })
}

async fn no_resurrection() -> Result<()> {
    let mut bench = bench("create table t (id int primary key)").await?;
    let client = bench.client().await?;
    client
        .batch_execute("begin; insert into t values (1)")
        .await?;
    let pid = first(&client, "select pg_backend_pid()").await?;
    bench
        .column(&format!("select pg_terminate_backend({pid})"))
        .await?;
    let Err(error) = client.batch_execute("insert into t values (2)").await else {
        return Err("the session lives on".into());
    };
    must(error.is_closed() || code(&error) == "57P01", || {
        code(&error)
    })?;
    for _ in 0..500 {
        if bench.proxy.sessions().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Nor does a move bring it back.
    bench.switchover().await?;
    must(bench.proxy.sessions().is_empty(), || {
        "the session is still listed".into()
    })?;
    let rows = bench.column("select count(*) from t").await?;
    must(rows == ["0"], || {
        format!("{rows:?} rows of a killed session")
    })
}

async fn memory() -> Result<()> {
    let mut bench = bench("create table t (id int, v text)").await?;
    let client = bench.client().await?;
    let long = "x".repeat(20_000);
    for round in 0..6 {
        client.batch_execute("begin; savepoint s").await?;
        client
            .execute("insert into t values (1, $1)", &[&long])
            .await?;
        client
            .simple_query("insert into t select n from generate_series(1, 50) n returning id")
            .await?;
        let held = bench.proxy.journal_bytes();
        must(held >= long.len(), || {
            format!("{held} bytes are held of {}", long.len())
        })?;
        must(held <= 2 * long.len(), || {
            format!("{held} bytes are held for {}", long.len())
        })?;
        if round % 3 == 1 {
            bench.switchover().await?;
            let again = bench.proxy.journal_bytes();
            must(again.abs_diff(held) <= held / 4, || {
                format!("{held} bytes became {again}")
            })?;
        }
        let end = if round % 2 == 0 { "commit" } else { "rollback" };
        client.batch_execute(end).await?;
        let mut left = usize::MAX;
        for _ in 0..500 {
            left = bench.proxy.journal_bytes();
            if left == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        must(left == 0, || format!("{left} bytes are left behind {end}"))?;
    }
    client.batch_execute("begin; select 1").await?;
    drop(client);
    for _ in 0..500 {
        if bench.proxy.journal_bytes() == 0 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err("a session that has left holds memory".into())
}

async fn order_of_state() -> Result<()> {
    let schema = "create schema a; create schema b; create table a.t (v text); \
                  create table b.t (v text); insert into a.t values ('a'); insert into b.t values ('b')";
    let mut bench = bench(schema).await?;
    let client = bench.client().await?;
    client
        .batch_execute("set search_path = a; set statement_timeout = '60s'")
        .await?;
    let from_a = client.prepare("select v from t").await?;
    client
        .batch_execute("prepare by_sql as select v from t")
        .await?;
    client.batch_execute("begin").await?;
    let one: String = client.query_one(&from_a, &[]).await?.get(0);
    client
        .batch_execute("set search_path = b; set statement_timeout = '50s'")
        .await?;
    let two = first(&client, "select v from t").await?;
    bench.switchover().await?;
    let three = first(&client, "select v from t").await?;
    let timeout = first(&client, "show statement_timeout").await?;
    client.batch_execute("rollback").await?;
    bench.switchover().await?;
    let four: String = client.query_one(&from_a, &[]).await?.get(0);
    let five = first(&client, "execute by_sql").await?;
    let path = first(&client, "show search_path").await?;
    let got = [one, two, three, timeout, four, five, path];
    must(got == ["a", "b", "b", "50s", "a", "a", "a"], || {
        format!("{got:?}")
    })
}

async fn own_names() -> Result<()> {
    let schema = "create schema evil; create table evil.calls (what text); \
        create function evil.trap(what text) returns text language plpgsql as \
        'begin insert into evil.calls values (what); return what; end'; \
        create function evil.set_config(text, text, boolean) returns text language sql as \
        $$select evil.trap('set_config')$$; \
        create function evil.current_setting(text) returns text language sql as \
        $$select evil.trap('current_setting')$$; \
        create function evil.pg_backend_pid() returns int language sql as \
        $$select length(evil.trap('pg_backend_pid'))$$; \
        create view evil.pg_settings as select evil.trap('pg_settings') as name; \
        create view evil.pg_cursors as select evil.trap('pg_cursors') as name; \
        create table t (id serial primary key)";
    let mut bench = bench(schema).await?;
    let client = bench.client().await?;
    client
        .batch_execute("set search_path = evil, pg_catalog, public; set my.x = 'y'")
        .await?;
    client.batch_execute("prepare p as select 1").await?;
    client.batch_execute("begin").await?;
    client
        .simple_query("insert into t default values returning id")
        .await?;
    bench.switchover().await?;
    client.batch_execute("commit; set my.x = 'z'").await?;
    bench.crash().await?;
    client.batch_execute("begin; execute p; commit").await?;
    let calls = bench.column("select what from evil.calls").await?;
    must(calls.is_empty(), || {
        format!("called by our own queries: {calls:?}")
    })?;
    let ids = bench.column("select id from t").await?;
    must(ids == ["1"], || format!("{ids:?}"))
}

async fn no_dead_connection() -> Result<()> {
    let mut bench = bench("").await?;
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(bench.client().await?);
    }
    for round in 0..3 {
        if round == 1 {
            bench.crash().await?;
        } else {
            bench.switchover().await?;
        }
        let began = std::time::Instant::now();
        let ask = clients.iter().map(|client| async {
            client.batch_execute("begin; select 1").await?;
            client.batch_execute("commit").await
        });
        futures_util::future::try_join_all(ask).await?;
        // PgBouncer's server_login_retry would make this 15 s.
        must(began.elapsed() < Duration::from_secs(10), || {
            format!("{:?}", began.elapsed())
        })?;
        bench.client().await?.batch_execute("select 1").await?;
    }
    Ok(())
}
