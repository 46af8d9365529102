//! The beginning of a cluster, as far as it is this side's: the application's role and database, the
//! user's SQL in it, and what is said of it and of the first primary.
//!
//! Invariant: the user's SQL is committed once: in one transaction with the mark that it was, and
//! only in a database that was made here.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use helios_api::InstanceName;
use helios_api::agent::AgentCommand;
use helios_api::v1alpha1::{ConditionType, Initdb, KeyOf, names};
use helios_cluster::{Action, ClusterState, Finished, Mode, Observation};
use helios_wire::scram::{DEFAULT_ITERATIONS, build_verifier};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{Api, Client as Kube};
use tokio::sync::Notify;
use tokio_postgres::Client;

use super::act::At;
use super::sql::{connect_to, describe, identifier, literal};
use super::{Input, Verdict};
use crate::OperatorError;

/// Reasons of the condition that people have to do something about.
pub(super) const NO_PRIMARY: &str = "FirstPrimaryFailed";
pub(super) const NO_DATABASE: &str = "DatabaseFailed";

/// How long role and database may take: `create database` copies a template.
const MAKE_LIMIT: Duration = Duration::from_secs(60);
/// How long the user's SQL may take, all of it.
const SCRIPT_LIMIT: Duration = Duration::from_secs(600);
/// Pause after an attempt that failed, doubled up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The longest words of PostgreSQL's that are passed on.
const WORDS: usize = 500;

/// Settings: a standby that is not there yet must not hold this up.
const PLAIN: &str = "-c synchronous_commit=local -c search_path=pg_catalog";
/// The same for the user's SQL, which finds its names as ever.
const USERS: &str = "-c synchronous_commit=local -c statement_timeout=600s -c lock_timeout=60s";

/// The mark, a comment on the service's role: it is in a catalog that all databases share, so that it
/// is there before the database is, and part of the transaction that changes it.
const BEING_MADE: &str = "helios: the application's database is being made";
const MADE: &str = "helios: the application's database was made";

/// How far it is; nothing of it has to outlive this process.
#[derive(Debug, Default)]
pub(super) struct First {
    work: Arc<Mutex<Work>>,
    /// Why there is no first primary yet.
    primary: Option<String>,
}

#[derive(Debug, Default)]
struct Work {
    made: bool,
    running: bool,
    failures: u32,
    again: Option<Instant>,
    why: Option<String>,
}

impl First {
    fn work(&self) -> std::sync::MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the application's role and database are there, and the user's SQL was run.
    pub(super) fn made(&self) -> bool {
        self.work().made
    }

    /// Takes note of how the making of a primary ended.
    pub(super) fn note(&mut self, end: &Finished) {
        let Action::Agent { instance, request } = &end.action else {
            return;
        };
        let makes = matches!(
            request.command,
            AgentCommand::Bootstrap | AgentCommand::StartPrimary
        );
        if makes {
            let failure = end.result.as_ref().err();
            self.primary = failure.map(|why| format!("instance \"{instance}\": {}", words(why)));
        }
    }

    /// What is said of it.
    pub(super) fn verdict(
        &self,
        (state, obs): (&ClusterState, &Observation),
        made: bool,
    ) -> Verdict {
        let kind = ConditionType::Bootstrapped;
        if made {
            return Verdict::good(kind, "Made", "the application's database was made");
        }
        match (&state.mode, &self.primary, &self.work().why) {
            (Mode::Bootstrap, Some(why), _) => Verdict::bad(kind, NO_PRIMARY, why),
            (Mode::Steady | Mode::Moving(_), _, Some(why)) => Verdict::bad(kind, NO_DATABASE, why),
            (Mode::Bootstrap, None, _) => {
                let missing = obs.kept.iter().find(|name| obs.agent(name).is_none());
                let waits = |name: &InstanceName| {
                    format!(
                        "instance \"{name}\" is waited for: its volume is older than the cluster, \
                         and may hold the latest data"
                    )
                };
                let making = || "the first primary is being made".to_owned();
                Verdict::bad(kind, "Beginning", &missing.map_or_else(making, waits))
            }
            (Mode::Steady | Mode::Moving(_), _, None) => Verdict::bad(
                kind,
                "Beginning",
                "the application's database is being made",
            ),
        }
    }

