//! SQL on the primary, as the service's superuser, under TLS with the operator's certificate.

use std::time::Duration;

use helios_api::Host;
use helios_api::v1alpha1::names;
use helios_control::PostgresTls;
use helios_wire::scram::{DEFAULT_ITERATIONS, build_verifier};
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config};

use super::Input;
use super::act::At;
use crate::OperatorError;
use crate::secret::Secrets;

/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How long the last commit's confirmation may take: sessions are held meanwhile.
const COMMIT_LIMIT: Duration = Duration::from_secs(3);
/// How long role and database may take: `create database` copies a template.
const MAKE_LIMIT: Duration = Duration::from_secs(60);

/// Connects to an instance.
pub(super) async fn connect(
    (name, endpoint): &At,
    secrets: &Secrets,
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
        .dbname("postgres")
        .application_name("helios-operator")
        .ssl_mode(SslMode::Require)
        // A role's or database's setting is not to count.
        .options("-c synchronous_commit=on -c search_path=pg_catalog");
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

fn describe(error: &tokio_postgres::Error) -> String {
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

/// Makes the application's role and database, unless they are there.
pub(super) async fn make_database(primary: &At, input: &Input) -> Result<(), OperatorError> {
    let client = connect(primary, &input.secrets).await?;
    let initdb = &input.cluster.spec.bootstrap.initdb;
    let password = &input.secrets.app_password;
    let make = async {
        // A standby that is not there yet must not hold this up.
        client
            .batch_execute("set synchronous_commit = local")
            .await?;
        let role = "select 1 from pg_catalog.pg_roles where rolname = $1";
        if client.query_opt(role, &[&initdb.owner]).await?.is_none() {
            // A verifier: what is sent is seen by logs, statistics and whoever looks on.
            let salt: [u8; 16] = rand::random();
            let verifier = literal(&build_verifier(password, &salt, DEFAULT_ITERATIONS));
            let owner = identifier(&initdb.owner);
            let sql = format!("create role {owner} login password {verifier}");
            client.batch_execute(&sql).await?;
        }
        let database = "select 1 from pg_catalog.pg_database where datname = $1";
        let there = client.query_opt(database, &[&initdb.database]).await?;
        if there.is_none() {
            let (database, owner) = (identifier(&initdb.database), identifier(&initdb.owner));
            let sql = format!("create database {database} owner {owner}");
            client.batch_execute(&sql).await?;
        }
        Ok::<_, tokio_postgres::Error>(())
    };
    match tokio::time::timeout(MAKE_LIMIT, make).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(OperatorError::Sql(describe(&error))),
        Err(_) => Err(OperatorError::Sql(format!(
            "no answer within {MAKE_LIMIT:?}"
        ))),
    }
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A literal for a server with standard_conforming_strings, which is the default everywhere.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
