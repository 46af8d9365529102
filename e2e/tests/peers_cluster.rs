//! Bugs of peers that take a whole cluster. Each test has the name of the bug that it is about.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helios_e2e::chaos::cluster::{Cluster, Shape, redundant, summary};
use helios_e2e::chaos::experiment::RECOVERY_LIMIT;
use helios_e2e::chaos::fault::{Act, Injector, Network};
use helios_e2e::chaos::plan::Step;
use helios_e2e::chaos::processes;
use helios_e2e::{Result, Shown};
use helios_local::LocalStatus;
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

/// Crashes of the primary one after the other, each as soon as the cluster is whole again: every
/// failover ends, moves the primary once, and nobody moves it back.
#[tokio::test(flavor = "multi_thread")]
async fn cloudnative_pg_11346_11348_and_6091_a_failover_neither_stalls_nor_reverts()
-> std::result::Result<(), Shown> {
    let cluster = Cluster::start(&helios()?, SHAPE, &[]).await?;
    let judged = Box::pin(failovers_in_a_row(&cluster)).await;
    Box::pin(cluster.stop(judged.is_err())).await;
    Ok(judged?)
}

/// Two instances, synchronous.
const SHAPE: Shape = Shape {
    instances: 2,
    synchronous: true,
    small_disks: false,
};

async fn failovers_in_a_row(cluster: &Cluster) -> Result<()> {
    let config: tokio_postgres::Config = cluster.target().conninfo().parse()?;
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    let table = "create table isolated (n int)";
    client.batch_execute(table).await?;
    let (stop, stopped) = watch::channel(false);
    let writer = tokio::spawn(insert(client, 0, stopped));
    for _ in 0..3 {
        let (primary, _) = cluster.roles().await?;
        let before = cluster.status().await?;
        processes::kill_server(primary.postmaster_pid.ok_or("no postmaster")?)?;
        // Who was primary, in order, until the old one is a standby of the new one.
        let mut primaries = vec![primary.name.clone()];
        let deadline = Instant::now() + RECOVERY_LIMIT;
        let after = loop {
            let status = cluster.status().await?;
            let now = status.primary.clone();
            if let Some(now) = now.filter(|now| primaries.last() != Some(now)) {
                primaries.push(now);
            }
            if primaries.len() > 1 && redundant(&status, cluster.shape) {
                break status;
            }
            if Instant::now() > deadline {
                return Err(format!("the failover stalls: {}", summary(&status)).into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        if primaries.len() != 2 || after.epoch != before.epoch.next() {
            let epochs = (before.epoch, after.epoch);
            return Err(format!("primaries {primaries:?}, epochs {epochs:?}").into());
        }
        if after.timeline <= before.timeline {
            return Err(format!("timeline {:?}", after.timeline).into());
        }
    }
    stop.send(true)?;
    let told = writer.await?;
    let (now, _) = cluster.roles().await?;
    let db = cluster.connect(&now).await?;
    let rows = rows(&db, &cluster.target().database).await?;
    let mut once = rows.clone();
    once.sort_unstable();
    once.dedup();
    let lost = told.iter().filter(|(n, ..)| !rows.contains(n)).count();
    match lost == 0 && once.len() == rows.len() && !told.is_empty() {
        true => Ok(()),
        false => Err(format!("{lost} of {} lost, {} rows", told.len(), rows.len()).into()),
    }
}

/// The old primary has committed what nobody else has: it comes back as a standby by itself, with
/// the new primary's data and none of its own.
#[tokio::test(flavor = "multi_thread")]
async fn cloudnative_pg_1836_and_9637_the_old_primary_rejoins_without_a_person()
-> std::result::Result<(), Shown> {
    let shape = Shape {
        synchronous: false,
        ..SHAPE
    };
    let cluster = Arc::new(Cluster::start(&helios()?, shape, &[]).await?);
    let judged = Box::pin(rejoins(&cluster)).await;
    if let Ok(cluster) = Arc::try_unwrap(cluster) {
        Box::pin(cluster.stop(judged.is_err())).await;
    }
    Ok(judged?)
}

async fn rejoins(cluster: &Arc<Cluster>) -> Result<()> {
    // What was held up can get there at the last moment: then the old primary has nothing to give up.
    for round in 0..8 {
        if Box::pin(rejoined(cluster, round * 100_000)).await? {
            return Ok(());
        }
    }
    Err("nothing has diverged".into())
}

/// Waits for a standby that is served by another process than `before`; returns that process.
async fn streaming(primary: &Client, before: Option<i32>) -> Result<i32> {
    let sender = "select pid from pg_stat_replication where state = 'streaming'";
    let deadline = Instant::now() + RECOVERY_LIMIT;
    loop {
        let row = primary.query_opt(sender, &[]).await?;
        match row.map(|row| row.get(0)) {
            Some(pid) if Some(pid) != before => return Ok(pid),
            _ if Instant::now() > deadline => return Err("the standby does not come".into()),
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// One failover with a standby that lags; whether the old primary had commits of its own.
async fn rejoined(cluster: &Arc<Cluster>, from: i32) -> Result<bool> {
    let (old, _) = cluster.roles().await?;
    let direct = cluster.connect(&old).await?;
    direct
        .batch_execute("create table if not exists isolated (n int)")
        .await?;
    // Behind the switchover of the round before, the standby may still be on its way.
    let before = streaming(&direct, None).await?;
    let network = Network::install(cluster).await?;
    // The standby comes again, through the go-between that will hold it up.
    streaming(&direct, Some(before)).await?;
    let whole = cluster.wait("redundant", RECOVERY_LIMIT, redundant);
    let before = whole.await?;
    let (stop, stopped) = watch::channel(false);
    let past = tokio::spawn(insert(direct, from, stopped));
    let step = Step {
        at_ms: 500,
        act: Act::CrashBehindLag { millis: 1000 },
    };
    let injector = Injector::new(Arc::clone(cluster), network, Instant::now());
    let done = injector.run(&[step]).await?;
    if !done.iter().all(|d| d.hit) {
        return Err(format!("{done:?}").into());
    }
    let moved = |s: &LocalStatus, shape| s.primary != before.primary && redundant(s, shape);
    cluster
        .wait("moved and whole", RECOVERY_LIMIT, moved)
        .await?;
    // It has ended with its server.
    stop.send_replace(true);
    let told = past.await?;
    let (primary, standbys) = cluster.roles().await?;
    let database = &cluster.target().database;
    let now = rows(&cluster.connect(&primary).await?, database).await?;
    let diverged = told.iter().any(|(n, ..)| !now.contains(n));
    let back = standbys.iter().find(|s| s.name == old.name);
    let standby = cluster
        .connect(back.ok_or("the old primary is not there")?)
        .await?;
    let deadline = Instant::now() + RECOVERY_LIMIT;
    while rows(&standby, database).await? != now {
        if Instant::now() > deadline {
            let has = rows(&standby, database).await?.len();
            return Err(format!("it has {has} rows, the primary {}", now.len()).into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // And it could take over again.
    let (what, moved) = cluster.switchover(RECOVERY_LIMIT).await?;
    match moved && cluster.roles().await?.0.name == old.name {
        true => Ok(diverged),
        false => Err(what.into()),
    }
}
