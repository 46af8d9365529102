//! One proxy takes over from another: clients go on with their sockets and backends, and whatever
//! fails on the way leaves them with the old one. Judged by what clients receive and by the
//! processes of the server that they are on.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::time::Duration;

use helios_proxy::engine::shared::EngineOptions;
use helios_proxy::takeover::VERSION;
use helios_proxy::takeover::channel::{Receiver, Sender, channel};
use helios_proxy::{Followed, Given, Proxy, ProxyHandle, TakenOver};
use helios_testkit::bench::{Bench, options};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

/// What a step may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);

async fn bench() -> Bench {
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 0)";
    Bench::start(EngineOptions::default(), schema)
        .await
        .unwrap()
}

/// The old proxy gives to whoever is at the other end.
fn give(old: &ProxyHandle, limit: Duration) -> (UnixStream, JoinHandle<Given>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let old = old.clone();
    let giving =
        tokio::spawn(async move { old.give(ours, None, limit, CancellationToken::new()).await });
    (theirs, giving)
}

async fn take(stream: UnixStream) -> TakenOver {
    let taking = Proxy::take_over(stream, options(EngineOptions::default()));
    tokio::time::timeout(PATIENCE, taking)
        .await
        .unwrap()
        .unwrap()
}

async fn within<T>(task: JoinHandle<T>) -> T {
    tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap()
}

