//! Values of sequences that a client has seen inside a transaction stay true when it moves.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use helios_api::control::{Backend, DrainRequest, Fence, Topology};
use helios_api::{Endpoint, Epoch, Host, Lsn, Timeline, Xid};
use helios_proxy::auth::AuthMethod;
use helios_proxy::backend::{Credentials, Login};
use helios_proxy::engine::shared::EngineOptions;
use helios_proxy::tls::BackendTls;
use helios_proxy::{Proxy, ProxyHandle, ProxyOptions};
use helios_telemetry::metrics::Metrics;
use helios_testkit::pg::{PgOptions, PgServer};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

struct Bench {
    server: PgServer,
    proxy: ProxyHandle,
    direct: Client,
    epoch: u64,
}

fn topology(server: &PgServer, epoch: u64) -> Topology {
    let endpoint = Endpoint {
        host: Host::Unix(server.socket_dir().to_owned()),
        port: server.port(),
    };
    let fences = (2..=epoch).map(|e| Fence {
        epoch: Epoch(e),
        timeline: Timeline(1),
        fork: Lsn(0),
        xid: Some(Xid(u64::MAX)),
        lost: helios_api::control::LostCommits::None,
    });
    Topology {
        epoch: Epoch(epoch),
        timeline: Timeline(1),
        primary: Backend {
            name: "one".parse().unwrap(),
            endpoint,
        },
        fences: fences.collect(),
    }
}

