//! Custom settings, which PostgreSQL lists in no view, after a move.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::bench::Bench;
use tokio_postgres::Client;

async fn shown(client: &Client, name: &str) -> Option<String> {
    let sql = format!("SELECT current_setting('{name}', true)");
    client.query_one(&sql, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_whose_name_is_bound_moves() {
    let mut bench = Bench::start(EngineOptions::default(), "").await.unwrap();
    let client = bench.client().await.unwrap();
    let sql = "SELECT set_config($1, $2, false)";
    let (name, value) = ("app.tenant_1", "it's 42");
    client.query_one(sql, &[&name, &value]).await.unwrap();
    // A statement that was prepared before, and inside of a transaction that keeps it.
    let prepared = client.prepare(sql).await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    client
        .query_one(&prepared, &[&"App.Second.part", &"2"])
        .await
        .unwrap();
    client.batch_execute("COMMIT").await.unwrap();
    // What looks like a name is none: it is asked for in vain.
    let noise = "SELECT set_config('app.third', $1, false)";
    client.query_one(noise, &[&"no.such_name"]).await.unwrap();
    for _ in 0..2 {
        bench.switchover().await.unwrap();
        assert_eq!(shown(&client, name).await.as_deref(), Some(value));
        let second = shown(&client, "app.second.part").await;
        assert_eq!(second.as_deref(), Some("2"));
        let third = shown(&client, "app.third").await;
        assert_eq!(third.as_deref(), Some("no.such_name"));
        assert_eq!(shown(&client, "no.such_name").await, None);
    }
}
