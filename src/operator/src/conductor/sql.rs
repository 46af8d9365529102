//! SQL on the primary, as the service's superuser, under TLS with the operator's certificate.

use std::time::Duration;

use helios_api::Host;
use helios_api::v1alpha1::names;
use helios_control::PostgresTls;
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config};

use super::act::At;
use crate::OperatorError;
use crate::secret::Secrets;

/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How long the last commit's confirmation may take: sessions are held meanwhile.
const COMMIT_LIMIT: Duration = Duration::from_secs(3);
/// Settings of a session: what is set for a role or a database is not to count.
const OWN: &str = "-c synchronous_commit=on -c search_path=pg_catalog";

/// Connects to an instance.
pub(super) async fn connect(at: &At, secrets: &Secrets) -> Result<Client, OperatorError> {
    connect_to(at, secrets, "postgres", OWN).await
}

/// Connects to one of its databases, with settings of one's own.
pub(super) async fn connect_to(
    (name, endpoint): &At,
    secrets: &Secrets,
    database: &str,
    options: &str,
) -> Result<Client, OperatorError> {
    let failed = |why: &dyn std::fmt::Display| {
        OperatorError::Sql(format!("could not connect to \"{name}\": {why}"))
    };
    let Host::Tcp(host) = &endpoint.host else {
        return Err(failed(&"it has no address"));
    };
    let mut config = Config::new();
    config
        .host(host)
        .port(endpoint.port)
        .user(names::SERVICE_USER)
        .dbname(database)
        .application_name("helios-operator")
        .ssl_mode(SslMode::Require)
        .options(options);
    let tls = PostgresTls::new(name.as_str(), &secrets.operator)?;
    match tokio::time::timeout(CONNECT_LIMIT, config.connect(tls)).await {
        Ok(Ok((client, connection))) => {
            tokio::spawn(connection);
            Ok(client)
        }
        Ok(Err(error)) => Err(failed(&describe(&error))),
        Err(_) => Err(failed(&format_args!("no answer within {CONNECT_LIMIT:?}"))),
    }
}

pub(super) fn describe(error: &tokio_postgres::Error) -> String {
    use std::error::Error as _;
    match (error.as_db_error(), error.source()) {
        (Some(db), _) => db.to_string(),
        (None, Some(source)) => format!("{error}: {source}"),
        (None, None) => error.to_string(),
    }
}

/// Returns when everything that has been committed is confirmed: WAL is linear.
pub(super) async fn last_commit(client: &Client) -> Result<(), OperatorError> {
    let commit = client
        .batch_execute("select pg_catalog.pg_logical_emit_message(true, 'helios', 'switchover')");
    match tokio::time::timeout(COMMIT_LIMIT, commit).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(OperatorError::Sql(format!(
            "last commit: {}",
            describe(&error)
        ))),
        Err(_) => Err(OperatorError::Sql(format!(
            "no standby confirmed the last commit within {COMMIT_LIMIT:?}"
        ))),
    }
}

pub(super) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A literal for a server with standard_conforming_strings, which is the default everywhere.
pub(super) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