impl Bench {
    /// A proxy whose own user logs in to another database than the sessions.
    async fn start(schema: &str) -> Self {
        let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| "off".into());
        let _ = helios_telemetry::init(helios_telemetry::LogFormat::Text, &filter, None);
        let server = PgServer::start(PgOptions::default()).await.unwrap();
        let service = Login {
            user: "postgres".into(),
            database: "template1".into(),
            params: Vec::new(),
            credentials: Credentials::None,
        };
        let options = ProxyOptions {
            host: "127.0.0.1".into(),
            port: 0,
            unix_socket_dir: None,
            auth: AuthMethod::Trust,
            tls: None,
            backend_tls: BackendTls::disabled(),
            service,
            max_connections: 100,
            max_connections_per_user: None,
            login_timeout: Duration::from_secs(5),
            health_check_interval: Duration::from_secs(1),
            health_check_timeout: Duration::from_secs(1),
            engine: EngineOptions::default(),
            metrics: Metrics::new(),
        };
        let proxy = Proxy::start(options, topology(&server, 1)).await.unwrap();
        let direct = server.connect().await.unwrap();
        direct.batch_execute(schema).await.unwrap();
        Self {
            server,
            proxy,
            direct,
            epoch: 1,
        }
    }

    async fn client(&self) -> Client {
        let config = format!(
            "host=127.0.0.1 port={} user=postgres dbname=postgres",
            self.proxy.port()
        );
        let (client, connection) = tokio_postgres::connect(&config, NoTls).await.unwrap();
        tokio::spawn(async move { connection.await.ok() });
        client
    }

    async fn switchover(&mut self) {
        let request = DrainRequest {
            epoch: Epoch(self.epoch),
            timeout_ms: 2000,
        };
        self.proxy.drain(&request).await.unwrap();
        self.epoch += 1;
        let next = topology(&self.server, self.epoch);
        self.proxy.resume(next).await.unwrap();
    }

    /// The only column of what the database holds, as numbers.
    async fn numbers(&self, sql: &str) -> Vec<i64> {
        numbers(&self.direct, sql).await
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

async fn code(client: &Client, sql: &str) -> String {
    let Err(error) = client.batch_execute(sql).await else {
        return "no error".into();
    };
    error
        .code()
        .map_or_else(|| error.to_string(), |c| c.code().to_owned())
}

const INSERT: &str = "INSERT INTO t (v) VALUES (1) RETURNING id";

async fn a_column_keeps_its_values(column: &str) {
    let mut bench = Bench::start(&format!("CREATE TABLE t (id {column} PRIMARY KEY, v int)")).await;
    let (client, other) = (bench.client().await, bench.client().await);
    numbers(&other, INSERT).await;
    client.batch_execute("BEGIN").await.unwrap();
    // simple query; several rows; extended query with text and binary results; prepared before
    let mut seen = numbers(&client, INSERT).await;
    seen.extend(
        numbers(
            &client,
            "INSERT INTO t (v) VALUES (1), (2), (3) RETURNING id, v",
        )
        .await,
    );
    let id = |row: &tokio_postgres::Row| -> i64 {
        row.try_get::<_, i64>(0)
            .or_else(|_| row.try_get::<_, i32>(0).map(i64::from))
            .or_else(|_| row.try_get::<_, i16>(0).map(i64::from))
            .unwrap()
    };
    seen.push(id(&client.query_one(INSERT, &[]).await.unwrap()));
    // another takes one in between
    numbers(&other, INSERT).await;
    let statement = client
        .prepare("INSERT INTO t (v) VALUES ($1) RETURNING id")
        .await
        .unwrap();
    for _ in 0..2 {
        seen.push(id(&client.query_one(&statement, &[&7]).await.unwrap()));
    }
    bench.switchover().await;
    seen.extend(numbers(&client, INSERT).await);
    bench.switchover().await;
    client.batch_execute("COMMIT").await.unwrap();
    let mut all = numbers(&other, INSERT).await;
    all.extend(&seen);
    let rows = bench.numbers("SELECT id FROM t").await;
    for id in &all {
        assert_eq!(
            rows.iter().filter(|r| *r == id).count(),
            1,
            "{id} in {rows:?}"
        );
    }
    assert_eq!(rows.len(), 11, "{rows:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn serial() {
    a_column_keeps_its_values("serial").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bigserial() {
    a_column_keeps_its_values("bigserial").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn smallserial() {
    a_column_keeps_its_values("smallserial").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn identity() {
    a_column_keeps_its_values("int GENERATED ALWAYS AS IDENTITY").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn identity_that_counts_down_in_steps() {
    a_column_keeps_its_values(
        "bigint GENERATED BY DEFAULT AS IDENTITY (INCREMENT -7 MINVALUE -1000000 START -5)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_statement_from_before_the_transaction() {
    let mut bench = Bench::start("CREATE TABLE t (id serial PRIMARY KEY, v int)").await;
    let client = bench.client().await;
    let statement = client.prepare(INSERT).await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let row = client.query_one(&statement, &[]).await.unwrap();
        seen.push(i64::from(row.get::<_, i32>(0)));
    }
    bench.switchover().await;
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(bench.numbers("SELECT id FROM t ORDER BY 1").await, seen);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_default_of_a_shared_sequence_in_a_schema_off_the_path() {
    let schema = "CREATE SCHEMA \"Odd one\"; CREATE SEQUENCE \"Odd one\".\"S\" INCREMENT 50; \
                  CREATE TABLE t (id int DEFAULT nextval('\"Odd one\".\"S\"'), v int)";
    let mut bench = Bench::start(schema).await;
    let client = bench.client().await;
    client.batch_execute("BEGIN").await.unwrap();
    let seen = numbers(&client, "INSERT INTO t (v) VALUES (1), (2) RETURNING id").await;
    assert_eq!(seen, [1, 51]);
    bench.switchover().await;
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(bench.numbers("SELECT id FROM t ORDER BY 1").await, seen);
}

#[tokio::test(flavor = "multi_thread")]
async fn nextval_by_itself() {
    let mut bench = Bench::start(
        "CREATE SCHEMA a; CREATE SEQUENCE a.s START 500 INCREMENT -1 MAXVALUE 1000; \
         CREATE SEQUENCE s; CREATE TABLE t (id bigint)",
    )
    .await;
    let client = bench.client().await;
    client
        .batch_execute("SET search_path = a, public")
        .await
        .unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    let row = client
        .query_one("SELECT nextval('s') AS id", &[])
        .await
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 500);
    client
        .batch_execute("SET LOCAL search_path = public")
        .await
        .unwrap();
    assert_eq!(numbers(&client, "SELECT nextval('s')").await, [1]);
    let sql = "SELECT nextval('s'::regclass) FROM generate_series(1, 3)";
    assert_eq!(numbers(&client, sql).await, [2, 3, 4]);
    let sql = "INSERT INTO t VALUES (nextval('s')) RETURNING id";
    assert_eq!(numbers(&client, sql).await, [5]);
    bench.switchover().await;
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(bench.numbers("SELECT id FROM t").await, [5]);
    assert!(bench.numbers("SELECT nextval('s')").await[0] > 5);
    assert!(bench.numbers("SELECT nextval('a.s')").await[0] < 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sessions_keep_their_interleaved_values() {
    let mut bench = Bench::start("CREATE TABLE t (id serial PRIMARY KEY, v int)").await;
    let (a, b) = (bench.client().await, bench.client().await);
    for client in [&a, &b] {
        client.batch_execute("BEGIN").await.unwrap();
    }
    let mut seen = Vec::new();
    for client in [&a, &b, &a, &b, &b, &a] {
        let row = client.query_one(INSERT, &[]).await.unwrap();
        seen.push(i64::from(row.get::<_, i32>(0)));
    }
    assert_eq!(seen, [1, 2, 3, 4, 5, 6]);
    // values that nobody has seen may be others
    a.batch_execute("INSERT INTO t (v) VALUES (9)")
        .await
        .unwrap();
    bench.switchover().await;
    for client in [&a, &b] {
        client.batch_execute("COMMIT").await.unwrap();
    }
    let rows = bench
        .numbers("SELECT id FROM t WHERE v = 1 ORDER BY 1")
        .await;
    assert_eq!(rows, seen);
    assert!(bench.numbers("SELECT id FROM t WHERE v = 9").await[0] > 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_sessions_move_at_once_and_no_value_comes_twice() {
    let mut bench = Bench::start("CREATE TABLE t (id serial PRIMARY KEY, v int)").await;
    let mut clients = Vec::new();
    let mut seen = Vec::new();
    for _ in 0..20 {
        let client = bench.client().await;
        client.batch_execute("BEGIN").await.unwrap();
        clients.push(client);
    }
    for _ in 0..3 {
        for client in &clients {
            let row = client.query_one(INSERT, &[]).await.unwrap();
            seen.push(i64::from(row.get::<_, i32>(0)));
        }
    }
    let began = std::time::Instant::now();
    bench.switchover().await;
    eprintln!("moved {} sessions in {:?}", clients.len(), began.elapsed());
    for client in &clients {
        seen.extend(numbers(client, INSERT).await);
        client.batch_execute("COMMIT").await.unwrap();
    }
    seen.sort_unstable();
    assert_eq!(bench.numbers("SELECT id FROM t ORDER BY 1").await, seen);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_the_client_chose_does_not_move_the_sequence() {
    let mut bench = Bench::start("CREATE TABLE t (id serial PRIMARY KEY, v int)").await;
    let client = bench.client().await;
    client.batch_execute("BEGIN").await.unwrap();
    let sql = "INSERT INTO t VALUES (2000000000, 1) RETURNING id";
    assert_eq!(numbers(&client, sql).await, [2_000_000_000]);
    assert_eq!(numbers(&client, INSERT).await, [1]);
    bench.switchover().await;
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(
        bench.numbers("SELECT id FROM t ORDER BY 1").await,
        [1, 2_000_000_000]
    );
    assert_eq!(bench.numbers("SELECT last_value FROM t_id_seq").await, [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_kept_is_an_honest_error_and_leaves_the_sequence_ahead() {
    let mut bench = Bench::start(
        "CREATE SEQUENCE s; CREATE SEQUENCE c CACHE 10; CREATE SEQUENCE y CYCLE; \
         CREATE TABLE t (id int DEFAULT nextval('s'), u text); CREATE VIEW v AS TABLE t; \
         CREATE TABLE w (id int); CREATE FUNCTION draw() RETURNS trigger LANGUAGE plpgsql \
         AS 'BEGIN NEW.id := nextval(''s''); RETURN NEW; END'; \
         CREATE TRIGGER draw BEFORE INSERT ON w FOR EACH ROW EXECUTE FUNCTION draw()",
    )
    .await;
    for sql in [
        "INSERT INTO t VALUES (DEFAULT, gen_random_uuid()) RETURNING id, u",
        "SELECT nextval('c')",
        "SELECT nextval('y')",
        "SELECT nextval('s' || '')",
        "SELECT nextval('s') + 1000, nextval('s')",
        "INSERT INTO v (u) VALUES (1) RETURNING id",
        "INSERT INTO w VALUES (0) RETURNING id",
        "INSERT INTO t SELECT nextval('s') * 2 FROM generate_series(1, 2) RETURNING id",
    ] {
        let client = bench.client().await;
        client.batch_execute("BEGIN").await.unwrap();
        client.simple_query(sql).await.unwrap();
        bench.switchover().await;
        assert_eq!(code(&client, "SELECT 1").await, "40001", "{sql}");
        client.batch_execute("ROLLBACK").await.unwrap();
        let next = bench.numbers("SELECT nextval('s') + nextval('c')").await[0];
        assert!(next > 2, "{sql}: {next}");
    }
}

/// The server dies while sequences are set back, again and again; afterwards nobody gets a value
/// that another has.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_is_broken_off_leaves_no_sequence_behind() {
    let mut bench = Bench::start("CREATE TABLE t (id serial, v int)").await;
    let client = bench.client().await;
    numbers(
        &client,
        "INSERT INTO t (v) SELECT 0 FROM generate_series(1, 20) RETURNING id",
    )
    .await;
    client.batch_execute("BEGIN").await.unwrap();
    for _ in 0..40 {
        numbers(&client, INSERT).await;
    }
    // One connection of the replay is ended at a time, whichever is there.
    let breaking = bench.server.connect().await.unwrap();
    let ends = tokio::spawn(async move {
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                   WHERE pid <> pg_backend_pid() AND query LIKE '%setval%'";
        let mut ended = 0;
        for _ in 0..400 {
            let row = breaking.query_one(sql, &[]).await.unwrap();
            ended += row.get::<_, i64>(0);
            if ended > 3 {
                break;
            }
        }
        ended
    });
    bench.switchover().await;
    let committed = client.batch_execute("COMMIT").await;
    assert!(ends.await.unwrap() > 0, "nothing was broken off");
    let rows = bench.numbers("SELECT id FROM t ORDER BY 1").await;
    assert_eq!(rows.len(), if committed.is_ok() { 60 } else { 20 });
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while bench.numbers("SELECT last_value FROM t_id_seq").await[0] < 60 {
        assert!(
            std::time::Instant::now() < deadline,
            "the sequence stays set back"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let next = numbers(&bench.client().await, INSERT).await[0];
    assert!(next > 60, "{next}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_the_transaction_has_locked_does_not_stop_the_move() {
    let mut bench = Bench::start("CREATE TABLE t (id serial PRIMARY KEY, v int)").await;
    let (client, other) = (bench.client().await, bench.client().await);
    client
        .batch_execute("BEGIN; TRUNCATE t RESTART IDENTITY")
        .await
        .unwrap();
    assert_eq!(numbers(&client, INSERT).await, [1]);
    bench.switchover().await;
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(bench.numbers("SELECT id FROM t").await, [1]);
    assert_eq!(numbers(&other, INSERT).await, [2]);
}
