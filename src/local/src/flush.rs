//! The last commit before a planned move: a synchronous one, behind everything that was committed.
//!
//! A session may have committed with `synchronous_commit = off` or `local`. WAL is linear, so once
//! this commit is confirmed, so is everything before it, and the primary can be stopped at once.

use std::time::Duration;

use helios_api::{Endpoint, Host};
use tokio::sync::Mutex;
use tokio_postgres::{Client, Config, NoTls};

use crate::credentials::SERVICE_USER;

/// How long the confirmation may take: sessions are held meanwhile.
const LIMIT: Duration = Duration::from_secs(3);
/// How long a connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// `local` would not wait, and a role's or database's setting is not to count.
const OPTIONS: &str = "-c synchronous_commit=on -c search_path=pg_catalog";

/// A connection to the primary that is made before anybody is held.
#[derive(Debug, Default)]
pub(crate) struct Flush {
    client: Mutex<Option<Client>>,
}

impl Flush {
    /// Connects; without it [`Self::run`] does.
    pub(crate) async fn prepare(&self, primary: &Endpoint) {
        match connect(primary).await {
            Ok(client) => *self.client.lock().await = Some(client),
            Err(error) => tracing::debug!(error, "no connection ahead of time"),
        }
    }

    /// Returns when everything that has been committed is confirmed.
    pub(crate) async fn run(&self, primary: &Endpoint) -> Result<(), String> {
        let ready = self
            .client
            .lock()
            .await
            .take()
            .filter(|client| !client.is_closed());
        let client = match ready {
            Some(client) => client,
            None => connect(primary).await?,
        };
        let commit = client.batch_execute(
            "select pg_catalog.pg_logical_emit_message(true, 'helios', 'switchover')",
        );
        match tokio::time::timeout(LIMIT, commit).await {
            Ok(result) => result.map_err(|e| format!("last commit: {e}")),
            Err(_) => Err(format!(
                "no standby confirmed the last commit within {LIMIT:?}"
            )),
        }
    }
}

async fn connect(primary: &Endpoint) -> Result<Client, String> {
    let mut config = Config::new();
    match &primary.host {
        Host::Unix(dir) => config.host_path(dir),
        Host::Tcp(host) => config.host(host),
    };
    config
        .port(primary.port)
        .user(SERVICE_USER)
        .dbname("postgres")
        .application_name("helios-controller")
        .options(OPTIONS);
    match tokio::time::timeout(CONNECT_LIMIT, config.connect(NoTls)).await {
        Ok(Ok((client, connection))) => {
            tokio::spawn(connection);
            Ok(client)
        }
        Ok(Err(error)) => Err(format!("could not connect to the primary: {error}")),
        Err(_) => Err(format!(
            "could not connect to the primary within {CONNECT_LIMIT:?}"
        )),
    }
}
