//! A primary that crashes and comes up again in place hands out transaction ids a second time.

use std::process::Stdio;
use std::time::{Duration, Instant};

use helios_e2e::{Result, Shown};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_testkit::frames::Unit;
use helios_testkit::interpose::{Cut, Order, Way};
use tokio::io::AsyncWriteExt;

const LIMIT: Duration = Duration::from_secs(60);

const SCHEMA: &str = "create table t (id int primary key, v text)";

/// A COMMIT is on its way when the server dies, none of its transaction's log was flushed, and
/// another transaction has its id and has committed before the proxy can ask.
#[tokio::test(flavor = "multi_thread")]
async fn an_id_handed_out_again_is_no_evidence() -> std::result::Result<(), Shown> {
    Ok(handed_out_again(Now::Committed).await?)
}

/// The same, and the other transaction still runs: it is not waited for.
#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_somebody_else_runs_with_is_not_waited_for() -> std::result::Result<(), Shown> {
    for epoch in [Now::Runs, Now::RunsInANewEpoch] {
        handed_out_again(epoch).await?;
    }
    Ok(())
}

/// What became of the transaction that got the id a second time.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Now {
    Committed,
    Runs,
    /// The cluster has taken note of the restart.
    RunsInANewEpoch,
}

async fn handed_out_again(now: Now) -> Result<()> {
    let mut bench = Bench::start(EngineOptions::default(), SCHEMA).await?;
    // Nothing of an open transaction's log is flushed in the time that this takes.
    let slowly = "alter system set wal_writer_delay = '10s'";
    bench.direct.batch_execute(slowly).await?;
    bench.direct.execute("select pg_reload_conf()", &[]).await?;
    bench.known().await?;
    bench.interpose()?;
    let client = bench.client().await?;
    position_is_read(&bench).await?;
    client.batch_execute("begin").await?;
    let insert = "insert into t values (1, 'a') returning id";
    client.query_one(insert, &[]).await?;
    client.batch_execute("select * from t").await?;
    let ids = "select backend_xid::text from pg_stat_activity where backend_xid is not null";
    let [id] = <[String; 1]>::try_from(bench.column(ids).await?)
        .map_err(|ids| format!("{ids:?} have ids"))?;

    let cut = Cut {
        way: Way::ToServer,
        unit: Unit::Messages,
        after: 0,
    };
    let order = Order::waiting(cut, 1);
    if let Some(between) = &bench.between {
        between.set(|rules| rules.cut = Some(std::sync::Arc::clone(&order)));
    }
    let commit = tokio::spawn(async move {
        let committed = client.batch_execute("commit").await;
        (client, committed)
    });
    tokio::time::timeout(LIMIT, order.hit()).await?;
    bench.server.crash();
    if now == Now::Committed {
        hand_out_ids(&bench, 20).await?;
    }
    bench.server.boot().await?;
    bench.direct = bench.server.connect().await?;
    let other = bench.server.connect().await?;
    let expected = match now {
        Now::Committed => "committed",
        Now::Runs | Now::RunsInANewEpoch => {
            run_with(&other, &id).await?;
            "in progress"
        }
    };
    let status = bench
        .column(&format!("select pg_xact_status('{id}')"))
        .await?;
    if status != [expected] {
        return Err(format!("the id {id} was not handed out again: {status:?}").into());
    }
    order.release();
    if now == Now::RunsInANewEpoch {
        bench.resume().await?;
    }

    let (client, committed) = tokio::time::timeout(LIMIT, commit).await??;
    committed.map_err(|e| format!("the commit: {e:?}"))?;
    let rows = bench.column("select id from t").await?;
    if rows != ["1"] {
        return Err(format!("told that it committed, and {rows:?} are in the table").into());
    }
    client
        .batch_execute("insert into t values (2, 'b')")
        .await?;
    Ok(())
}

/// Begins transactions until one has this id; that one stays open.
async fn run_with(other: &tokio_postgres::Client, id: &str) -> Result<()> {
    for _ in 0..1000 {
        other.batch_execute("begin").await?;
        let row = other.query_one("select pg_current_xact_id()::text", &[]);
        if row.await?.get::<_, String>(0) == id {
            return Ok(());
        }
        other.batch_execute("commit").await?;
    }
    Err(format!("the id {id} is not handed out again").into())
}

/// Waits until the proxy has read the log's position once more from beginning to end.
async fn position_is_read(bench: &Bench) -> Result<()> {
    let readings = "select count(*) from pg_stat_activity where usename = 'helios' \
                    and query like '%pg_current_wal_flush_lsn%' and query_start > ";
    let deadline = Instant::now() + LIMIT;
    for _ in 0..2 {
        let now = bench
            .column("select quote_literal(clock_timestamp())")
            .await?
            .concat();
        while bench.column(&format!("{readings}{now}")).await? != ["1"] {
            if Instant::now() > deadline {
                return Err("the proxy does not read the log's position".into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(())
}

/// Brings the server's data up without the server, and commits so many transactions there.
async fn hand_out_ids(bench: &Bench, count: usize) -> Result<()> {
    let mut command = bench.server.command("postgres");
    command.args(["--single", "-D"]);
    command.arg(bench.server.data_dir()).arg("postgres");
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = tokio::process::Command::from(command).spawn()?;
    if let Some(mut input) = child.stdin.take() {
        let text = "select pg_current_xact_id();\n".repeat(count);
        input.write_all(text.as_bytes()).await?;
    }
    match child.wait().await?.success() {
        true => Ok(()),
        false => Err("the server's data do not come up".into()),
    }
}
