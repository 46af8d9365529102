//! sqlx: cached prepared statements, streams, nested transactions, a pool.

use futures_util::TryStreamExt as _;
use helios_e2e::Result;
use helios_e2e::driver::Target;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgSslMode};
use sqlx::{Acquire as _, PgConnection, Row as _};

/// Runs the whole program, with `switch` in the middle of its transaction.
pub(crate) async fn program(
    target: &Target,
    mut switch: impl AsyncFnMut() -> Result<()>,
) -> Result<()> {
    let options = PgConnectOptions::new()
        .host(&target.host)
        .port(target.port)
        .username(&target.user)
        .password(&target.password)
        .database(&target.database)
        .ssl_mode(PgSslMode::Disable);
    let pool = PgPoolOptions::new()
        .max_connections(3)
        .connect_with(options.clone())
        .await?;
    sqlx::query("drop table if exists sx")
        .execute(&pool)
        .await?;
    sqlx::query("create table sx (id serial primary key, n int, v text unique, at timestamptz)")
        .execute(&pool)
        .await?;

    let mut transaction = pool.begin().await?;
    add(&mut transaction, 0, 100).await?;
    let mut nested = transaction.begin().await?;
    add(&mut nested, 100, 50).await?;
    nested.rollback().await?;
    let mut nested = transaction.begin().await?;
    switch().await?;
    add(&mut nested, 100, 25).await?;
    nested.commit().await?;
    let values: Vec<String> = sqlx::query("select v from sx where n >= $1 order by n")
        .bind(0_i32)
        .fetch(&mut *transaction)
        .map_ok(|row| row.get(0))
        .try_collect()
        .await?;
    let expected: Vec<String> = (0..125).map(|n| format!("value {n}")).collect();
    if values != expected {
        return Err(format!("inside the transaction: got {values:?}").into());
    }
    transaction.commit().await?;
    pool.close().await;

    let pool = PgPoolOptions::new().connect_with(options).await?;
    let (count, times): (i64, i64) = sqlx::query_as("select count(*), count(distinct at) from sx")
        .fetch_one(&pool)
        .await?;
    // One transaction has one now(), moved or not, unless a replay gave it another in the middle.
    if count != 125 || !(1..=2).contains(&times) {
        return Err(format!("afterwards: {count} rows at {times} times").into());
    }
    sqlx::query("drop table sx").execute(&pool).await?;
    pool.close().await;
    Ok(())
}

async fn add(connection: &mut PgConnection, from: i32, count: i32) -> Result<()> {
    for n in from..from + count {
        sqlx::query("insert into sx (n, v, at) values ($1, $2, now())")
            .bind(n)
            .bind(format!("value {n}"))
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}