    /// Makes the application's role and database and runs the user's SQL, unless that is being done
    /// or has just failed.
    pub(super) fn make_database(
        &self,
        kube: &Kube,
        input: &Input,
        primary: At,
        changed: &Arc<Notify>,
    ) {
        {
            let mut work = self.work();
            let waits = work.again.is_some_and(|at| Instant::now() < at);
            if work.running || work.made || waits {
                return;
            }
            work.running = true;
        }
        let (kube, input, changed) = (kube.clone(), input.clone(), Arc::clone(changed));
        let work = Arc::clone(&self.work);
        tokio::spawn(async move {
            let done = make(&kube, &primary, &input).await;
            let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
            work.running = false;
            match done {
                Ok(()) => {
                    work.made = true;
                    work.why = None;
                }
                Err(error) => {
                    tracing::warn!(%error, "application's database could not be made; tried again");
                    let pause = FIRST_PAUSE.saturating_mul(1 << work.failures.min(10));
                    work.failures = work.failures.saturating_add(1);
                    work.again = Some(Instant::now() + pause.min(LONGEST_PAUSE));
                    work.why = Some(words(&error));
                }
            }
            drop(work);
            changed.notify_one();
        });
    }
}

/// As many of the words as are passed on.
fn words(why: &dyn std::fmt::Display) -> String {
    why.to_string().chars().take(WORDS).collect()
}

/// SQL of the user's, and what it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Statement {
    from: String,
    sql: String,
}

async fn make(kube: &Kube, primary: &At, input: &Input) -> Result<(), OperatorError> {
    // First: what cannot be read leaves nothing half made.
    let bootstrap = &input.cluster.spec.bootstrap;
    let Initdb {
        database, owner, ..
    } = &bootstrap.initdb;
    let script = script(kube, &input.cluster.namespace, &bootstrap.initdb).await?;
    let plain = connect_to(primary, &input.secrets, "postgres", PLAIN).await?;
    let password = &input.secrets.app_password;
    let new = limited(MAKE_LIMIT, prepare(&plain, &bootstrap.initdb, password)).await?;
    if !new {
        return Ok(());
    }
    let mut client = connect_to(primary, &input.secrets, database, USERS).await?;
    limited(SCRIPT_LIMIT, run(&mut client, owner, &script)).await
}

async fn limited<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, OperatorError>>,
) -> Result<T, OperatorError> {
    let late = |_| OperatorError::Sql(format!("no answer within {limit:?}"));
    tokio::time::timeout(limit, work).await.map_err(late)?
}

fn failed(error: &tokio_postgres::Error) -> OperatorError {
    OperatorError::Sql(describe(error))
}

/// All SQL of the user's, in order.
async fn script(
    kube: &Kube,
    space: &str,
    initdb: &Initdb,
) -> Result<Vec<Statement>, OperatorError> {
    let field = "spec.bootstrap.initdb.sql";
    let numbered = |(number, sql): (usize, &String)| Statement {
        from: format!("{field}[{number}]"),
        sql: sql.clone(),
    };
    let mut all: Vec<_> = initdb.sql.iter().enumerate().map(numbered).collect();
    let Some(source) = &initdb.sql_from else {
        return Ok(all);
    };
    if let Some(KeyOf { name, key }) = &source.config_map {
        let api: Api<ConfigMap> = Api::namespaced(kube.clone(), space);
        let map = api.get_opt(name).await?;
        let from = format!("key \"{key}\" of ConfigMap \"{name}\"");
        let text = map.and_then(|map| map.data?.remove(key));
        all.push(statement(from, text)?);
    }
    if let Some(KeyOf { name, key }) = &source.secret {
        let api: Api<Secret> = Api::namespaced(kube.clone(), space);
        let secret = api.get_opt(name).await?;
        let from = format!("key \"{key}\" of Secret \"{name}\"");
        let bytes = secret.and_then(|secret| secret.data?.remove(key));
        let text = bytes.and_then(|bytes| String::from_utf8(bytes.0).ok());
        all.push(statement(from, text)?);
    }
    Ok(all)
}

