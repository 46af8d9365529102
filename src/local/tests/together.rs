//! Two proxies in front of one real server: what would go wrong if one of them went on before the
//! other. The stages are those of [`helios_cluster::barrier`]; moves go to fresh backends of the
//! same server, as in the proxy's own tests.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::time::{Duration, Instant, SystemTime};

use helios_api::control::{Stage, Topology};
use helios_cluster::Time;
use helios_cluster::barrier::{Answer, Barrier, Order, PATIENCE_MS, TURNS_MS};
use helios_proxy::ProxyHandle;
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use tokio::sync::mpsc;
use tokio_postgres::{Client, SimpleQueryMessage};

/// What a step may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(40);

fn now() -> Time {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    Time(u64::try_from(since.as_micros()).unwrap())
}

async fn carry_out(proxy: ProxyHandle, order: Order, topology: Topology) -> Answer {
    let patience = Duration::from_millis(PATIENCE_MS);
    let turn = Duration::from_millis(TURNS_MS);
    let answer = match order {
        Order::Gather => proxy.gather(topology, patience).await.map(Answer::Gathered),
        Order::Advance(to) => {
            let done = proxy.advance(topology.epoch, to, turn).await;
            done.map(|_| Answer::Done)
        }
    };
    answer.unwrap_or(Answer::Failed)
}

/// Takes all proxies to a new primary, one stage after the other; the orders in their order.
async fn together(proxies: &[ProxyHandle], topology: Topology) -> Vec<(String, Order)> {
    let names = (0..proxies.len()).map(|n| n.to_string()).collect();
    let (mut barrier, mut orders) = Barrier::begin(names, true, now());
    let (told, mut answers) = mpsc::channel(16);
    let mut given = Vec::new();
    loop {
        for (name, order) in orders {
            given.push((name.clone(), order));
            let proxy = proxies[name.parse::<usize>().unwrap()].clone();
            let (topology, told) = (topology.clone(), told.clone());
            tokio::spawn(async move {
                let answer = carry_out(proxy, order, topology).await;
                told.send((name, order, answer)).await.ok();
            });
        }
        if barrier.is_over() {
            return given;
        }
        let left = Duration::from_micros(barrier.due().micros_since(now()));
        orders = tokio::select! {
            Some((name, order, answer)) = answers.recv() => {
                barrier.answered(&name, order, answer, now())
            }
            () = tokio::time::sleep(left) => barrier.look(now()),
        };
    }
}

async fn two(schema: &str) -> (Bench, [ProxyHandle; 2]) {
    let bench = Bench::start(EngineOptions::default(), schema)
        .await
        .unwrap();
    let second = bench.another_proxy(EngineOptions::default()).await.unwrap();
    let proxies = [bench.proxy.clone(), second];
    (bench, proxies)
}

async fn drain(bench: &Bench, proxies: &[ProxyHandle]) {
    for proxy in proxies {
        bench.drain_at(proxy).await.unwrap();
    }
}

/// The first column of all rows of a simple query, as numbers.
async fn numbers(client: &Client, sql: &str) -> Vec<i64> {
    let messages = client.simple_query(sql).await.unwrap();
    let rows = messages.iter().filter_map(|m| match m {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap().parse().unwrap()),
        _ => None,
    });
    rows.collect()
}

/// A statement that takes its values while the sequence stays set back for a while.
const SLOWLY: &str = "INSERT INTO t (v) SELECT n FROM (SELECT n, pg_sleep(0.4) \
                      FROM generate_series(1, 2) n) x RETURNING id";

