//! A cluster inside an application: start it, use it, move its sessions for maintenance, stop it.
//!
//! `cargo run -p helios-local --example embed [data directory]`

#![allow(clippy::print_stdout)] // it is an example of a program

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use helios_local::LocalCluster;
use tokio_postgres::NoTls;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let data_dir = std::env::args().nth(1).map_or_else(
        || std::env::temp_dir().join(format!("helios-embed-{}", std::process::id())),
        PathBuf::from,
    );
    let cluster = LocalCluster::builder()
        .data_dir(&data_dir)
        .instances(2)
        .listen("127.0.0.1:0")
        .database("shop")
        .user("shop")
        .start()
        .await?;
    println!("connect with: psql \"{}\"", cluster.connection_string());

    let mut events = cluster.subscribe();
    let (mut client, connection) =
        tokio_postgres::connect(&cluster.connection_string(), NoTls).await?;
    let connection = tokio::spawn(connection);
    client
        .batch_execute("create table orders (item text, amount int)")
        .await?;

    // A transaction is open while the primary moves, and does not notice.
    let transaction = client.transaction().await?;
    transaction
        .execute("insert into orders values ('lamp', 2)", &[])
        .await?;
    let report = cluster.migrate_for_maintenance().await?;
    transaction
        .execute("insert into orders values ('bulb', 4)", &[])
        .await?;
    transaction.commit().await?;
    println!(
        "moved {} sessions to \"{}\" in {:.1} ms",
        report.moved,
        report.operation.to,
        f64::from(u32::try_from(report.pause_micros)?) / 1000.0
    );
    if let Ok(event) = tokio::time::timeout(Duration::from_secs(5), events.recv()).await {
        println!("event: {:?}", event?);
    }

    let rows = client
        .query("select item, amount from orders order by amount", &[])
        .await?;
    for row in &rows {
        println!("{} x {}", row.get::<_, i32>(1), row.get::<_, String>(0));
    }
    drop(client);
    let _ = connection.await;
    cluster.shutdown().await;
    helios_local::destroy(&data_dir).await?;
    Ok(())
}
