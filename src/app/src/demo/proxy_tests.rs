//! The workload through a proxy in front of one server, with planned moves onto fresh backends of
//! that server: what the clients see of the engine alone, without cluster and promotion.

use std::time::Duration;

use helios_api::control::{Backend, DrainRequest, Topology};
use helios_api::{Endpoint, Epoch, Host, Timeline};
use helios_proxy::auth::AuthMethod;
use helios_proxy::backend::{Credentials, Login};
use helios_proxy::engine::shared::EngineOptions;
use helios_proxy::tls::BackendTls;
use helios_proxy::{Proxy, ProxyOptions};
use helios_telemetry::Metrics;
use helios_testkit::pg::{PgOptions, PgServer};
use tokio_postgres::Config;
use tokio_util::sync::CancellationToken;

use super::bank;
use super::check::check;
use super::client::{self, Shared};
use super::plan::EventKind;
use super::report::{Done, Report, Run};

const CLIENTS: usize = 16;
const MOVES: u64 = 12;

fn options() -> ProxyOptions {
    ProxyOptions {
        host: "127.0.0.1".to_owned(),
        port: 0,
        unix_socket_dir: None,
        auth: AuthMethod::Trust,
        tls: None,
        tls_required: false,
        backend_tls: BackendTls::disabled(),
        service: Login {
            user: "postgres".to_owned(),
            database: "postgres".to_owned(),
            params: Vec::new(),
            credentials: Credentials::None,
        },
        max_connections: 100,
        max_connections_per_user: None,
        login_timeout: Duration::from_secs(5),
        health_check_interval: Duration::from_secs(1),
        health_check_timeout: Duration::from_secs(1),
        engine: EngineOptions::default(),
        metrics: Metrics::new(),
    }
}

fn topology(server: &PgServer, epoch: u64) -> Topology {
    Topology {
        epoch: Epoch(epoch),
        timeline: Timeline(1),
        primary: Backend {
            name: "one".parse().unwrap(),
            endpoint: Endpoint {
                host: Host::Tcp("127.0.0.1".to_owned()),
                port: server.port(),
            },
        },
        fences: Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn planned_moves_do_not_show() {
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let proxy = Proxy::start(options(), topology(&server, 1)).await.unwrap();
    let db = server.connect().await.unwrap();
    db.batch_execute(&bank::schema(CLIENTS)).await.unwrap();
    let address = format!(
        "host=127.0.0.1 port={} user=postgres dbname=postgres",
        proxy.port()
    );
    let config: Config = address.parse().unwrap();
    let shared = Shared {
        windows: std::sync::Arc::default(),
        live: std::sync::Arc::default(),
        stop: CancellationToken::new(),
    };
    let clients: Vec<_> = (0..CLIENTS)
        .map(|i| tokio::spawn(client::run(config.clone(), 7, i, CLIENTS, shared.clone())))
        .collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut done = Vec::new();
    for epoch in 1..=MOVES {
        shared.windows.begin(EventKind::Switchover);
        let request = DrainRequest {
            epoch: Epoch(epoch),
            timeout_ms: 5000,
        };
        let drained = proxy.drain(&request).await.unwrap();
        let resumed = proxy.resume(topology(&server, epoch + 1)).await.unwrap();
        shared.windows.moved();
        done.push(Done {
            kind: EventKind::Switchover,
            phases: vec![("drain", drained.micros), ("replay", resumed.micros)],
        });
        // Work between two moves, at different places of the clients' transactions.
        tokio::time::sleep(Duration::from_millis(300 + 37 * epoch)).await;
        shared.windows.settled();
    }
    shared.stop.cancel();
    let mut outcomes = Vec::new();
    for client in clients {
        outcomes.push(client.await.unwrap());
    }
    let findings = check(&db, outcomes.iter().map(|o| &o.notes)).await.unwrap();
    let report = Report::new(&Run {
        seed: 7,
        mode: "transaction",
        planned: (usize::try_from(MOVES).unwrap(), 0),
        seconds: 0.0,
        windows: &shared.windows.all(),
        done: &done,
        outcomes: &outcomes,
        findings: &findings,
        disk: None,
        faults: Vec::new(),
    });
    assert!(report.ok(), "{}", report.table());
    // Generous: two cores, a debug build, other tests beside it. A hang is seconds.
    let longest = done.iter().flat_map(|d| &d.phases).map(|(_, us)| *us).max();
    assert!(
        longest.is_some_and(|us| us < 2_000_000),
        "{}",
        report.table()
    );
    proxy.shutdown(Duration::from_secs(1)).await;
}