/// Both proxies' clients have seen values of one sequence, and draw others that they have not seen.
/// Where a proxy replayed while the other has set the sequence back, it would draw the values that
/// the other's client has seen.
#[tokio::test(flavor = "multi_thread")]
async fn values_that_clients_of_both_have_seen_are_nobody_elses() {
    let (mut bench, proxies) = two("CREATE TABLE t (id serial PRIMARY KEY, v int)").await;
    for planned in [true, false] {
        let mut clients = Vec::new();
        let mut seen = Vec::new();
        for proxy in &proxies {
            let seeing = bench.client_of(proxy).await.unwrap();
            seeing.batch_execute("BEGIN").await.unwrap();
            seen.extend(numbers(&seeing, SLOWLY).await);
            let unseeing = bench.client_of(proxy).await.unwrap();
            unseeing.batch_execute("BEGIN").await.unwrap();
            let insert = "INSERT INTO t (v) VALUES (1), (2), (3)";
            unseeing.batch_execute(insert).await.unwrap();
            clients.extend([seeing, unseeing]);
        }
        if planned {
            drain(&bench, &proxies).await;
        }
        let topology = bench.next_topology().unwrap();
        let orders = together(&proxies, topology).await;
        let turns = orders.iter().filter(|o| o.1 == Order::Advance(Stage::Turn));
        assert_eq!(turns.count(), 2, "{orders:?}");
        for client in &clients {
            client.batch_execute("COMMIT").await.unwrap();
        }
        let ids = numbers(&bench.direct, "SELECT id FROM t ORDER BY id").await;
        for id in &seen {
            assert!(ids.contains(id), "{id} in {ids:?}");
        }
        let next = numbers(&bench.direct, "SELECT nextval('t_id_seq')").await;
        assert!(next.first() > ids.last(), "{next:?} {ids:?}");
    }
    let count = numbers(&bench.direct, "SELECT count(*) FROM t").await;
    assert_eq!(count, [20]);
}

/// A long transaction takes its values ahead in its turn, and runs again behind those of the other
/// proxy: for longer than any turn, and than others wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_transaction_needs_no_long_turn() {
    let (mut bench, proxies) = two("CREATE TABLE t (id serial PRIMARY KEY, v int)").await;
    let insert = "INSERT INTO t (v) VALUES (1) RETURNING id";
    let long = bench.client_of(&proxies[0]).await.unwrap();
    let other = bench.client_of(&proxies[1]).await.unwrap();
    long.batch_execute("BEGIN").await.unwrap();
    let (mut seen, mut others) = (Vec::new(), Vec::new());
    for _ in 0..300 {
        seen.extend(numbers(&long, insert).await);
        others.extend(numbers(&other, insert).await);
    }
    long.batch_execute("SELECT pg_sleep(8)").await.unwrap();
    seen.extend(numbers(&long, insert).await);
    other.batch_execute("BEGIN").await.unwrap();
    others.extend(numbers(&other, SLOWLY).await);
    let topology = bench.next_topology().unwrap();
    let orders = together(&proxies, topology).await;
    let turns = orders.iter().filter(|o| o.1 == Order::Advance(Stage::Turn));
    assert_eq!(turns.count(), 2, "{orders:?}");
    others.extend(numbers(&other, insert).await);
    other.batch_execute("COMMIT").await.unwrap();
    let sleeps = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    assert_eq!(numbers(&bench.direct, sleeps).await, [1], "it is not over");
    seen.extend(numbers(&long, insert).await);
    long.batch_execute("COMMIT").await.unwrap();
    seen.extend(others);
    seen.sort_unstable();
    let rows = numbers(&bench.direct, "SELECT id FROM t ORDER BY id").await;
    assert_eq!(rows, seen);
}

