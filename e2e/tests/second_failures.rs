//! What fails while a session is moved or resolved, and connections that break while the primary
//! lives. One server behind a go-between stands for the new primary.

use std::sync::Arc;
use std::time::Duration;

use helios_e2e::driver::Target;
use helios_e2e::raw::{RawClient, query};
use helios_e2e::{Result, Shown};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_testkit::frames::Unit;
use helios_testkit::interpose::{Class, Cut, Order, Way};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

const SCHEMA: &str = "create table t (id int primary key, v text); \
                      create table log (what text); insert into log values ('begin')";

/// What a transaction of these tests leaves.
const COMMITTED: [&str; 4] = ["1", "2", "3", "4"];

/// How many sessions look for their primary at the same time, and how often.
const SESSIONS: usize = 20;
const ROUNDS: u64 = 10;
/// What a step may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(20);

async fn bench() -> Result<Bench> {
    let bench = Bench::start(EngineOptions::default(), SCHEMA).await?;
    bench.known().await?;
    Ok(bench)
}

/// A session with state of every kind, in a transaction of three statements.
async fn open_transaction(bench: &Bench) -> Result<Client> {
    let client = bench.client().await?;
    let before = "set work_mem = '7MB'; prepare p as insert into t values (2, 'p') returning id";
    client.batch_execute(before).await?;
    client.batch_execute("begin").await?;
    client
        .query_one("insert into t values (1, 'a') returning id", &[])
        .await?;
    client
        .batch_execute("execute p; savepoint s; select * from t")
        .await?;
    client
        .execute("insert into t values (3, $1)", &[&"c"])
        .await?;
    Ok(client)
}

/// What a client was told, whole.
fn said(error: tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(error) => format!("{}: {error}", error.code().code()),
        None => error.to_string(),
    }
}

/// The transaction goes on and ends, and the database holds it once.
async fn goes_on(bench: &Bench, client: &Client) -> Result<()> {
    let last = "insert into t values (4, 'd') returning id";
    client.query_one(last, &[]).await.map_err(said)?;
    client.batch_execute("commit").await.map_err(said)?;
    let ids = bench.column("select id from t order by id").await?;
    if ids != COMMITTED {
        return Err(format!("{ids:?} are in the table").into());
    }
    Ok(())
}

/// How long a move may take that waits for nobody.
const MOVE_LIMIT: Duration = Duration::from_secs(60);

/// A move whose replay stands still behind a message that the proxy has sent.
struct Stopped {
    order: Arc<Order>,
    resume: JoinHandle<Result<()>>,
}

impl Stopped {
    /// Moves the session, and stops the replay behind so many messages; `None` when the replay was
    /// over before.
    async fn behind(bench: &mut Bench, after: u64) -> Result<Option<Self>> {
        let cut = Cut {
            way: Way::ToServer,
            unit: Unit::Messages,
            after,
        };
        bench.drain().await?;
        let order = Order::waiting(cut, 1);
        if let Some(between) = &bench.between {
            between.set(|rules| rules.cut = Some(Arc::clone(&order)));
        }
        let (proxy, next) = (bench.proxy.clone(), bench.next_topology()?);
        let mut resume = tokio::spawn(async move {
            proxy.resume(next).await?;
            Ok(())
        });
        let stopped = tokio::select! {
            () = order.hit() => true,
            ended = &mut resume => {
                ended??;
                false
            }
            () = tokio::time::sleep(MOVE_LIMIT) => return Err("nothing moves".into()),
        };
        if stopped {
            return Ok(Some(Self { order, resume }));
        }
        // A message that comes later waits for nobody.
        order.release();
        forget(bench);
        Ok(None)
    }

    /// Lets the replay go on, if somebody is left to go on, and waits for the end of the move.
    async fn go_on(self, bench: &Bench) -> Result<()> {
        forget(bench);
        self.order.release();
        tokio::time::timeout(MOVE_LIMIT, self.resume).await???;
        Ok(())
    }
}

/// The order holds for nobody any more.
fn forget(bench: &Bench) {
    if let Some(between) = &bench.between {
        between.set(|rules| rules.cut = None);
    }
}

/// A replay that was stopped at fewer messages than this was none.
const MESSAGES_OF_A_REPLAY: u64 = 8;

fn long_enough(messages: u64) -> Result<()> {
    match messages >= MESSAGES_OF_A_REPLAY {
        true => Ok(()),
        false => Err(format!("the replay was over behind {messages} messages").into()),
    }
}

