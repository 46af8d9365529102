//! The settlement of `e2e/clients/settlement.py`, as sqlx runs it: each of its statements is prepared
//! by the driver and cached.

use helios_e2e::Result;
use helios_e2e::driver::Target;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, Executor as _, PgConnection, Row as _,
};

const BATCHES: i64 = 10;
const ACCOUNTS: i64 = 500;

/// The number of trades, from the environment as for the other programs.
fn trades() -> Result<i64> {
    match std::env::var("HELIOS_SETTLEMENT_ROWS") {
        Ok(rows) => Ok(rows.parse()?),
        Err(_) => Ok(100_000),
    }
}

fn amount(n: i64) -> i64 {
    n * 7919 % 10007
}

fn fee(n: i64) -> i64 {
    amount(n) * 3 / 100
}

/// Runs the whole program, with `switch` behind each batch of its transaction.
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
    let mut conn = options.connect().await?;
    let rows = trades()?;
    prepare(&mut conn, rows).await?;
    settle(&mut conn, rows, &mut switch).await?;
    let left = "select (select count(*) from trades), (select count(*) from fees)";
    let left: (i64, i64) = sqlx::query_as(left).fetch_one(&mut conn).await?;
    same("what is left", left, (rows, rows))?;
    conn.close().await?;

    let mut conn = options.connect().await?;
    let settled = "select account::bigint, amount, fees from settled order by account";
    let settled: Vec<(i64, i64, i64)> = sqlx::query_as(settled).fetch_all(&mut conn).await?;
    same("settled", settled, expected(rows))?;
    conn.execute("drop table settled").await?;
    Ok(conn.close().await?)
}

async fn prepare(conn: &mut PgConnection, rows: i64) -> Result<()> {
    conn.execute("drop table if exists settled").await?;
    conn.execute("create table settled (account int primary key, amount bigint, fees bigint)")
        .await?;
    for setting in ["set work_mem = '32MB'", "set app.run = 'evening'"] {
        sqlx::query(setting).execute(&mut *conn).await?;
    }
    let trades = format!(
        "create temporary table trades as select n as id, n % {ACCOUNTS} as account, \
         n * 7919::bigint % 10007 as amount from generate_series(1, {rows}) n"
    );
    conn.execute(AssertSqlSafe(trades)).await?;
    conn.execute("create index on trades (account)").await?;
    conn.execute("analyze trades").await?;
    Ok(())
}

async fn settle(
    conn: &mut PgConnection,
    rows: i64,
    switch: &mut impl AsyncFnMut() -> Result<()>,
) -> Result<()> {
    let mut transaction = conn
        .begin_with("begin isolation level serializable")
        .await?;
    sqlx::query("create temporary table fees (id bigint primary key, fee bigint not null)")
        .execute(&mut *transaction)
        .await?;
    let charge = format!(
        "prepare charge (bigint) as insert into fees \
         select id, amount * 3 / 100 from trades where id % {BATCHES} = $1"
    );
    transaction.execute(AssertSqlSafe(charge)).await?;
    let (mut charged, mut fees) = (0, 0);
    for batch in 0..BATCHES {
        transaction
            .execute(AssertSqlSafe(format!("execute charge ({batch})")))
            .await?;
        let numbers = || (1..=rows).filter(|n| n % BATCHES == batch);
        charged += i64::try_from(numbers().count())?;
        fees += numbers().map(fee).sum::<i64>();
        switch().await?;
        let row = sqlx::query("select count(*), sum(fee)::bigint from fees where fee >= $1")
            .bind(0_i64)
            .fetch_one(&mut *transaction)
            .await?;
        let got: (i64, i64) = (row.get(0), row.get(1));
        same(&format!("fees behind batch {batch}"), got, (charged, fees))?;
        let settings = "select current_setting('work_mem'), current_setting('app.run')";
        let got: (String, String) = sqlx::query_as(settings)
            .fetch_one(&mut *transaction)
            .await?;
        same("settings", got, ("32MB".into(), "evening".into()))?;
    }
    let settled = "insert into settled select account, sum(amount), sum(fee) \
                   from trades join fees using (id) group by account";
    sqlx::query(settled).execute(&mut *transaction).await?;
    Ok(transaction.commit().await?)
}

/// What is settled, by account: amounts and fees.
fn expected(rows: i64) -> Vec<(i64, i64, i64)> {
    let account = |a: i64| {
        let numbers = || (1..=rows).filter(move |n| n % ACCOUNTS == a);
        (a, numbers().map(amount).sum(), numbers().map(fee).sum())
    };
    (0..ACCOUNTS).map(account).collect()
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, expected: T) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(format!("{what}: got {got:?}, expected {expected:?}").into())
}
