//! The workload against a plain PostgreSQL, without events, and the checker against damage made
//! on purpose: a check that cannot fail is a defect.

use std::time::Duration;

use helios_testkit::pg::{PgOptions, PgServer};
use tokio_postgres::Config;

use super::bank::{self, Fate, Notes};
use super::check::{Findings, check};
use super::client::{self, Outcome, Shared};
use super::crash::kill_server;
use super::plan::EventKind;
use super::report::{Done, Report, Run};

const CLIENTS: usize = 14;

fn shared() -> Shared {
    Shared {
        windows: std::sync::Arc::default(),
        live: std::sync::Arc::default(),
        stop: tokio_util::sync::CancellationToken::new(),
    }
}

async fn workload(config: &Config, shared: &Shared, time: Duration) -> Vec<Outcome> {
    let clients: Vec<_> = (0..CLIENTS)
        .map(|i| tokio::spawn(client::run(config.clone(), 42, i, CLIENTS, shared.clone())))
        .collect();
    tokio::time::sleep(time).await;
    shared.stop.cancel();
    let mut outcomes = Vec::new();
    for client in clients {
        outcomes.push(client.await.unwrap());
    }
    outcomes
}

/// Returns once every client but the long-running one has committed something.
async fn everybody_works(db: &tokio_postgres::Client) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let active: i64 = db
            .query_one("SELECT count(DISTINCT client) FROM ledger", &[])
            .await
            .unwrap()
            .get(0);
        if active >= CLIENTS as i64 - 1 {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{active} work");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn notes(outcomes: &[Outcome]) -> impl Iterator<Item = &Notes> {
    outcomes.iter().map(|o| &o.notes)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_checker_finds_what_is_damaged() {
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let db = server.connect().await.unwrap();
    db.batch_execute(&bank::schema(CLIENTS)).await.unwrap();
    let config: Config = server.conninfo().parse().unwrap();
    let outcomes = workload(&config, &shared(), Duration::from_secs(2)).await;

    for outcome in &outcomes {
        let errors: Vec<_> = outcome.recorder.errors.iter().collect();
        assert!(errors.is_empty(), "{:?}: {errors:?}", outcome.kind);
        let lines = outcome.notes.lines();
        assert!(!lines.is_empty(), "{:?} did nothing", outcome.kind);
        assert!(lines.iter().all(|n| n.fate == Fate::Acknowledged));
    }
    let good = check(&db, notes(&outcomes)).await.unwrap();
    assert!(good.good(), "{good:?}");
    let total: usize = notes(&outcomes).map(|n| n.lines().len()).sum();
    assert_eq!(good.acknowledged, total as u64);

    let damage = async |sql: &str, undo: &str| -> Findings {
        db.batch_execute(sql).await.unwrap();
        let found = check(&db, notes(&outcomes)).await.unwrap();
        assert!(!found.good(), "{sql}");
        assert!(!found.details.is_empty(), "{sql}");
        db.batch_execute(undo).await.unwrap();
        found
    };
    let one = "client = 3 AND n = 1";
    let lost = damage(
        &format!(
            "CREATE TABLE kept AS SELECT * FROM ledger WHERE {one}; DELETE FROM ledger WHERE {one}"
        ),
        "INSERT INTO ledger SELECT * FROM kept",
    )
    .await;
    assert_eq!((lost.lost, lost.duplicated, lost.balanced), (1, 0, false));
    let twice = damage(
        "INSERT INTO ledger SELECT * FROM kept",
        "DELETE FROM ledger WHERE ctid IN (SELECT max(ctid) FROM ledger GROUP BY client, n HAVING count(*) > 1)",
    )
    .await;
    assert_eq!(
        (twice.lost, twice.duplicated, twice.balanced),
        (0, 1, false)
    );
    let altered = damage(
        &format!("UPDATE ledger SET amount = amount + 1 WHERE {one}"),
        &format!("UPDATE ledger SET amount = amount - 1 WHERE {one}"),
    )
    .await;
    assert_eq!((altered.altered, altered.balanced), (1, false));
    let stranger = damage(
        "INSERT INTO ledger VALUES (99, 0, 1, 2, 0)",
        "DELETE FROM ledger WHERE client = 99",
    )
    .await;
    assert_eq!((stranger.phantom, stranger.balanced), (1, true));
    // Wrong in a way that the sum of all balances does not show.
    let shifted = damage(
        "UPDATE accounts SET balance = balance + CASE id WHEN 1 THEN 5 ELSE -5 END WHERE id IN (1, 2)",
        "UPDATE accounts SET balance = balance - CASE id WHEN 1 THEN 5 ELSE -5 END WHERE id IN (1, 2)",
    )
    .await;
    assert!(!shifted.balanced);
    assert!(check(&db, notes(&outcomes)).await.unwrap().good());
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_count_errors_and_go_on() {
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let db = server.connect().await.unwrap();
    db.batch_execute(&bank::schema(CLIENTS)).await.unwrap();
    let config: Config = server.conninfo().parse().unwrap();
    let shared = shared();
    let killer = async {
        // Once everybody has committed something, all connections are cut.
        everybody_works(&db).await;
        db.batch_execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'",
        )
        .await
        .unwrap();
    };
    let (outcomes, ()) = tokio::join!(workload(&config, &shared, Duration::from_secs(4)), killer);
    for outcome in &outcomes {
        let counts = &outcome.recorder.error_counts;
        assert_eq!(counts.len(), 1, "{:?}: {counts:?}", outcome.kind);
        assert_eq!(counts[0], (None, 1), "{:?}", outcome.recorder.errors);
        let last = outcome.notes.lines().last().unwrap();
        assert_eq!(last.fate, Fate::Acknowledged, "{:?}", outcome.kind);
    }
    let found = check(&db, notes(&outcomes)).await.unwrap();
    assert!(found.good(), "{found:?}");
}

/// The demo without the product: the same crash, no proxy. It must come out as failed, with every
/// client's error on the crash's account, and still with nothing lost (one server, no failover).
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_without_us_shows() {
    let mut server = PgServer::start(PgOptions::default()).await.unwrap();
    let db = server.connect().await.unwrap();
    db.batch_execute(&bank::schema(CLIENTS)).await.unwrap();
    let config: Config = server.conninfo().parse().unwrap();
    let shared = shared();
    let pid = i32::try_from(server.pid().unwrap()).unwrap();
    let crash = async {
        everybody_works(&db).await;
        let begun = shared.windows.begin(EventKind::Crash);
        let killed = kill_server(pid).unwrap();
        assert!(killed > CLIENTS, "only {killed} processes");
        server.crash();
        // The kernel may still be taking the killed processes down.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while let Err(error) = server.boot().await {
            assert!(std::time::Instant::now() < deadline, "{error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        shared.windows.moved();
        // Everybody's reconnect delay.
        tokio::time::sleep(Duration::from_millis(500)).await;
        shared.windows.settled();
        begun.elapsed()
    };
    let (outcomes, took) = tokio::join!(workload(&config, &shared, Duration::from_secs(6)), crash);
    let db = server.connect().await.unwrap();
    let findings = check(&db, notes(&outcomes)).await.unwrap();
    assert!(findings.good(), "{findings:?}");
    let report = Report::new(&Run {
        seed: 42,
        mode: "none",
        planned: (0, 1),
        seconds: took.as_secs_f64(),
        windows: &shared.windows.all(),
        done: &[Done {
            kind: EventKind::Crash,
            phases: Vec::new(),
        }],
        outcomes: &outcomes,
        findings: &findings,
        disk: None,
        faults: Vec::new(),
    });
    assert!(!report.ok());
    let json: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
    let errors = json["crashes"]["client_errors"].as_u64().unwrap();
    assert!(errors >= CLIENTS as u64, "{json}");
    assert_eq!(json["steady"]["client_errors"], 0, "{json}");
    assert!(json["crashes"]["pause_ms"]["max"].as_f64().unwrap() > 0.0);
}