async fn start_over(bench: &Bench) -> Result<()> {
    let sql = "truncate t";
    Ok(bench.direct.batch_execute(sql).await?)
}

/// The proxy's connection to the new primary breaks behind every message of the replay, first of
/// what the proxy sends, then of what the server answers.
#[tokio::test(flavor = "multi_thread")]
async fn the_connection_breaks_at_each_message_of_the_replay() -> std::result::Result<(), Shown> {
    Ok(at_each_message().await?)
}

async fn at_each_message() -> Result<()> {
    let mut bench = bench().await?;
    bench.interpose()?;
    let mut messages = Vec::new();
    for way in [Way::ToServer, Way::FromServer] {
        for after in 0..100 {
            start_over(&bench).await?;
            let client = open_transaction(&bench).await?;
            let cut = Cut {
                way,
                unit: Unit::Messages,
                after,
            };
            // Nobody says anything any more on the old connection: the order is for the new one.
            bench.drain().await?;
            let logins = bench.logins();
            if let Some(between) = &bench.between {
                between.set(|rules| rules.cut = Some(Order::new(cut, 1)));
            }
            bench.resume().await?;
            if let Some(between) = &bench.between {
                between.set(|rules| rules.cut = None);
            }
            let broke = bench.logins() != logins + 1;
            let done = goes_on(&bench, &client).await;
            done.map_err(|e| format!("cut after message {after}, {way:?}: {e}"))?;
            if !broke {
                // That was the whole replay.
                messages.push(after);
                break;
            }
        }
    }
    match messages.as_slice() {
        // Settings, statement, and the transaction's messages with their Syncs.
        [to, from] if *to > 12 && *from > 30 => Ok(()),
        _ => Err(format!("messages of the replay: {messages:?}").into()),
    }
}

/// The new primary dies while a session is replayed on it, behind one message after the other.
#[tokio::test(flavor = "multi_thread")]
async fn the_new_primary_dies_during_the_replay() -> std::result::Result<(), Shown> {
    Ok(dies_during_the_replay().await?)
}

async fn dies_during_the_replay() -> Result<()> {
    let mut bench = bench().await?;
    bench.interpose()?;
    let mut after = 1;
    loop {
        start_over(&bench).await?;
        let client = open_transaction(&bench).await?;
        let Some(stopped) = Stopped::behind(&mut bench, after).await? else {
            goes_on(&bench, &client).await?;
            return long_enough(after);
        };
        bench.crash().await?;
        stopped.go_on(&bench).await?;
        let done = goes_on(&bench, &client).await;
        done.map_err(|e| format!("behind message {after}: {e}"))?;
        // A server that starts anew takes its time: every third message.
        after += 3;
    }
}

/// A transaction that cannot be replayed is lost; statements that were prepared in it stay, as in
/// PostgreSQL, but for those that need what is lost with it.
#[tokio::test(flavor = "multi_thread")]
async fn statements_prepared_in_a_lost_transaction_stay() -> std::result::Result<(), Shown> {
    Ok(statements_stay().await?)
}

async fn statements_stay() -> Result<()> {
    let mut bench = bench().await?;
    let client = bench.client().await?;
    let before = client.prepare("select 'before'").await?;
    client
        .batch_execute("begin; create table made (v text)")
        .await?;
    let inside = client
        .prepare("insert into t values ($1, 'inside')")
        .await?;
    let needs = client.prepare("select v from made").await?;
    // Never the same again: the replay differs.
    client
        .query(
            "insert into t values (1, gen_random_uuid()::text) returning v",
            &[],
        )
        .await?;
    bench.switchover().await?;
    let Err(lost) = client.execute(&inside, &[&2]).await else {
        return Err("the transaction went on".into());
    };
    if lost.code().is_none_or(|code| code.code() != "40001") {
        return Err(said(lost).into());
    }
    client.batch_execute("rollback").await?;
    client.query_one(&before, &[]).await.map_err(said)?;
    client.execute(&inside, &[&3]).await.map_err(said)?;
    let Err(error) = client.query(&needs, &[]).await else {
        return Err("a table of a lost transaction is there".into());
    };
    if error.code().is_none_or(|code| code.code() != "26000") {
        return Err(said(error).into());
    }
    let ids = bench.column("select id from t").await?;
    match ids == ["3"] {
        true => Ok(()),
        false => Err(format!("{ids:?} are in the table").into()),
    }
}

/// One move after the other, without a word of the client's in between.
#[tokio::test(flavor = "multi_thread")]
async fn moves_in_a_row() -> std::result::Result<(), Shown> {
    Ok(in_a_row().await?)
}

