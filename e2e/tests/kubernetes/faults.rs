//! What happens to a primary: its container killed, frozen for less and for more than a failure
//! takes, cut off from everybody and from some. Needs the node's own processes and network.

use helios_e2e::node::Container;

use super::*;

/// How often each happens; `HELIOS_ROUNDS` says otherwise.
pub(super) fn rounds() -> i64 {
    rounds_or(2)
}

/// The same of what takes long.
pub(super) fn rounds_or(few: i64) -> i64 {
    let asked = std::env::var("HELIOS_ROUNDS").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(few)
}

/// Longest transaction behind the loss of a process: the goal is one second on a quiet machine,
/// these run beside compilers.
const PROCESS: Duration = Duration::from_secs(15);
/// The same behind the loss of a network: silence of 3 s and a lease of 3 s with its margin, side
/// by side, come first.
const NETWORK: Duration = Duration::from_secs(20);

/// A cluster with writers, and what is asked of both.
pub(super) struct Stage {
    pub(super) space: Namespace,
    ledger: Ledger,
}

impl Stage {
    pub(super) async fn set(name: &str) -> Result<Self> {
        let space = Namespace::create(name).await?;
        cluster(&space).await?;
        let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
        Ok(Self { space, ledger })
    }

    /// Waits until the standby may take over; primary and standby.
    pub(super) async fn roles(&self) -> Result<(String, String)> {
        let safe = |o: &Value| is_ready(o) && confirms(o, other(text(o, "/status/currentPrimary")));
        let up = self.space.until("hc", "pg", MOVED, safe).await?;
        let primary = text(&up, "/status/currentPrimary").to_owned();
        let standby = other(&primary).to_owned();
        Ok((primary, standby))
    }

    pub(super) async fn container(&self, instance: &str) -> Result<Container> {
        Container::of(&self.space, &format!("{instance}-0"), "postgres").await
    }

    pub(super) async fn address(&self, pod: &str) -> Result<String> {
        let pod = self.space.get("pod", pod).await?;
        Ok(text(&pod, "/status/podIP").to_owned())
    }

    /// Waits until `to` is primary, with the old one still away.
    pub(super) async fn taken_over(&self, to: &str) -> Result<()> {
        let done = |o: &Value| {
            text(o, "/status/currentPrimary") == to && o["status"]["operation"].is_null()
        };
        self.space.until("hc", "pg", MOVED, done).await.map(drop)
    }

    /// The number of the last operation.
    pub(super) async fn operations(&self) -> Result<i64> {
        let object = self.space.get("hc", "pg").await?;
        Ok(last_operation(&object)["id"].as_i64().unwrap_or_default())
    }

    /// The writers were served in time, nothing is lost or doubled, and nothing is left over.
    pub(super) async fn end(self, slowest: Duration) -> Result<()> {
        let events = self.operations().await?;
        accounted(self.ledger, events, slowest).await?;
        self.space.delete().await
    }
}

/// Nothing is lost or doubled, and nobody waited longer than `slowest`; prints what `events` moves
/// cost each writer.
pub(super) async fn accounted(ledger: Ledger, events: i64, slowest: Duration) -> Result<()> {
    let settled = ledger.account().await?;
    let waits = i64::from(WRITERS) * events.max(1);
    println!("{}", settled.waits(usize::try_from(waits)?));
    assert!(settled.count > 0 && settled.lost.is_empty());
    assert!(settled.slowest < slowest, "{:?}", settled.slowest);
    Ok(())
}

fn other(instance: &str) -> &'static str {
    if instance == "pg-1" { "pg-2" } else { "pg-1" }
}

