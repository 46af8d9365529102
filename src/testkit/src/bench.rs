//! A proxy in front of one real server, and moves onto fresh backends of that server.
//!
//! A move to the same server exercises everything but the loss of the old one: the transaction's
//! old backend is gone, so what the client goes on with was replayed. It takes milliseconds, where
//! a cluster takes seconds. The server can crash and come back, and a go-between can break what the
//! proxy says to it.

use std::io::{Error, Result};
use std::time::{Duration, Instant};

use helios_api::control::{Backend, DrainRequest, Fence, Topology};
use helios_api::{Endpoint, Epoch, Host, Lsn, Timeline, Xid};
use helios_proxy::auth::AuthMethod;
use helios_proxy::backend::{Credentials, Login};
use helios_proxy::engine::shared::EngineOptions;
use helios_proxy::tls::BackendTls;
use helios_proxy::{Proxy, ProxyHandle, ProxyOptions};
use helios_telemetry::metrics::Metrics;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::interpose::Interposed;
use crate::pg::{PgOptions, PgServer};

/// The proxy's own role; a go-between tells its connections from clients' by this name.
const SERVICE: &str = "helios";
/// How long the proxy may take to look at its server: health checks come every second.
const KNOWN_LIMIT: Duration = Duration::from_secs(20);

/// A server, the proxy in front of it, and a connection past the proxy.
#[derive(Debug)]
pub struct Bench {
    /// The server.
    pub server: PgServer,
    /// The proxy.
    pub proxy: ProxyHandle,
    /// A superuser's connection past the proxy.
    pub direct: Client,
    /// Between the two, once it was asked for.
    pub between: Option<Interposed>,
    epoch: u64,
}