async fn in_a_row() -> Result<()> {
    let mut bench = bench().await?;
    let client = open_transaction(&bench).await?;
    for _ in 0..5 {
        bench.switchover().await?;
        // Unprepared, while nothing is known to be wrong.
        bench.resume().await?;
    }
    bench.crash().await?;
    goes_on(&bench, &client).await
}

/// The client leaves while its transaction is replayed: nothing of it stays.
#[tokio::test(flavor = "multi_thread")]
async fn the_client_leaves_during_the_replay() -> std::result::Result<(), Shown> {
    Ok(client_leaves().await?)
}

async fn client_leaves() -> Result<()> {
    let mut bench = bench().await?;
    bench.interpose()?;
    for after in 1.. {
        let client = open_transaction(&bench).await?;
        let Some(stopped) = Stopped::behind(&mut bench, after).await? else {
            return long_enough(after);
        };
        drop(client);
        stopped.go_on(&bench).await?;
        nobody_left(&bench).await?;
        let rows = bench.column("select count(*) from t").await?;
        if rows != ["0"] {
            let why = format!("{rows:?} rows of a client that has left behind message {after}");
            return Err(why.into());
        }
    }
    Ok(())
}

/// Sessions of clients that have gone end on the server, and in the proxy's list.
async fn nobody_left(bench: &Bench) -> Result<()> {
    let sql = "select count(*) from pg_stat_activity \
               where backend_type = 'client backend' and usename = 'postgres'";
    for _ in 0..1000 {
        // One is this test's own.
        if bench.column(sql).await? == ["1"] && bench.proxy.sessions().is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err("somebody is left".into())
}

/// A cancel request that comes during the replay hits the statement in flight or nothing, never a
/// statement of the replay: the transaction goes on.
#[tokio::test(flavor = "multi_thread")]
async fn the_client_cancels_during_the_replay() -> std::result::Result<(), Shown> {
    Ok(client_cancels().await?)
}

async fn client_cancels() -> Result<()> {
    let mut bench = bench().await?;
    bench.interpose()?;
    for after in 1.. {
        start_over(&bench).await?;
        let client = open_transaction(&bench).await?;
        let cancel = client.cancel_token();
        let Some(stopped) = Stopped::behind(&mut bench, after).await? else {
            goes_on(&bench, &client).await?;
            return long_enough(after);
        };
        cancel.cancel_query(NoTls).await?;
        stopped.go_on(&bench).await?;
        let done = goes_on(&bench, &client).await;
        done.map_err(|e| format!("behind message {after}: {e}"))?;
    }
    Ok(())
}

/// The connection breaks while the primary lives, outside and inside a transaction, with a
/// statement in flight, and with a COMMIT in flight at every message of its answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_breaks_while_the_primary_lives() -> std::result::Result<(), Shown> {
    Ok(connection_breaks().await?)
}

