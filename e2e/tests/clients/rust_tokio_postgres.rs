//! tokio-postgres: pipelined queries, a portal read in parts, COPY, savepoints.

use std::collections::BTreeSet;
use std::pin::pin;

use futures_util::future::try_join_all;
use futures_util::{SinkExt as _, TryStreamExt as _};
use helios_e2e::Result;
use helios_e2e::driver::Target;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls, Row, Transaction};

/// Runs the whole program, with `switch` in the middle of its transaction.
pub(crate) async fn program(
    target: &Target,
    mut switch: impl AsyncFnMut() -> Result<()>,
) -> Result<()> {
    let mut client = connect(target).await?;
    client
        .batch_execute(
            "drop table if exists tp; \
             create table tp (id serial primary key, pos int, v text, n bigint)",
        )
        .await?;
    let mut transaction = client.transaction().await?;
    let seen = fill(&mut transaction).await?;
    let portal = transaction
        .bind("select pos from tp order by pos", &[])
        .await?;
    let before = transaction.query_portal(&portal, 70).await?;
    check(
        "before the move",
        &numbers(&before),
        &(1..=70).collect::<Vec<_>>(),
    )?;
    switch().await?;
    let after = transaction.query_portal(&portal, 0).await?;
    check(
        "after the move",
        &numbers(&after),
        &(71..=301).collect::<Vec<_>>(),
    )?;
    let changed = transaction
        .execute("update tp set n = n + $1 where pos <= 10", &[&5_i64])
        .await?;
    check("changed", &changed, &10)?;
    transaction.commit().await?;
    drop(client);

    let client = connect(target).await?;
    let row = client
        .query_one("select count(*), sum(n)::bigint from tp", &[])
        .await?;
    check(
        "rows",
        &(row.get(0), row.get(1)),
        &(301_i64, 2 * 4950 + 4950 + 7 + 50_i64),
    )?;
    let rows = client
        .query("select pos, id from tp order by pos", &[])
        .await?;
    let ids: Vec<i32> = rows.iter().map(|row| row.get(1)).collect();
    check("positions", &numbers(&rows), &(1..=301).collect())?;
    check("ids that were seen", &&ids[..seen.len()], &&seen[..])?;
    let unique: BTreeSet<i32> = ids.into_iter().collect();
    check("unique ids", &unique.len(), &301)?;
    client.batch_execute("drop table tp").await?;
    Ok(())
}

async fn connect(target: &Target) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(&target.conninfo(), NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Returns the ids that the program saw, of the first rows in their order.
async fn fill(transaction: &mut Transaction<'_>) -> Result<Vec<i32>> {
    let add = transaction
        .prepare("insert into tp (v, n, pos) values ($1, $2, $3) returning id")
        .await?;
    let first = transaction
        .query_one(&add, &[&"first", &7_i64, &1_i32])
        .await?;
    check("first id", &first.get::<_, i32>(0), &1)?;
    let mut seen = vec![first.get(0)];
    // All of these are in flight at once: the driver pipelines them.
    let numbers: Vec<(i64, i32)> = (0..100).zip(2..).collect();
    let piped = try_join_all(
        numbers
            .iter()
            .map(async |(n, pos)| transaction.query_one(&add, &[&"piped", n, pos]).await),
    )
    .await?;
    seen.extend(piped.iter().map(|row| row.get::<_, i32>(0)));
    {
        let mut sink = pin!(
            transaction
                .copy_in::<_, std::io::Cursor<Vec<u8>>>("copy tp (v, n, pos) from stdin")
                .await?
        );
        for n in 0..200 {
            sink.send(std::io::Cursor::new(
                format!("copied\t{}\t{}\n", n % 100, n + 102).into_bytes(),
            ))
            .await?;
        }
        sink.close().await?;
    }
    let savepoint = transaction.savepoint("mistake").await?;
    match savepoint
        .execute("insert into tp (id) values (1)", &[])
        .await
    {
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => {}
        other => return Err(format!("duplicate key: got {other:?}").into()),
    }
    savepoint.rollback().await?;
    let out = transaction
        .copy_out("copy (select n from tp where v = 'piped') to stdout")
        .await?;
    let pieces: Vec<_> = pin!(out).try_collect().await?;
    check("copied out", &pieces.len(), &100)?;
    Ok(seen)
}

fn numbers(rows: &[Row]) -> Vec<i32> {
    rows.iter().map(|row| row.get(0)).collect()
}

fn check<T: PartialEq + std::fmt::Debug>(what: &str, got: &T, expected: &T) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(format!("{what}: got {got:?}, expected {expected:?}").into())
}
