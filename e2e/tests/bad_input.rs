//! Clients that misbehave get a clear error, and cost nobody else anything: a bystander works on
//! the same proxy all the while, and neither fails nor waits.

use std::time::{Duration, Instant};

use helios_e2e::Result;
use helios_e2e::driver::Target;
use helios_e2e::raw::{PATIENCE, RawClient, frame, query, startup};
use helios_e2e::subject::Subject;
use helios_local::{LocalCluster, ProxyAuth};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

/// What one of the bystander's queries may take: a second of a busy machine, not a wait.
const BYSTANDER_LIMIT: Duration = Duration::from_secs(2);
/// What misbehaving clients may make the process grow by.
const GROWTH_LIMIT: u64 = 64 << 20;

async fn connect(target: &Target) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(&target.conninfo(), NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Somebody who works on, and notes the longest that a query took.
struct Bystander {
    done: oneshot::Sender<()>,
    worker: JoinHandle<Result<Duration>>,
}

impl Bystander {
    async fn start(target: &Target) -> Result<Self> {
        let client = connect(target).await?;
        let (done, mut stop) = oneshot::channel();
        let worker = tokio::spawn(async move {
            let mut longest = Duration::ZERO;
            while stop.try_recv() == Err(oneshot::error::TryRecvError::Empty) {
                let started = Instant::now();
                let row = client.query_one("select 6 * 7", &[]).await?;
                if row.get::<_, i32>(0) != 42 {
                    return Err("the bystander got a wrong answer".into());
                }
                longest = longest.max(started.elapsed());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok(longest)
        });
        Ok(Self { done, worker })
    }

    async fn finish(self) -> Result<()> {
        let _ = self.done.send(());
        let longest = self.worker.await??;
        if longest > BYSTANDER_LIMIT {
            return Err(format!("a query of the bystander took {longest:?}").into());
        }
        Ok(())
    }
}

/// Runs a case with a bystander beside it.
async fn beside_a_bystander(case: impl AsyncFnOnce(&Target, &Subject) -> Result<()>) -> Result<()> {
    let subject = Subject::start_with(|builder| builder.instances(1)).await?;
    let bystander = Bystander::start(subject.target()).await?;
    case(subject.target(), &subject).await?;
    bystander.finish().await?;
    // And newcomers are welcome.
    connect(subject.target())
        .await?
        .query_one("select 1", &[])
        .await?;
    subject.stop().await;
    Ok(())
}

/// Polls until `count` gives 0, for as long as a client would wait.
async fn until_none(client: &Client, count: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left: i64 = client.query_one(count, &[]).await?.get(0);
        if left == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("{left} left: {count}").into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn resident_bytes() -> Result<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm.split(' ').nth(1).ok_or("no resident size")?.parse()?;
    Ok(pages * 4096)
}

/// A small generator with a seed: the same bytes each time.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(step).take(length).collect()
}

/// The connection must end; an error is welcome when it is a protocol violation or a limit.
async fn must_close(client: &mut RawClient, what: &str) -> Result<()> {
    let states = client
        .sqlstates_until_closed()
        .await
        .map_err(|e| format!("{what}: {e}"))?;
    let honest = ["08P01", "54000", "0A000", "28000", "3D000", "08006"];
    match states
        .iter()
        .find(|state| !honest.contains(&state.as_str()))
    {
        Some(state) => Err(format!("{what}: unexpected SQLSTATE {state}").into()),
        None => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_bytes() -> Result<()> {
    beside_a_bystander(async |target, _| {
        for seed in 0..40 {
            let mut client = RawClient::open(target).await?;
            // The other side may have closed before all was sent.
            let _ = client.send(&noise(seed, 4096)).await;
            must_close(&mut client, &format!("noise {seed}")).await?;
            let mut client = RawClient::log_in(target).await?;
            let mut bytes = noise(seed, 4096);
            bytes[0] = 0xff; // no message has this type
            let _ = client.send(&bytes).await;
            must_close(&mut client, &format!("noise {seed} after the login")).await?;
        }
        let mut client = RawClient::open(target).await?;
        client
            .send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .await?;
        must_close(&mut client, "HTTP").await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn absurd_lengths() -> Result<()> {
    beside_a_bystander(async |target, _| {
        let before = resident_bytes()?;
        for length in [0_u32, 3, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            for tag in *b"QPBEDCpX" {
                let mut client = RawClient::log_in(target).await?;
                let mut bytes = vec![tag];
                bytes.extend_from_slice(&length.to_be_bytes());
                bytes.extend_from_slice(&noise(7, 64));
                client.send(&bytes).await?;
                let what = format!("{} of {length} bytes", char::from(tag));
                must_close(&mut client, &what).await?;
            }
            let mut client = RawClient::open(target).await?;
            client.send(&length.to_be_bytes()).await?;
            client.send(&196_608_u32.to_be_bytes()).await?;
            must_close(&mut client, &format!("start-up of {length} bytes")).await?;
        }
        let growth = resident_bytes()?.saturating_sub(before);
        if growth > GROWTH_LIMIT {
            return Err(format!("grew by {growth} bytes").into());
        }
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn start_up_that_trickles_in() -> Result<()> {
    beside_a_bystander(async |target, _| {
        let packet = startup(&target.user, &target.database);
        let mut slow = Vec::new();
        for _ in 0..50 {
            slow.push(RawClient::open(target).await?);
        }
        // Slow, but in time: it is served all the same.
        for byte in &packet {
            for client in &mut slow {
                client.send(&[*byte]).await?;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for client in &mut slow {
            client.until(b'Z').await?;
        }
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn client_that_never_reads() -> Result<()> {
    beside_a_bystander(async |target, _| {
        let before = resident_bytes()?;
        let mut deaf = Vec::new();
        for _ in 0..5 {
            let mut client = RawClient::log_in(target).await?;
            // 1 GB each.
            let sql = "select repeat('deaf', 250) from generate_series(1, 1000000)";
            client.send(&query(sql)).await?;
            deaf.push(client);
        }
        tokio::time::sleep(Duration::from_secs(3)).await; // the time in which it could be buffered
        let growth = resident_bytes()?.saturating_sub(before);
        if growth > GROWTH_LIMIT {
            return Err(format!("buffered {growth} bytes for clients that do not read").into());
        }
        drop(deaf);
        let watcher = connect(target).await?;
        until_none(
            &watcher,
            "select count(*) from pg_stat_activity where query like 'select repeat(''deaf%' and state <> 'idle'",
        )
        .await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn client_that_vanishes_in_copy() -> Result<()> {
    beside_a_bystander(async |target, _| {
        let watcher = connect(target).await?;
        watcher.batch_execute("create table vanished (v text)").await?;
        for _ in 0..10 {
            let mut client = RawClient::log_in(target).await?;
            client.send(&query("copy vanished from stdin")).await?;
            client.until(b'G').await?;
            for _ in 0..100 {
                client.send(&frame(b'd', b"row\n")).await?;
            }
            drop(client);
        }
        until_none(
            &watcher,
            "select count(*) from pg_stat_activity where query like 'copy vanished%' and state <> 'idle'",
        )
        .await?;
        until_none(&watcher, "select count(*) from vanished").await?;
        // Nobody holds a lock on it any more.
        watcher.batch_execute("set lock_timeout = '5s'; drop table vanished").await?;
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_names() -> Result<()> {
    beside_a_bystander(async |target, _| {
        let nowhere = Target {
            database: "nowhere".into(),
            ..target.clone()
        };
        let error = tokio_postgres::connect(&nowhere.conninfo(), NoTls)
            .await
            .err();
        let error = error.ok_or("connected to an unknown database")?;
        if error.code().map(|code| code.code()) != Some("3D000") {
            return Err(format!("unknown database: {error:?}").into());
        }
        let nobody = Target {
            user: "nobody_here".into(),
            ..target.clone()
        };
        let error = tokio_postgres::connect(&nobody.conninfo(), NoTls)
            .await
            .err();
        let error = error.ok_or("connected as an unknown user")?;
        if !matches!(
            error.code().map(|code| code.code()),
            Some("28000" | "28P01")
        ) {
            return Err(format!("unknown user: {error:?}").into());
        }
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_password() -> Result<()> {
    let subject = Subject::start_with(|builder| {
        builder
            .instances(1)
            .auth(ProxyAuth::Scram)
            .password("the right one")
    })
    .await?;
    if subject.cluster().is_none() {
        return Ok(()); // PostgreSQL alone was started without a password
    }
    let wrong = Target {
        password: "a wrong one".into(),
        ..subject.target().clone()
    };
    for _ in 0..5 {
        let error = tokio_postgres::connect(&wrong.conninfo(), NoTls)
            .await
            .err();
        let error = error.ok_or("logged in with a wrong password")?;
        if error.code().map(|code| code.code()) != Some("28P01") {
            return Err(format!("wrong password: {error:?}").into());
        }
    }
    let client = connect(subject.target()).await?;
    let row = client.query_one("select current_user::text", &[]).await?;
    assert_eq!(row.get::<_, &str>(0), subject.target().user);
    subject.stop().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn port_in_use() -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0").await?;
    let address = taken.local_addr()?.to_string();
    let dir = helios_testkit::pg::server_dir("helios-e2e-")?;
    let builder = LocalCluster::builder()
        .data_dir(dir.path().join("data"))
        .instances(1);
    let error = Box::pin(builder.listen(&address).start()).await.err();
    let error = error.ok_or("started on a port that is in use")?.to_string();
    if !error.contains(&address) {
        return Err(format!("the error does not name {address}: {error}").into());
    }
    Ok(())
}