/// A failover with its phases, once everything serves again.
async fn failed_over(stage: &Stage, id: i64, to: &str) -> Result<()> {
    let moved = settled(&stage.space, id).await?;
    let operation = last_operation(&moved);
    println!("{operation}");
    assert_eq!(operation["id"], id, "{operation}");
    assert_eq!(operation["kind"], "failover", "{operation}");
    assert_eq!(operation["outcome"], "succeeded", "{operation}");
    assert_eq!(text(&moved, "/status/currentPrimary"), to);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_killed_container_is_failed_over() -> std::result::Result<(), Shown> {
    Ok(killed().await?)
}

async fn killed() -> Result<()> {
    let stage = Stage::set("killed").await?;
    for id in 1..=rounds() {
        let (primary, standby) = stage.roles().await?;
        stage.container(&primary).await?.kill()?;
        failed_over(&stage, id, &standby).await?;
    }
    stage.end(PROCESS).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_primary_that_stands_still_for_two_seconds_stays_primary()
-> std::result::Result<(), Shown> {
    Ok(frozen_briefly().await?)
}

async fn frozen_briefly() -> Result<()> {
    let stage = Stage::set("blink").await?;
    let (primary, _) = stage.roles().await?;
    let container = stage.container(&primary).await?;
    for _ in 1..=rounds() {
        let frozen = container.freeze()?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        drop(frozen);
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(stage.operations().await?, 0);
        assert_eq!(stage.roles().await?.0, primary);
    }
    // The freeze itself, and what was due behind it.
    stage.end(Duration::from_secs(6)).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_primary_that_stands_still_for_a_minute_is_replaced_and_commits_nothing_more()
-> std::result::Result<(), Shown> {
    Ok(frozen().await?)
}

async fn frozen() -> Result<()> {
    let stage = Stage::set("frozen").await?;
    let through = client(&stage.space).await?;
    connect(&through)
        .await?
        .batch_execute("create table late (number int)")
        .await?;
    for id in 1..=rounds() {
        frozen_for_a_minute(&stage, &through, id).await?;
    }
    stage.end(NETWORK).await
}

async fn frozen_for_a_minute(
    stage: &Stage,
    through: &tokio_postgres::Config,
    id: i64,
) -> Result<()> {
    let (primary, standby) = stage.roles().await?;
    // Somebody who goes past the proxies has a transaction open on the old primary.
    let mut past = through.clone();
    past = at(past, &stage.address(&format!("{primary}-0")).await?);
    let late = connect(&past).await?;
    late.batch_execute("begin; insert into late values (1)")
        .await?;
    let frozen = stage.container(&primary).await?.freeze()?;
    let began = Instant::now();
    stage.taken_over(&standby).await?;
    println!("taken over after {:?}", began.elapsed());
    // The COMMIT is there before the server can be awake, and before its agent is.
    let commit = tokio::spawn(async move { late.batch_execute("commit").await });
    tokio::time::sleep(Duration::from_secs(60).saturating_sub(began.elapsed())).await;
    assert!(!commit.is_finished());
    drop(frozen);
    let answer = commit.await?;
    println!("the COMMIT on the thawed primary: {answer:?}");
    assert!(answer.is_err(), "{answer:?}");
    failed_over(stage, id, &standby).await?;
    let left = connect(through).await?;
    let rows = left.query("select number from late", &[]).await?;
    assert!(rows.is_empty(), "{rows:?}");
    Ok(())
}

/// The same login, elsewhere.
fn at(config: tokio_postgres::Config, address: &str) -> tokio_postgres::Config {
    let mut new = tokio_postgres::Config::new();
    new.host(address)
        .port(5432)
        .user(config.get_user().unwrap_or_default())
        .password(config.get_password().unwrap_or_default())
        .dbname(config.get_dbname().unwrap_or_default())
        .connect_timeout(Duration::from_secs(20));
    new
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_primary_that_is_cut_off_from_everybody_is_replaced() -> std::result::Result<(), Shown> {
    Ok(cut_off().await?)
}

async fn cut_off() -> Result<()> {
    let stage = Stage::set("cut").await?;
    for id in 1..=rounds() {
        let (primary, standby) = stage.roles().await?;
        let cut = stage.container(&primary).await?.cut(&[])?;
        let began = Instant::now();
        stage.taken_over(&standby).await?;
        println!("taken over after {:?}", began.elapsed());
        // It has stopped by itself: nobody could tell it.
        let ask = "pgrep -c postgres || true";
        let pod = format!("{primary}-0");
        let left = ["exec", &pod, "-c", "postgres", "--", "bash", "-c", ask];
        println!(
            "processes left: {}",
            stage.space.kubectl(&left).await?.trim()
        );
        drop(cut);
        failed_over(&stage, id, &standby).await?;
    }
    stage.end(NETWORK).await
}

/// Cuts the primary off from some for a while: nobody is demoted, and clients are served.
async fn nobody_demoted(
    name: &str,
    from: impl AsyncFn(&Stage) -> Result<Vec<String>>,
) -> Result<()> {
    let stage = Stage::set(name).await?;
    let (primary, _) = stage.roles().await?;
    let addresses = from(&stage).await?;
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    println!("cut off from {addresses:?}");
    for _ in 1..=rounds() {
        let cut = stage.container(&primary).await?.cut(&addresses)?;
        tokio::time::sleep(Duration::from_secs(20)).await;
        drop(cut);
        assert_eq!(stage.roles().await?.0, primary);
        assert_eq!(stage.operations().await?, 0);
    }
    // A standby that is gone holds commits for 2 s until it is seen, and 2 s until it is given up.
    stage.end(Duration::from_secs(8)).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_primary_that_only_the_operator_cannot_reach_goes_on() -> std::result::Result<(), Shown> {
    Ok(nobody_demoted("deaf", operators).await?)
}

async fn operators(_: &Stage) -> Result<Vec<String>> {
    let args = [
        "get",
        "pods",
        "--namespace",
        "helios-system",
        "-o",
        "jsonpath={.items[*].status.podIP}",
    ];
    let all = kube::run(&args, None).await?;
    Ok(all.split_whitespace().map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_primary_that_is_cut_off_from_the_api_server_goes_on() -> std::result::Result<(), Shown> {
    Ok(nobody_demoted("noapi", api_server).await?)
}

async fn api_server(_: &Stage) -> Result<Vec<String>> {
    let args = [
        "get",
        "endpoints",
        "kubernetes",
        "-o",
        "jsonpath={.subsets[*].addresses[*].ip}",
    ];
    let mut all: Vec<String> = kube::run(&args, None)
        .await?
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    let args = [
        "get",
        "service",
        "kubernetes",
        "-o",
        "jsonpath={.spec.clusterIP}",
    ];
    all.push(kube::run(&args, None).await?);
    Ok(all)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_primary_that_is_cut_off_from_its_standby_goes_on() -> std::result::Result<(), Shown> {
    let standby = async |stage: &Stage| {
        let (_, standby) = stage.roles().await?;
        Ok(vec![stage.address(&format!("{standby}-0")).await?])
    };
    Ok(nobody_demoted("alone", standby).await?)
}
