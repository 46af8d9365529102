//! Bugs of peers that take a whole cluster. Each test has the name of the bug that it is about.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use helios_e2e::chaos::cluster::{Cluster, Shape, redundant};
use helios_e2e::chaos::experiment::RECOVERY_LIMIT;
use helios_e2e::chaos::fault::{Act, Network};
use helios_e2e::{Result, Shown};
use tokio::sync::watch;
use tokio_postgres::{Client, NoTls};

/// How long the primary stays cut off: several times what it takes to notice that.
const CUT_OFF: Duration = Duration::from_secs(8);

/// The product, built beside this test.
fn helios() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let path = own.ancestors().nth(2).ok_or("no folder")?.join("helios");
    match path.is_file() {
        true => Ok(path),
        false => Err(format!(
            "there is no program \"{}\": cargo build -p helios",
            path.display()
        )
        .into()),
    }
}

/// A primary that neither the proxy nor a standby reaches acknowledges nothing that is lost: either
/// nobody takes over, for its agent vouches for it, or it has stopped before somebody does.
#[tokio::test(flavor = "multi_thread")]
async fn cloudnative_pg_7407_and_11280_an_isolated_primary_acknowledges_nothing_that_is_lost()
-> std::result::Result<(), Shown> {
    Ok(Box::pin(isolated(true)).await?)
}

/// The same without synchronous replication: it acknowledges nothing once another one is primary.
#[tokio::test(flavor = "multi_thread")]
async fn cloudnative_pg_7407_an_isolated_asynchronous_primary_does_not_outlive_the_next_one()
-> std::result::Result<(), Shown> {
    Ok(Box::pin(isolated(false)).await?)
}

/// Acknowledged numbers, when each was sent and when it was acknowledged.
type Acknowledged = Vec<(i32, Instant, Instant)>;

/// Inserts one row after the other until told to stop or until the connection ends.
async fn insert(client: Client, from: i32, stop: watch::Receiver<bool>) -> Acknowledged {
    let mut told = Vec::new();
    let mut n = from;
    while !*stop.borrow() {
        let sent = Instant::now();
        match client
            .batch_execute(&format!("insert into isolated values ({n})"))
            .await
        {
            Ok(()) => told.push((n, sent, Instant::now())),
            Err(_) => break,
        }
        n += 1;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    told
}

async fn isolated(synchronous: bool) -> Result<()> {
    let shape = Shape {
        instances: 2,
        synchronous,
        small_disks: false,
    };
    let cluster = Cluster::start(&helios()?, shape, &[]).await?;
    let judged = Box::pin(cut_off(&cluster)).await;
    Box::pin(cluster.stop(judged.is_err())).await;
    judged
}

async fn cut_off(cluster: &Cluster) -> Result<()> {
    let before = cluster.wait("redundant", RECOVERY_LIMIT, redundant).await?;
    let (primary, _) = cluster.roles().await?;
    let config: tokio_postgres::Config = cluster.target().conninfo().parse()?;
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    client
        .batch_execute("create table isolated (n int)")
        .await?;
    // In front of the go-between: this one stays connected whatever happens to the network.
    let direct = cluster.connect(&primary).await?;
    let network = Network::install(cluster).await?;
    cluster.wait("redundant", RECOVERY_LIMIT, redundant).await?;
    let (stop, stopped) = watch::channel(false);
    let past = tokio::spawn(insert(direct, 1_000_000, stopped.clone()));
    let through = tokio::spawn(insert(client, 0, stopped));
    tokio::time::sleep(Duration::from_millis(500)).await;
    let cut = Instant::now();
    let held = Act::Hold {
        sessions: true,
        service: true,
        replication: true,
        millis: u64::try_from(CUT_OFF.as_millis())?,
        close: true,
        everywhere: false,
    };
    network.act(&primary.name, &held).await?;
    cluster.wait("redundant", RECOVERY_LIMIT, redundant).await?;
    stop.send(true)?;
    let (past, through) = (past.await?, through.await?);
    network.remove();
    let status = cluster.status().await?;
    let moved = status.epoch != before.epoch;
    let next = through.iter().find(|(_, sent, _)| *sent > cut);
    let (_, _, next) = next.ok_or("the proxy's client did not go on")?;
    let late = past
        .iter()
        .find(|(_, _, acknowledged)| moved && acknowledged > next);
    if let Some((n, _, acknowledged)) = late {
        let after = acknowledged.duration_since(cut);
        return Err(format!("the old primary acknowledged {n} after {after:?}").into());
    }
    let (now, _) = cluster.roles().await?;
    let db = cluster.connect(&now).await?;
    let database = cluster.target().database.clone();
    let rows = rows(&db, &database).await?;
    let mut owed: Vec<i32> = through.iter().map(|(n, ..)| *n).collect();
    if cluster.shape.synchronous || !moved {
        owed.extend(past.iter().map(|(n, ..)| *n));
    }
    let lost: Vec<&i32> = owed.iter().filter(|n| !rows.contains(n)).collect();
    if !lost.is_empty() {
        return Err(format!("lost {lost:?} of {}", owed.len()).into());
    }
    Ok(())
}

async fn rows(db: &Client, database: &str) -> Result<Vec<i32>> {
    let rows = db.query("select n from isolated", &[]).await;
    let rows = rows.map_err(|e| format!("database {database}: {e}"))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
