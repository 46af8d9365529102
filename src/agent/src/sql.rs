//! SQL connections of the agent: to its own instance over the Unix socket, and to the primary that
//! it follows. Every statement has a limit on both sides, and `search_path` is pinned.

use std::sync::Arc;
use std::time::Duration;

use helios_api::agent::AgentError;
use helios_api::{Endpoint, Host};
use helios_control::PostgresTls;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage, Socket};

use crate::error::failed;

/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// How long a short statement may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(5);

/// Session settings: names cannot be hijacked, and our own writes wait for no standby.
const OPTIONS: &str = "-c search_path=pg_catalog -c synchronous_commit=local \
     -c default_transaction_read_only=off -c default_transaction_isolation=read\\ committed \
     -c client_min_messages=warning -c lock_timeout=2s -c jit=off \
     -c idle_in_transaction_session_timeout=0 -c idle_session_timeout=0";

/// What went wrong with a statement.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SqlError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("{}", describe(.0))]
    Server(#[from] tokio_postgres::Error),
    #[error("unexpected answer: {0}")]
    Answer(String),
}

impl From<SqlError> for AgentError {
    fn from(error: SqlError) -> Self {
        failed(error)
    }
}

/// The server's own words when there are any.
fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{} ({})", db.message(), db.code().code()),
        None => {
            use std::error::Error as _;
            let cause = error.source().map(|s| format!(": {s}"));
            format!("{error}{}", cause.unwrap_or_default())
        }
    }
}

/// Connects as the superuser over the Unix socket. `limit` becomes the session's
/// `statement_timeout`.
pub(crate) async fn connect(
    endpoint: &Endpoint,
    user: &str,
    limit: Duration,
) -> Result<Arc<Client>, SqlError> {
    establish(settings(endpoint, user, limit), NoTls).await
}

/// Connects to another instance: under TLS with our certificate, or with a password.
pub(crate) async fn connect_to_other(
    endpoint: &Endpoint,
    user: &str,
    password: Option<&str>,
    tls: Option<PostgresTls>,
    limit: Duration,
) -> Result<Arc<Client>, SqlError> {
    let mut config = settings(endpoint, user, limit);
    if let Some(password) = password {
        config.password(password);
    }
    match tls {
        Some(tls) => {
            config.ssl_mode(tokio_postgres::config::SslMode::Require);
            establish(config, tls).await
        }
        None => establish(config, NoTls).await,
    }
}

fn settings(endpoint: &Endpoint, user: &str, limit: Duration) -> Config {
    let mut config = Config::new();
    match &endpoint.host {
        Host::Tcp(name) => config.host(name),
        Host::Unix(dir) => config.host_path(dir),
    };
    config
        .port(endpoint.port)
        .user(user)
        .dbname("postgres")
        .application_name("helios-agent")
        .connect_timeout(CONNECT_LIMIT)
        .options(format!(
            "{OPTIONS} -c statement_timeout={}",
            limit.as_millis()
        ));
    config
}

async fn establish<T>(config: Config, tls: T) -> Result<Arc<Client>, SqlError>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
{
    let connecting = tokio::time::timeout(CONNECT_LIMIT, config.connect(tls));
    let (client, connection) = connecting
        .await
        .map_err(|_| SqlError::Timeout(CONNECT_LIMIT))??;
    // Ends with its client or with the server.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to PostgreSQL ended");
        }
    });
    Ok(Arc::new(client))
}

/// One row as text.
pub(crate) type Row = Vec<Option<String>>;

/// Runs a script in one round trip and returns the rows of all its statements.
pub(crate) async fn rows(
    client: &Client,
    script: &str,
    limit: Duration,
) -> Result<Vec<Row>, SqlError> {
    let messages = tokio::time::timeout(limit, client.simple_query(script))
        .await
        .map_err(|_| SqlError::Timeout(limit))??;
    Ok(messages.iter().filter_map(row).collect())
}

/// A row of an answer; `None` for what is not a row.
pub(crate) fn row(message: &SimpleQueryMessage) -> Option<Row> {
    match message {
        SimpleQueryMessage::Row(row) => Some(
            (0..row.len())
                .map(|i| row.get(i).map(str::to_owned))
                .collect(),
        ),
        _ => None,
    }
}

/// Runs a statement that answers one row.
pub(crate) async fn one(client: &Client, sql: &str, limit: Duration) -> Result<Row, SqlError> {
    let mut rows = rows(client, sql, limit).await?;
    match (rows.pop(), rows.pop()) {
        (Some(row), None) => Ok(row),
        _ => Err(SqlError::Answer("not exactly one row".to_owned())),
    }
}

/// A column of a row, parsed.
pub(crate) fn column<T: std::str::FromStr>(row: &Row, n: usize) -> Result<T, SqlError> {
    optional(row, n)?.ok_or_else(|| SqlError::Answer(format!("column {} is null", n + 1)))
}

/// A column that may be null.
pub(crate) fn optional<T: std::str::FromStr>(row: &Row, n: usize) -> Result<Option<T>, SqlError> {
    let Some(text) = row.get(n).and_then(Option::as_deref) else {
        return Ok(None);
    };
    text.parse()
        .map(Some)
        .map_err(|_| SqlError::Answer(format!("column {} is \"{text}\"", n + 1)))
}

/// A string as an SQL literal (`standard_conforming_strings` is on by default, and quoted so that
/// it does not matter).
pub(crate) fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}
