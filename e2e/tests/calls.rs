//! What marks in front of CALL leave behind in a session, and what becomes of calls whose mark the
//! server refuses. Says most on PostgreSQL 18 and later, where marks need a domain
//! (`make test-versions`); holds on all.

use std::time::Duration;

use helios_e2e::driver::Target;
use helios_e2e::raw::{RawClient, bind, execute, parse, sync};
use helios_e2e::{Result, Shown};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use tokio_postgres::Client;

const SCHEMA: &str = "create table t (id int primary key); \
    create procedure two(a int) language plpgsql as \
    $$ begin insert into t values (a); commit; insert into t values (a + 1); end $$; \
    create role app; grant all on t to app";

/// Long enough for calls to be in flight when the primary dies.
const IN_FLIGHT: Duration = Duration::from_millis(300);

async fn bench() -> Result<Bench> {
    let bench = Bench::start(EngineOptions::default(), SCHEMA).await?;
    bench.known().await?;
    Ok(bench)
}

async fn number(client: &Client, sql: &str) -> Result<i64> {
    Ok(client.query_one(sql, &[]).await?.get(0))
}

/// Rows that calls have left, past the proxy.
async fn rows(bench: &Bench) -> Result<i64> {
    number(&bench.direct, "select count(*) from t").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_leaves_no_object_that_moves() -> std::result::Result<(), Shown> {
    Ok(nothing_moves_along().await?)
}

async fn nothing_moves_along() -> Result<()> {
    let mut bench = bench().await?;
    let client = bench.client().await?;
    let ours = "select count(*) from pg_type where typnamespace = pg_my_temp_schema() \
        and typtype = 'd'";
    let mine = "select sum(n) from mine";
    client.batch_execute("call two(1)").await?;
    client
        .batch_execute("create temp table mine (n int)")
        .await?;
    for planned in [true, false] {
        let first = if planned { 3_i32 } else { 7 };
        client.batch_execute("insert into mine values (4)").await?;
        client.execute("call two($1)", &[&first]).await?;
        client
            .batch_execute(&format!("call two({})", first + 2))
            .await?;
        if planned {
            bench.switchover().await?;
        } else {
            // Its rows are read while it is idle.
            tokio::time::sleep(Duration::from_secs(3)).await;
            bench.crash().await?;
            bench.resume().await?;
        }
        let want = if planned { 4 } else { 8 };
        assert_eq!(number(&client, mine).await?, want);
        assert_eq!(number(&client, ours).await?, 0, "a domain moved along");
    }
    assert_eq!(rows(&bench).await?, 10);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_go_on_where_their_mark_is_refused_or_gone() -> std::result::Result<(), Shown> {
    Ok(refused().await?)
}

async fn refused() -> Result<()> {
    let bench = bench().await?;
    let client = bench.client().await?;
    client.batch_execute("call two(1)").await?;
    // Hidden in a function: found out by the mark's failure.
    let hidden = "do $$begin execute 'discard temp'; end$$";
    for (number, before) in ["discard temp", "discard all", hidden, "set a.b = 1"]
        .into_iter()
        .enumerate()
    {
        client.batch_execute(before).await?;
        client
            .batch_execute(&format!("call two({})", 10 * (number + 1)))
            .await?;
    }
    let read_only = "set default_transaction_read_only = on";
    client.batch_execute(read_only).await?;
    let refusal = client.batch_execute("call two(50)").await;
    let code = refusal.err().and_then(|e| e.code().cloned());
    assert_eq!(code.as_ref().map(|c| c.code()), Some("25006"));

    // A role that may make nothing temporary.
    bench
        .direct
        .batch_execute("revoke temporary on database postgres from public")
        .await?;
    let other = bench.client().await?;
    other.batch_execute("set role app").await?;
    other.batch_execute("call two(60)").await?;
    other.batch_execute("call two(70)").await?;
    assert_eq!(rows(&bench).await?, 14);
    Ok(())
}

/// The first call of a session is prepared by name: the unnamed statement of before stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_leaves_the_unnamed_statement() -> std::result::Result<(), Shown> {
    Ok(unnamed().await?)
}

async fn unnamed() -> Result<()> {
    let bench = bench().await?;
    let mut client = RawClient::log_in(&Target::local(bench.proxy.port())).await?;
    let prepare = [parse("", "select 7"), sync()].concat();
    client.send(&prepare).await?;
    client.until(b'Z').await?;
    let call = [
        parse("c", "call two(1)"),
        bind("", "c", &[]),
        execute("", 0),
        sync(),
    ]
    .concat();
    let again = [bind("", "c", &[]), execute("", 0), sync()].concat();
    let seven = [bind("", "", &[]), execute("", 0), sync()].concat();
    client.send(&call).await?;
    let called = client.until(b'Z').await?;
    assert!(called.iter().any(|m| m.tag == b'C'), "{called:?}");
    client.send(&seven).await?;
    let row = client.until(b'Z').await?;
    assert!(row.iter().any(|m| m.tag == b'D'), "{row:?}");
    bench.direct.batch_execute("truncate t").await?;
    client.send(&again).await?;
    let called = client.until(b'Z').await?;
    assert!(called.iter().any(|m| m.tag == b'C'), "{called:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_without_a_domain_are_honest_about_a_crash() -> std::result::Result<(), Shown> {
    Ok(honest().await?)
}

async fn honest() -> Result<()> {
    let mut bench = bench().await?;
    let sql = "revoke temporary on database postgres from public; \
        create procedure slow(a int) language plpgsql as \
        $$ begin insert into t values (a); commit; perform pg_sleep(1); \
        insert into t values (a + 1); end $$";
    bench.direct.batch_execute(sql).await?;
    let other = bench.client().await?;
    other.batch_execute("set role app").await?;
    let call = tokio::spawn(async move { other.batch_execute("call slow(1)").await });
    tokio::time::sleep(IN_FLIGHT).await;
    bench.crash().await?;
    bench.resume().await?;
    let told = call.await?;
    let code = told.err().and_then(|e| e.code().cloned());
    assert_eq!(code.as_ref().map(|c| c.code()), Some("08007"));
    assert_eq!(rows(&bench).await?, 1, "it does not run again");
    Ok(())
}