async fn connection_breaks() -> Result<()> {
    let mut bench = bench().await?;
    bench.interpose()?;
    let close = |bench: &Bench| {
        if let Some(between) = &bench.between {
            between.close(Class::Session);
        }
    };
    // Idle: nothing is seen, settings and statements are there.
    let idle = bench.client().await?;
    idle.batch_execute("set work_mem = '9MB'; prepare q as select 42")
        .await?;
    let statement = idle.prepare("select current_setting('work_mem')").await?;
    close(&bench);
    let work_mem: String = idle.query_one(&statement, &[]).await?.get(0);
    idle.batch_execute("begin; execute q; commit").await?;
    if work_mem != "9MB" {
        return Err(format!("work_mem is {work_mem}").into());
    }
    // In a transaction; the old backend holds the row's lock until it is ended.
    let client = open_transaction(&bench).await?;
    close(&bench);
    goes_on(&bench, &client).await?;
    // With a statement in flight.
    start_over(&bench).await?;
    let client = open_transaction(&bench).await?;
    let slow = client.batch_execute("insert into log select 'slow' from pg_sleep(0.3)");
    let (slow, ()) = tokio::join!(slow, async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        close(&bench);
    });
    slow?;
    goes_on(&bench, &client).await?;
    let slow = bench
        .column("select count(*) from log where what = 'slow'")
        .await?;
    if slow != ["1"] {
        return Err(format!("a statement in flight ran {slow:?} times").into());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_is_cut_off_while_the_primary_lives() -> std::result::Result<(), Shown> {
    Ok(commit_cut_off().await?)
}

async fn commit_cut_off() -> Result<()> {
    let mut bench = bench().await?;
    bench.interpose()?;
    for way in [Way::ToServer, Way::FromServer] {
        for after in 0..4 {
            start_over(&bench).await?;
            let client = open_transaction(&bench).await?;
            client
                .batch_execute("insert into t values (4, 'd')")
                .await?;
            let cut = Cut {
                way,
                unit: Unit::Messages,
                after,
            };
            let order = Order::new(cut, 1);
            if let Some(between) = &bench.between {
                between.set(|rules| rules.cut = Some(order));
            }
            let committed = client.batch_execute("commit").await;
            if let Some(between) = &bench.between {
                between.set(|rules| rules.cut = None);
            }
            committed.map_err(|e| format!("{way:?} {after}: {}", said(e)))?;
            let ids = bench.column("select id from t order by id").await?;
            if ids != COMMITTED {
                return Err(format!("{way:?} {after}: {ids:?} are in the table").into());
            }
        }
    }
    Ok(())
}

/// An administrator's kill inside a transaction, and with a statement in flight, is no failover.
#[tokio::test(flavor = "multi_thread")]
async fn an_administrators_kill_stays_a_kill() -> std::result::Result<(), Shown> {
    Ok(kill_stays_a_kill().await?)
}

async fn kill_stays_a_kill() -> Result<()> {
    let bench = bench().await?;
    let target = Target::local(bench.proxy.port());
    for in_flight in [false, true] {
        let mut client = RawClient::log_in_as(&target, "victim").await?;
        client
            .send(&query("begin; insert into log values ('killed')"))
            .await?;
        client.until(b'Z').await?;
        if in_flight {
            client.send(&query("select pg_sleep(30)")).await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let kill = "select pg_terminate_backend(pid) from pg_stat_activity \
                    where application_name = 'victim'";
        let killed = bench.column(kill).await?;
        let states = client.sqlstates_until_closed().await?;
        if killed != ["t"] || states != ["57P01"] {
            return Err(format!("killed {killed:?}, told {states:?}").into());
        }
    }
    let rows = bench
        .column("select count(*) from log where what = 'killed'")
        .await?;
    if rows != ["0"] {
        return Err("a killed transaction is there".into());
    }
    Ok(())
}

/// Attempts to find the primary are under way, and are not the first, when the cluster's command
/// comes: sessions heed the command. (One could begin the same attempt again and again instead, for
/// ever. That took a busy runtime: 6 of 164 runs of `second_error`, six or seven at a time, where
/// it was found. This test did not meet it without the mend.)
async fn looks_while_the_primary_moves() -> Result<()> {
    let mut bench = bench().await?;
    bench.interpose()?;
    let mut clients = Vec::new();
    for id in 0..SESSIONS {
        let client = bench.client().await?;
        let insert = format!("begin; insert into t values ({id}, 'a')");
        client.batch_execute(&insert).await?;
        clients.push(client);
    }
    for round in 0..ROUNDS {
        let between = bench.between.as_ref().ok_or("no go-between")?;
        between.set(|rules| rules.refuse = vec![Class::Session]);
        between.close(Class::Session);
        // Longer than the first pauses between attempts.
        tokio::time::sleep(Duration::from_millis(100)).await;
        between.set(|rules| {
            rules.refuse.clear();
            rules.delay = Duration::from_millis(20);
        });
        // At another point of the attempts in each round.
        tokio::time::sleep(Duration::from_millis(10 * round)).await;
        tokio::time::timeout(PATIENCE, bench.resume())
            .await
            .map_err(|_| format!("round {round}: the move does not end"))??;
        if let Some(between) = &bench.between {
            between.set(|rules| rules.delay = Duration::ZERO);
        }
        let answers = clients.iter().map(|c| c.batch_execute("select 1"));
        let answers = futures_util::future::try_join_all(answers);
        tokio::time::timeout(PATIENCE, answers)
            .await
            .map_err(|_| format!("round {round}: a session does not come back"))?
            .map_err(said)?;
    }
    for client in &clients {
        client.batch_execute("commit").await.map_err(said)?;
    }
    let rows = bench.column("select count(*) from t").await?;
    match rows == [SESSIONS.to_string()] {
        true => Ok(()),
        false => Err(format!("{rows:?} rows").into()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_look_for_their_primary_heed_the_gate() -> std::result::Result<(), Shown> {
    Ok(looks_while_the_primary_moves().await?)
}