async fn pid(client: &Client) -> i32 {
    let sql = "SELECT pg_backend_pid()";
    client.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_go_on_with_their_backends_in_the_next_process() {
    let mut bench = bench().await;
    let (idle, set) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    set.batch_execute("SET work_mem = '3MB'; LISTEN news; SELECT pg_advisory_lock(7)")
        .await
        .unwrap();
    let prepared = set.prepare("SELECT v + $1::int FROM t").await.unwrap();
    let before = (pid(&idle).await, pid(&set).await);
    let open = bench.client().await.unwrap();
    open.batch_execute("BEGIN; UPDATE t SET v = 5")
        .await
        .unwrap();

    let (stream, giving) = give(&bench.proxy, PATIENCE);
    let TakenOver {
        handle, followed, ..
    } = take(stream).await;
    assert_eq!(handle.port(), bench.proxy.port());
    // Both go on at once, though another one is still in a transaction.
    assert_eq!((pid(&idle).await, pid(&set).await), before);
    let late = bench.client_of(&handle).await.unwrap();
    late.batch_execute("SELECT 1").await.unwrap();
    open.batch_execute("COMMIT").await.unwrap();
    assert_eq!(within(giving).await, Given::Done { handed: 3, left: 0 });
    assert_eq!(within(followed).await, Followed::Done { taken: 3, left: 0 });
    assert_eq!(
        (handle.sessions().len(), bench.proxy.sessions().len()),
        (4, 0)
    );
    let old = std::mem::replace(&mut bench.proxy, handle);
    old.shutdown(Duration::ZERO).await;

    let v: i32 = set.query_one(&prepared, &[&1]).await.unwrap().get(0);
    assert_eq!(v, 6);
    // A cancel request finds its session.
    let cancel = idle.cancel_token();
    let sleeps = tokio::spawn(async move { idle.batch_execute("SELECT pg_sleep(600)").await });
    while bench.column(SLEEPS).await.unwrap() == ["0"] {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    cancel.cancel_query(tokio_postgres::NoTls).await.unwrap();
    let error = within(sleeps).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "57014");
    // The state is known to the new process: it moves with a change of primary.
    bench.switchover().await.unwrap();
    assert_ne!(pid(&set).await, before.1);
    let row = set.query_one("SHOW work_mem", &[]).await.unwrap();
    assert_eq!(row.get::<_, String>(0), "3MB");
    let held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 7";
    assert_eq!(bench.column(held).await.unwrap(), ["1"]);
    let v: i32 = set.query_one(&prepared, &[&2]).await.unwrap().get(0);
    assert_eq!(v, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_work_lose_nothing() {
    let mut bench = bench().await;
    let mut workers = Vec::new();
    let stop = CancellationToken::new();
    for _ in 0..8 {
        let (client, stop) = (bench.client().await.unwrap(), stop.clone());
        workers.push(tokio::spawn(async move {
            let mut done = 0;
            while !stop.is_cancelled() {
                // Two in flight at a time: a pipeline.
                let add = || client.execute("UPDATE t SET v = v + 1 WHERE id = $1", &[&1]);
                let (a, b) = tokio::join!(add(), add());
                done += a.unwrap() + b.unwrap();
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            done
        }));
    }
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (stream, giving) = give(&bench.proxy, PATIENCE);
        let taken = take(stream).await;
        assert_eq!(within(giving).await, Given::Done { handed: 8, left: 0 });
        within(taken.followed).await;
        let old = std::mem::replace(&mut bench.proxy, taken.handle);
        old.shutdown(Duration::ZERO).await;
    }
    stop.cancel();
    let mut done = 0;
    for worker in workers {
        done += within(worker).await;
    }
    let v = bench.column("SELECT v FROM t").await.unwrap();
    assert_eq!(v, [done.to_string()]);
}

/// A new process that dies, or breaks the protocol, at a chosen step.
struct Fake {
    to: Sender,
    from: Receiver,
}

impl Fake {
    async fn says(&mut self, message: Value) {
        self.to.send(&message, &[]).await.unwrap();
    }

    async fn hears(&mut self) -> Value {
        let got = tokio::time::timeout(PATIENCE, self.from.receive::<Value>()).await;
        got.unwrap().unwrap().unwrap().0
    }

    /// Up to this step: welcomed, let go, given a session.
    async fn up_to(stream: UnixStream, step: usize) -> Self {
        let (to, from) = channel(stream);
        let mut fake = Self { to, from };
        let listen = json!({ "host": "127.0.0.1", "port": 0, "unix_socket_dir": null });
        if step > 0 {
            let hello = json!({ "hello": { "version": VERSION, "listen": listen } });
            fake.says(hello).await;
        }
        for (at, says) in [(1, None), (2, Some("ready")), (3, None)] {
            if step >= at {
                if let Some(says) = says {
                    fake.says(json!(says)).await;
                }
                fake.hears().await;
            }
        }
        fake
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_process_that_dies_leaves_clients_with_the_old_one() {
    let bench = bench().await;
    let client = bench.client().await.unwrap();
    let before = pid(&client).await;
    for step in 0..=3 {
        let (stream, giving) = give(&bench.proxy, PATIENCE);
        drop(Fake::up_to(stream, step).await);
        let given = within(giving).await;
        assert!(
            matches!(given, Given::Failed { handed: 0, .. }),
            "{step}: {given:?}"
        );
        assert_eq!(pid(&client).await, before, "step {step}");
        bench
            .client()
            .await
            .unwrap()
            .batch_execute("SELECT 1")
            .await
            .unwrap();
    }
    // One that has a session when it dies takes it along; others stay.
    let other = bench.client().await.unwrap();
    let (stream, giving) = give(&bench.proxy, PATIENCE);
    let (to, from) = channel(stream);
    let mut fake = Fake { to, from };
    let listen = json!({ "host": "127.0.0.1", "port": 0, "unix_socket_dir": null });
    fake.says(json!({ "hello": { "version": VERSION, "listen": listen } }))
        .await;
    fake.hears().await;
    fake.says(json!("ready")).await;
    fake.hears().await;
    let session = fake.hears().await["session"]["session"].clone();
    fake.says(json!({ "have": { "session": session } })).await;
    drop(fake);
    assert!(matches!(
        within(giving).await,
        Given::Failed { handed: 1, .. }
    ));
    let alive = [pid_or_none(&client).await, pid_or_none(&other).await];
    assert_eq!(alive.iter().flatten().count(), 1, "{alive:?}");
}

async fn pid_or_none(client: &Client) -> Option<i32> {
    let row = client.query_one("SELECT pg_backend_pid()", &[]).await;
    row.ok().map(|row| row.get(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_process_that_hangs_is_not_waited_for() {
    let bench = bench().await;
    let client = bench.client().await.unwrap();
    let (stream, giving) = give(&bench.proxy, PATIENCE);
    let mut fake = Fake::up_to(stream, 2).await;
    let session = fake.hears().await["session"]["session"].clone();
    assert!(matches!(
        within(giving).await,
        Given::Failed { handed: 0, .. }
    ));
    // It is told that it has not got the session.
    let late = json!({ "have": { "session": session } });
    assert!(fake.to.send(&late, &[]).await.is_err());
    assert!(fake.hears().await["abort"].is_object());
    pid(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_beforehand() {
    let bench = bench().await;
    let client = bench.client().await.unwrap();
    let (stream, giving) = give(&bench.proxy, PATIENCE);
    let elsewhere = helios_proxy::ProxyOptions {
        host: "127.0.0.2".into(),
        ..options(EngineOptions::default())
    };
    let error = Proxy::take_over(stream, elsewhere).await.unwrap_err();
    assert!(error.to_string().contains("listen elsewhere"), "{error}");
    assert!(matches!(within(giving).await, Given::Failed { .. }));
    // A move of the primary is under way.
    bench.drain().await.unwrap();
    let (stream, giving) = give(&bench.proxy, PATIENCE);
    let taking = Proxy::take_over(stream, options(EngineOptions::default()));
    let error = taking.await.unwrap_err();
    assert!(error.to_string().contains("move of the primary"), "{error}");
    within(giving).await;
    bench
        .proxy
        .abort(bench.topology().unwrap().epoch)
        .await
        .unwrap();
    pid(&client).await;
}

const SLEEPS: &str = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_cannot_go_stays_and_can_be_cancelled() {
    let bench = bench().await;
    let (own, idle) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    own.batch_execute("CREATE TEMP TABLE mine AS SELECT 1 AS v")
        .await
        .unwrap();
    let before = (pid(&own).await, pid(&idle).await);
    let (stream, giving) = give(&bench.proxy, PATIENCE);
    let TakenOver {
        handle, followed, ..
    } = take(stream).await;
    assert_eq!(pid(&idle).await, before.1);
    own.query_one("SELECT v FROM mine", &[]).await.unwrap();
    assert_eq!(bench.proxy.sessions().len(), 1);
    // Its cancel request arrives at the new process, and is passed on.
    let cancel = own.cancel_token();
    let sleeps = tokio::spawn(async move {
        let slept = own.batch_execute("SELECT pg_sleep(600)").await;
        (slept, own)
    });
    while bench.column(SLEEPS).await.unwrap() == ["0"] {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    cancel.cancel_query(tokio_postgres::NoTls).await.unwrap();
    let (slept, own) = within(sleeps).await;
    assert_eq!(slept.unwrap_err().code().unwrap().code(), "57014");
    assert_eq!(pid(&own).await, before.0);
    assert!(!giving.is_finished());
    drop(own);
    assert_eq!(within(giving).await, Given::Done { handed: 1, left: 0 });
    assert_eq!(within(followed).await, Followed::Done { taken: 1, left: 0 });
    assert_eq!(handle.sessions().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_stays_for_too_long_is_told_that_the_proxy_ends() {
    let bench = bench().await;
    let own = bench.client().await.unwrap();
    own.batch_execute("CREATE TEMP TABLE mine AS SELECT 1 AS v")
        .await
        .unwrap();
    let (stream, giving) = give(&bench.proxy, Duration::from_secs(1));
    let taken = take(stream).await;
    assert_eq!(within(giving).await, Given::Done { handed: 0, left: 1 });
    assert_eq!(
        within(taken.followed).await,
        Followed::Done { taken: 0, left: 1 }
    );
    bench.proxy.shutdown(PATIENCE).await;
    assert!(own.query_one("SELECT v FROM mine", &[]).await.is_err());
    let next = bench.client_of(&taken.handle).await.unwrap();
    next.batch_execute("SELECT 1").await.unwrap();
}
