//! The application's database on a real server: what the catalogs hold, whatever was cut off before.

use super::*;
use crate::mock::{Call, Mock, refusal};
use helios_testkit::pg::{PgOptions, PgServer};
use serde_json::{Value, json};

fn initdb(value: Value) -> Initdb {
    serde_json::from_value(value).unwrap()
}

/// A server with the service's role, and the role's session.
async fn server() -> (PgServer, Client) {
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let first = server.connect().await.unwrap();
    first
        .batch_execute("create role helios superuser login")
        .await
        .unwrap();
    let client = session(&server, "postgres").await;
    (server, client)
}

async fn session(server: &PgServer, database: &str) -> Client {
    let port = server.port();
    let info = format!("host=127.0.0.1 port={port} user=helios dbname={database}");
    server.connect_as(&info).await.unwrap()
}

fn statements(all: &[&str]) -> Vec<Statement> {
    let one = |(n, sql): (usize, &&str)| Statement {
        from: format!("sql[{n}]"),
        sql: (*sql).to_owned(),
    };
    all.iter().enumerate().map(one).collect()
}

async fn text(client: &Client, sql: &str) -> String {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn sql_is_run_once_as_the_owner_and_what_fails_leaves_nothing() {
    let (server, client) = server().await;
    let wanted = initdb(json!({"database": "sh\"op", "owner": "o'brien"}));
    assert!(prepare(&client, &wanted, "secret").await.unwrap());
    // Cut off here: the next attempt knows that the database is its own.
    assert!(prepare(&client, &wanted, "secret").await.unwrap());
    let mut inside = session(&server, "'sh\"op'").await;
    let bad = statements(&["create table t (n int)", "insert into t values ('x')"]);
    let refused = run(&mut inside, "o'brien", &bad).await.unwrap_err();
    let refused = refused.to_string();
    assert!(
        refused.starts_with("sql[1]: ") && refused.contains("invalid input"),
        "{refused}"
    );
    assert!(prepare(&client, &wanted, "secret").await.unwrap());
    let good = statements(&[
        "create table t (n int); insert into t values (1)",
        "reset role; create table of_helios (n int)",
        "insert into t select n + 1 from t",
    ]);
    run(&mut inside, "o'brien", &good).await.unwrap();
    assert_eq!(
        text(&inside, "select string_agg(n::text, ',' order by n) from t").await,
        "1,2"
    );
    let owner = "select string_agg(tableowner, ',' order by tablename) from pg_tables \
                 where schemaname = 'public'";
    assert_eq!(text(&inside, owner).await, "helios,o'brien");
    // It is made: never again, by whomever.
    assert!(!prepare(&client, &wanted, "secret").await.unwrap());
}

#[tokio::test]
async fn a_database_that_was_not_made_here_is_left_as_it_is() {
    let (_server, client) = server().await;
    for sql in ["create role app", "create database app owner app"] {
        client.batch_execute(sql).await.unwrap();
    }
    let found = initdb(json!({"sql": ["select 1"]}));
    assert!(!prepare(&client, &found, "secret").await.unwrap());
    // Its owner gets the password that applications are told.
    let password = "select rolpassword from pg_authid where rolname = 'app'";
    assert!(text(&client, password).await.starts_with("SCRAM-SHA-256$"));
    let login = "select rolcanlogin::text from pg_roles where rolname = 'app'";
    assert_eq!(text(&client, login).await, "true");
}

#[tokio::test]
async fn a_reference_is_read_and_one_that_leads_nowhere_is_named() {
    let secret = json!({"metadata": {"name": "s"}, "data": {"k": "c2VsZWN0IDI="}});
    let map = json!({"metadata": {"name": "m"}, "data": {"k": "select 3"}});
    let mock = Mock::start(move |call: &Call| match call.what.rsplit('/').next() {
        Some("s") => (200, secret.clone()),
        Some("m") => (200, map.clone()),
        _ => refusal(404, "not found"),
    })
    .await;
    let read = async |from: Value| {
        let all = initdb(json!({"sql": ["select 1"], "sqlFrom": from}));
        let read = script(&mock.client, "shop", &all).await;
        read.map(|all| all.into_iter().map(|s| s.sql).collect::<Vec<_>>())
    };
    let of = |name: &str, key: &str| json!({"name": name, "key": key});
    let secret = read(json!({"secret": of("s", "k")})).await.unwrap();
    assert_eq!(secret, ["select 1", "select 2"]);
    let map = read(json!({"configMap": of("m", "k")})).await.unwrap();
    assert_eq!(map, ["select 1", "select 3"]);
    for (from, named) in [
        (
            json!({"secret": of("s", "other")}),
            "no key \"other\" of Secret \"s\"",
        ),
        (
            json!({"configMap": of("gone", "k")}),
            "no key \"k\" of ConfigMap \"gone\"",
        ),
    ] {
        let error = read(from).await.unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    let space = "GET /api/v1/namespaces/shop";
    assert_eq!(
        mock.lines(),
        [
            format!("{space}/secrets/s"),
            format!("{space}/configmaps/m"),
            format!("{space}/secrets/s"),
            format!("{space}/configmaps/gone"),
        ]
    );
}

#[test]
fn what_stands_in_the_way_is_said_and_forgotten() {
    use helios_api::Epoch;
    use helios_api::agent::AgentReply;
    use helios_cluster::{Failure, Reply};
    let mut first = First::default();
    let mut obs = Observation::default();
    let mut state = ClusterState::default();
    let mut end = Finished {
        action: Action::agent(&"pg-1".parse().unwrap(), Epoch(1), AgentCommand::Bootstrap),
        result: Err(Failure::Failed("could not reach the server".to_owned())),
    };
    assert_eq!(first.verdict((&state, &obs), false).reason, "Beginning");
    // An instance that may hold data is waited for, and named.
    obs.kept = ["pg-2".parse().unwrap()].into();
    let said = first.verdict((&state, &obs), false).message;
    assert!(said.contains("pg-2"), "{said}");
    first.note(&end);
    let said = first.verdict((&state, &obs), false);
    assert_eq!((said.good, said.reason), (false, NO_PRIMARY));
    assert_eq!(
        said.message,
        "instance \"pg-1\": could not reach the server"
    );
    end.result = Ok(Reply::Agent(AgentReply::Done));
    first.note(&end);
    state.mode = Mode::Steady;
    assert_eq!(first.verdict((&state, &obs), false).reason, "Beginning");
    first.work().why = Some("sql[0]: no".to_owned());
    assert_eq!(first.verdict((&state, &obs), false).reason, NO_DATABASE);
    assert!(first.verdict((&state, &obs), true).good);
}
