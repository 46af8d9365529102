//! The proxy in front of one server, which restarts where a cluster would switch over.
//!
//! Shows what the proxy alone does: sessions are frozen, lose their server processes, and are
//! rebuilt on the same data.

use std::time::Duration;

use helios_api::control::{Backend, DrainRequest, SessionInfo, Topology};
use helios_api::{Endpoint, Epoch, Host, Timeline};
use helios_proxy::auth::AuthMethod;
use helios_proxy::config::ProxyConfig;
use helios_proxy::engine::shared::EngineOptions;
use helios_proxy::{Proxy, ProxyHandle, ProxyOptions};
use helios_telemetry::metrics::Metrics;
use helios_testkit::{PgOptions, PgServer};
use tokio::sync::Mutex;
use tokio_postgres::Client;

use crate::Result;
use crate::driver::Target;

/// A server and its proxy.
#[derive(Debug)]
pub struct RestartingServer {
    proxy: ProxyHandle,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    server: PgServer,
    topology: Topology,
}

impl RestartingServer {
    /// Starts both.
    ///
    /// # Errors
    ///
    /// One of them did not start.
    pub async fn start() -> Result<Self> {
        let server = PgServer::start(PgOptions::default()).await?;
        let endpoint = Endpoint {
            host: Host::Tcp("127.0.0.1".to_owned()),
            port: server.port(),
        };
        let topology = Topology {
            epoch: Epoch(1),
            timeline: Timeline(1),
            primary: Backend {
                name: "pg-1".parse()?,
                endpoint,
            },
            fences: Vec::new(),
        };
        let config = ProxyConfig::default();
        let options = ProxyOptions {
            host: "127.0.0.1".to_owned(),
            port: 0,
            unix_socket_dir: None,
            auth: AuthMethod::Trust,
            tls: None,
            tls_required: false,
            backend_tls: config.backends.tls()?,
            service: config.backends.service_login()?,
            max_connections: 100,
            max_connections_per_user: None,
            login_timeout: Duration::from_secs(10),
            health_check_interval: Duration::from_secs(2),
            health_check_timeout: Duration::from_secs(2),
            engine: EngineOptions::default(),
            metrics: Metrics::new(),
        };
        let proxy = Proxy::start(options, topology.clone()).await?;
        Ok(Self {
            proxy,
            state: Mutex::new(State { server, topology }),
        })
    }

    /// Where clients connect to.
    #[must_use]
    pub fn target(&self) -> Target {
        Target {
            host: "127.0.0.1".to_owned(),
            port: self.proxy.port(),
            user: "postgres".to_owned(),
            password: String::new(),
            database: "postgres".to_owned(),
        }
    }

    /// A connection past the proxy.
    ///
    /// # Errors
    ///
    /// The server refused.
    pub async fn admin(&self) -> Result<Client> {
        Ok(self.state.lock().await.server.connect().await?)
    }

    /// Freezes the sessions, restarts the server, and lets the sessions be rebuilt.
    ///
    /// # Errors
    ///
    /// A step failed.
    pub async fn restart(&self) -> Result<()> {
        let mut state = self.state.lock().await;
        let epoch = state.topology.epoch;
        all_protected(&self.proxy.sessions())?;
        self.proxy
            .drain(&DrainRequest {
                epoch,
                timeout_ms: 30_000,
            })
            .await?;
        state.server.restart().await?;
        state.topology.epoch = epoch.next();
        // Sessions that failed tell their clients, who judge.
        self.proxy.resume(state.topology.clone()).await?;
        Ok(())
    }

    /// Stops both.
    pub async fn stop(self) {
        self.proxy.shutdown(Duration::from_secs(1)).await;
    }
}

/// A program of the tests holds no state that cannot move: an error that names it comes first.
pub(crate) fn all_protected(sessions: &[SessionInfo]) -> Result<()> {
    let reasons: Vec<&str> = sessions
        .iter()
        .filter_map(|s| s.unprotected.as_deref())
        .collect();
    if reasons.is_empty() {
        return Ok(());
    }
    Err(format!("not protected before the move: {reasons:?}").into())
}