/// The lock of a replay that takes its time, and new work of the other proxy's client on the same
/// row: it comes behind.
#[tokio::test(flavor = "multi_thread")]
async fn new_work_of_one_comes_behind_the_locks_of_the_other() {
    let (mut bench, proxies) =
        two("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 0), (2, 0)")
            .await;
    let holder = bench.client_of(&proxies[0]).await.unwrap();
    holder.batch_execute("BEGIN").await.unwrap();
    holder.batch_execute("SELECT pg_sleep(1)").await.unwrap();
    let update = "UPDATE t SET v = v + 1 WHERE id = 1 RETURNING v";
    assert_eq!(numbers(&holder, update).await, [1]);
    let other = bench.client_of(&proxies[1]).await.unwrap();
    drain(&bench, &proxies).await;
    let new = tokio::spawn(async move {
        let update = "UPDATE t SET v = v + 10 WHERE id = 1";
        other.batch_execute(update).await.unwrap();
    });
    together(&proxies, bench.next_topology().unwrap()).await;
    let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    let deadline = Instant::now() + PATIENCE;
    while numbers(&bench.direct, waits).await != [1] {
        assert!(Instant::now() < deadline && !new.is_finished());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // What it saw is still so.
    assert_eq!(numbers(&holder, update).await, [2]);
    holder.batch_execute("COMMIT").await.unwrap();
    tokio::time::timeout(PATIENCE, new).await.unwrap().unwrap();
    assert_eq!(
        numbers(&bench.direct, "SELECT v FROM t WHERE id = 1").await,
        [12]
    );
}

/// What was in flight waits for a lock of the other proxy's client, and has to wait behind it again.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_in_flight_is_sent_behind_the_replays_of_the_other() {
    let (mut bench, proxies) =
        two("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 0)").await;
    let holder = bench.client_of(&proxies[0]).await.unwrap();
    holder.batch_execute("BEGIN").await.unwrap();
    holder.batch_execute("SELECT pg_sleep(1)").await.unwrap();
    let update = "UPDATE t SET v = v * 2 + 1 WHERE id = 1 RETURNING v";
    assert_eq!(numbers(&holder, update).await, [1]);
    let waiter = bench.client_of(&proxies[1]).await.unwrap();
    waiter.batch_execute("BEGIN").await.unwrap();
    let waiting = tokio::spawn(async move {
        let v = numbers(&waiter, update).await;
        waiter.batch_execute("COMMIT").await.unwrap();
        v
    });
    let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    let deadline = Instant::now() + PATIENCE;
    while numbers(&bench.direct, waits).await != [1] {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drain(&bench, &proxies).await;
    together(&proxies, bench.next_topology().unwrap()).await;
    assert_eq!(numbers(&holder, "SELECT v FROM t WHERE id = 1").await, [1]);
    holder.batch_execute("COMMIT").await.unwrap();
    let v = tokio::time::timeout(PATIENCE, waiting)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(v, [3]);
}

/// One that is told to stand and then hears nothing goes on by itself; its client goes on where it
/// was, but for values of sequences, which others may have by then.
#[tokio::test(flavor = "multi_thread")]
async fn who_hears_nothing_any_more_goes_on_without_setting_back() {
    let (mut bench, [_, second]) = two("CREATE TABLE t (id serial PRIMARY KEY, v int)").await;
    let seeing = bench.client_of(&second).await.unwrap();
    seeing.batch_execute("BEGIN").await.unwrap();
    let insert = "INSERT INTO t (v) VALUES (1) RETURNING id";
    assert_eq!(numbers(&seeing, insert).await, [1]);
    let plain = bench.client_of(&second).await.unwrap();
    plain.batch_execute("BEGIN").await.unwrap();
    plain.batch_execute("CREATE TABLE u (v int)").await.unwrap();
    let topology = bench.next_topology().unwrap();
    let (epoch, patience) = (topology.epoch, Duration::from_millis(300));
    assert!(second.gather(topology, patience).await.unwrap().wants_turn);
    plain
        .batch_execute("INSERT INTO u VALUES (1)")
        .await
        .unwrap();
    plain.batch_execute("COMMIT").await.unwrap();
    let error = seeing.batch_execute("COMMIT").await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "40001", "{error}");
    // A turn that comes too late is none.
    let late = second
        .advance(epoch, Stage::Turn, Duration::from_secs(9))
        .await;
    assert_eq!(late.unwrap().replayed, 0);
    assert_eq!(second.status().phase, "running");
}

/// A proxy that dies while it has a sequence set back: the server sets it forward by itself.
#[test]
fn a_proxy_that_dies_in_its_turn_leaves_no_sequence_set_back() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let schema = "CREATE TABLE t (id serial PRIMARY KEY, v int)";
    let engine = EngineOptions::default();
    let mut bench = runtime
        .block_on(Bench::start(engine.clone(), schema))
        .unwrap();
    let doomed = tokio::runtime::Runtime::new().unwrap();
    let proxy = doomed.block_on(bench.another_proxy(engine)).unwrap();
    let client = runtime.block_on(bench.client_of(&proxy)).unwrap();
    runtime.block_on(async {
        client.batch_execute("BEGIN").await.unwrap();
        assert_eq!(numbers(&client, SLOWLY).await, [1, 2]);
        let others = "INSERT INTO t (v) SELECT generate_series(1, 5)";
        bench.direct.batch_execute(others).await.unwrap();
    });
    let topology = bench.next_topology().unwrap();
    let resumed = proxy.clone();
    doomed.spawn(async move { resumed.resume(topology).await });
    drop(proxy);
    let stands = "SELECT last_value FROM t_id_seq";
    let until = async |back: bool| {
        let deadline = Instant::now() + PATIENCE;
        while (numbers(&bench.direct, stands).await < vec![7]) != back {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    runtime.block_on(until(true));
    doomed.shutdown_background();
    runtime.block_on(until(false));
    let next = runtime.block_on(numbers(&bench.direct, "SELECT nextval('t_id_seq')"));
    assert!(next >= vec![8], "{next:?}");
}