impl Bench {
    /// Starts both, and runs `schema` past the proxy. `RUST_LOG` shows the proxy's log.
    ///
    /// # Errors
    /// One of them does not start, or the server refuses the schema.
    pub async fn start(engine: EngineOptions, schema: &str) -> Result<Self> {
        // A second call is refused, and that is fine.
        let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| "off".into());
        let _ = helios_telemetry::init(helios_telemetry::LogFormat::Text, &filter, None);
        let settings = PgOptions::default()
            .config("log_connections = on")
            .config("max_prepared_transactions = 10")
            // As an agent sets it: a restart must not take the log with the marks away.
            .config("wal_keep_size = 64MB");
        let server = PgServer::start(settings).await?;
        let direct = server.connect().await.map_err(Error::other)?;
        let role = format!("create role {SERVICE} superuser login");
        direct.batch_execute(&role).await.map_err(Error::other)?;
        direct.batch_execute(schema).await.map_err(Error::other)?;
        let proxy = Proxy::start(options(engine), topology(&server, 1)?).await;
        Ok(Self {
            proxy: proxy.map_err(Error::other)?,
            server,
            direct,
            between: None,
            epoch: 1,
        })
    }

    /// Waits until the proxy knows the server: when it started, and where its log stands.
    ///
    /// # Errors
    /// It does not within its limit.
    pub async fn known(&self) -> Result<()> {
        let asked = format!(
            "select count(distinct query) from pg_stat_activity where usename = '{SERVICE}' \
             and state = 'idle' and (query like 'SELECT pg_catalog.pg_postmaster_start_time()%' \
             or query like 'SELECT pg_catalog.pg_current_wal_flush_lsn()%')"
        );
        let deadline = Instant::now() + KNOWN_LIMIT;
        while self.column(&asked).await? != ["2"] {
            if Instant::now() > deadline {
                return Err(Error::other("the proxy has not looked at the server"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// A further proxy in front of the same server.
    ///
    /// # Errors
    /// It does not start.
    pub async fn another_proxy(&self, engine: EngineOptions) -> Result<ProxyHandle> {
        let proxy = Proxy::start(options(engine), self.topology()?).await;
        proxy.map_err(Error::other)
    }

    /// For clients of the proxy.
    #[must_use]
    pub fn conninfo(&self) -> String {
        conninfo_of(&self.proxy)
    }

    /// A client of the proxy's.
    ///
    /// # Errors
    /// It is not let in.
    pub async fn client(&self) -> Result<Client> {
        self.client_of(&self.proxy).await
    }

    /// A client of this proxy.
    ///
    /// # Errors
    /// It is not let in.
    pub async fn client_of(&self, proxy: &ProxyHandle) -> Result<Client> {
        let connected = tokio_postgres::connect(&conninfo_of(proxy), NoTls).await;
        let (client, connection) = connected.map_err(Error::other)?;
        tokio::spawn(async move { connection.await.ok() });
        Ok(client)
    }

    /// A planned move.
    ///
    /// # Errors
    /// The proxy refuses it.
    pub async fn switchover(&mut self) -> Result<()> {
        self.drain().await?;
        self.resume().await
    }

    /// The first half of a move: sessions stand still.
    ///
    /// # Errors
    /// The proxy refuses it.
    pub async fn drain(&self) -> Result<()> {
        self.drain_at(&self.proxy).await
    }

    /// The same at this proxy.
    ///
    /// # Errors
    /// The proxy refuses it.
    pub async fn drain_at(&self, proxy: &ProxyHandle) -> Result<()> {
        let request = DrainRequest {
            epoch: Epoch(self.epoch),
            timeout_ms: 2000,
        };
        let drained = proxy.drain(&request).await;
        drained.map(drop).map_err(Error::other)
    }

    /// How many sessions of clients the server has let in.
    #[must_use]
    pub fn logins(&self) -> usize {
        let user = "connection authorized: user=postgres database=postgres";
        self.server.log().matches(user).count()
    }

    /// The second half of a move; by itself it is one that nobody prepared.
    ///
    /// # Errors
    /// The proxy refuses it.
    pub async fn resume(&mut self) -> Result<()> {
        let topology = self.next_topology()?;
        let resumed = self.proxy.resume(topology).await;
        resumed.map(drop).map_err(Error::other)
    }

    /// The second half of a restart in place: the same epoch.
    ///
    /// # Errors
    /// The proxy refuses it.
    pub async fn resume_here(&mut self) -> Result<()> {
        let resumed = self.proxy.resume(self.topology()?).await;
        resumed.map(drop).map_err(Error::other)
    }

    /// The topology of this epoch.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn topology(&self) -> Result<Topology> {
        topology(&self.server, self.epoch)
    }

    /// The server as one that may become primary.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn candidate(&self) -> Result<Backend> {
        Ok(self.topology()?.primary)
    }

    /// The topology of the next epoch, for a move of the caller's.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn next_topology(&mut self) -> Result<Topology> {
        self.epoch += 1;
        topology(&self.server, self.epoch)
    }

    /// `kill -9` of the server with all its processes, and its start on the same directory.
    ///
    /// # Errors
    /// It does not come back.
    pub async fn crash(&mut self) -> Result<()> {
        self.server.crash();
        self.server.boot().await?;
        self.direct = self.server.connect().await.map_err(Error::other)?;
        Ok(())
    }

    /// Puts a go-between on the way from the proxy to the server.
    ///
    /// # Errors
    /// The socket cannot be replaced.
    pub fn interpose(&mut self) -> Result<&Interposed> {
        let socket = format!(".s.PGSQL.{}", self.server.port());
        let between = Interposed::install(&self.server.socket_dir().join(socket))?;
        Ok(self.between.insert(between))
    }

    /// The first column of what the database holds, past the proxy, as text.
    ///
    /// # Errors
    /// The server refuses the query.
    pub async fn column(&self, sql: &str) -> Result<Vec<String>> {
        let messages = self.direct.simple_query(sql).await.map_err(Error::other)?;
        let value = |m: &SimpleQueryMessage| match m {
            SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("null").to_owned()),
            _ => None,
        };
        Ok(messages.iter().filter_map(value).collect())
    }
}

fn conninfo_of(proxy: &ProxyHandle) -> String {
    let port = proxy.port();
    format!("host=127.0.0.1 port={port} user=postgres dbname=postgres")
}

/// The options of a bench's proxies.
#[must_use]
pub fn options(engine: EngineOptions) -> ProxyOptions {
    ProxyOptions {
        host: "127.0.0.1".into(),
        port: 0,
        unix_socket_dir: None,
        auth: AuthMethod::Trust,
        tls: None,
        tls_required: false,
        backend_tls: BackendTls::disabled(),
        // Another database than the sessions': nothing may rest on its being the same.
        service: Login {
            user: SERVICE.into(),
            database: "template1".into(),
            params: Vec::new(),
            credentials: Credentials::None,
        },
        max_connections: 100,
        max_connections_per_user: None,
        login_timeout: Duration::from_secs(5),
        health_check_interval: Duration::from_secs(1),
        health_check_timeout: Duration::from_secs(1),
        engine,
        metrics: Metrics::new(),
    }
}

/// The same server again, with evidence that everything it committed counts.
fn topology(server: &PgServer, epoch: u64) -> Result<Topology> {
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
    Ok(Topology {
        epoch: Epoch(epoch),
        timeline: Timeline(1),
        primary: Backend {
            name: "one".parse().map_err(Error::other)?,
            endpoint,
        },
        fences: fences.collect(),
    })
}