fn statement(from: String, sql: Option<String>) -> Result<Statement, OperatorError> {
    match sql {
        Some(sql) => Ok(Statement { from, sql }),
        None => Err(OperatorError::Sql(format!(
            "spec.bootstrap.initdb.sqlFrom: there is no {from}"
        ))),
    }
}

/// Makes role and database, unless they are there; whether the user's SQL is to be run.
async fn prepare(client: &Client, initdb: &Initdb, password: &str) -> Result<bool, OperatorError> {
    make_role(client, &initdb.owner, password)
        .await
        .map_err(|e| failed(&e))?;
    make_database(client, &initdb.database, &initdb.owner)
        .await
        .map_err(|e| failed(&e))
}

/// Makes a role that can log in. One that is there, of a server that was copied or of an earlier
/// cluster, gets the password that applications are told.
async fn make_role(
    client: &Client,
    name: &str,
    password: &str,
) -> Result<(), tokio_postgres::Error> {
    let role = "select 1 from pg_catalog.pg_roles where rolname = $1";
    let verb = match client.query_opt(role, &[&name]).await? {
        None => "create",
        Some(_) => "alter",
    };
    // A verifier: what is sent is seen by logs, statistics and whoever looks on.
    let salt: [u8; 16] = rand::random();
    let verifier = literal(&build_verifier(password, &salt, DEFAULT_ITERATIONS));
    let name = identifier(name);
    let sql = format!("{verb} role {name} login password {verifier}");
    client.batch_execute(&sql).await
}

/// Makes a database, marked as being made; whether it is, by this or an earlier attempt.
async fn make_database(
    client: &Client,
    name: &str,
    owner: &str,
) -> Result<bool, tokio_postgres::Error> {
    let there = "select 1 from pg_catalog.pg_database where datname = $1";
    if client.query_opt(there, &[&name]).await?.is_none() {
        client.batch_execute(&mark(BEING_MADE)).await?;
        let (name, owner) = (identifier(name), identifier(owner));
        let sql = format!("create database {name} owner {owner}");
        client.batch_execute(&sql).await?;
        return Ok(true);
    }
    let marked = "select pg_catalog.shobj_description(oid, 'pg_authid') = $2 \
                  from pg_catalog.pg_authid where rolname = $1";
    let row = client
        .query_opt(marked, &[&names::SERVICE_USER, &BEING_MADE])
        .await?;
    Ok(row.is_some_and(|row| row.get::<_, Option<bool>>(0) == Some(true)))
}

fn mark(text: &str) -> String {
    let role = identifier(names::SERVICE_USER);
    format!("comment on role {role} is {}", literal(text))
}

/// Runs the user's SQL as the database's owner, and marks the database as made: both or neither.
async fn run(client: &mut Client, owner: &str, script: &[Statement]) -> Result<(), OperatorError> {
    let transaction = client.transaction().await.map_err(|e| failed(&e))?;
    for Statement { from, sql } in script {
        let role = format!("set local role {}", identifier(owner));
        transaction
            .batch_execute(&role)
            .await
            .map_err(|e| failed(&e))?;
        let ran = transaction.batch_execute(sql).await;
        ran.map_err(|e| OperatorError::Sql(format!("{from}: {}", describe(&e))))?;
    }
    let end = format!("reset role; {}", mark(MADE));
    transaction
        .batch_execute(&end)
        .await
        .map_err(|e| failed(&e))?;
    transaction.commit().await.map_err(|e| failed(&e))
}

#[cfg(test)]
#[path = "first_tests.rs"]
mod tests;
