//! What happens to those who decide: the API server away, the operator dead at every step.

use helios_e2e::node;

use super::faults::{Stage, rounds_or};
use super::*;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn an_api_server_that_is_away_for_a_minute_is_not_noticed() -> std::result::Result<(), Shown>
{
    Ok(away().await?)
}

async fn away() -> Result<()> {
    let stage = Stage::set("away").await?;
    let (primary, _) = stage.roles().await?;
    for _ in 1..=rounds_or(1) {
        let frozen = node::freeze_api_server()?;
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(frozen);
        assert_eq!(stage.roles().await?.0, primary);
        assert_eq!(stage.operations().await?, 0);
    }
    // What a busy machine costs anyway.
    stage.end(Duration::from_secs(3)).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_failover_during_an_outage_of_the_api_server_ends() -> std::result::Result<(), Shown> {
    Ok(failover_without_api().await?)
}

/// Clients wait for a primary for 60 s at most; the outage is shorter, so none gets an error.
const OUTAGE: Duration = Duration::from_secs(25);

async fn failover_without_api() -> Result<()> {
    let stage = Stage::set("outage").await?;
    for (id, after) in [(1, 0), (2, 30), (3, 150)] {
        let (primary, _) = stage.roles().await?;
        let container = stage.container(&primary).await?;
        container.kill_postmaster()?;
        tokio::time::sleep(Duration::from_millis(after)).await;
        let frozen = node::freeze_api_server()?;
        tokio::time::sleep(OUTAGE).await;
        drop(frozen);
        let moved = settled(&stage.space, id).await?;
        println!("outage after {after} ms: {}", last_operation(&moved));
    }
    // The outage, an operator that leads again, and the failover.
    stage.end(Duration::from_secs(58)).await
}

/// Steps of a planned move that are durable by themselves. *choose* is not where all positions are
/// known with the fence: it is decided with the step behind it.
const PLANNED: [&str; 5] = ["prepare", "drain", "fence", "promote", "replay"];
/// The same of a failover.
const UNPLANNED: [&str; 3] = ["fence", "promote", "replay"];

/// Has every operator that begins a step die there.
async fn die_at(step: &str) -> Result<()> {
    let space = ["--namespace", "helios-system"];
    let deployment = "deployment/helios-operator";
    let variable = match step {
        "" => "HELIOS_TEST_DIE_AT-".to_owned(),
        step => format!("HELIOS_TEST_DIE_AT={step}"),
    };
    let mut args = space.to_vec();
    args.extend(["set", "env", deployment, &variable]);
    kube::run(&args, None).await?;
    let mut args = space.to_vec();
    args.extend(["rollout", "status", deployment, "--timeout=2m"]);
    kube::run(&args, None).await?;
    // Those before them are counted no more.
    let deadline = Instant::now() + MOVED;
    let mut args = space.to_vec();
    args.extend(["get", "pods", "-o", "name"]);
    while kube::run(&args, None).await?.lines().count() > OPERATORS {
        if Instant::now() > deadline {
            return Err("old operators do not end".into());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// Copies of the operator that the chart runs.
const OPERATORS: usize = 2;

/// How often containers of the operators have ended.
async fn deaths() -> Result<i64> {
    let restarts = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
    let args = [
        "get",
        "pods",
        "--namespace",
        "helios-system",
        "-o",
        restarts,
    ];
    let all = kube::run(&args, None).await?;
    Ok(all
        .split_whitespace()
        .filter_map(|n| n.parse::<i64>().ok())
        .sum())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn an_operator_that_dies_at_any_step_of_a_switchover_is_succeeded()
-> std::result::Result<(), Shown> {
    Ok(every_step(&PLANNED, true).await?)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn an_operator_that_dies_at_any_step_of_a_failover_is_succeeded()
-> std::result::Result<(), Shown> {
    Ok(every_step(&UNPLANNED, false).await?)
}

async fn every_step(steps: &[&str], planned: bool) -> Result<()> {
    // Each in a namespace of its own: the other one's may still be on its way out.
    let stage = Stage::set(if planned {
        "steps-planned"
    } else {
        "steps-unplanned"
    })
    .await?;
    // To repeat one: HELIOS_STEP=replay, or replay:done.
    let only = std::env::var("HELIOS_STEP").ok();
    let all = steps
        .iter()
        .flat_map(|step| [(*step).to_owned(), format!("{step}:done")])
        .filter(|step| only.as_ref().is_none_or(|only| only == step));
    let mut ids = 1..;
    let mut outcome = Ok(());
    for step in all {
        outcome = one_step(&stage, &mut ids, &step, planned).await;
        if outcome.is_err() {
            break;
        }
    }
    die_at("").await?;
    outcome?;
    // Until a successor leads, and the move itself.
    stage.end(Duration::from_secs(40)).await
}

/// By when the kubelet has told that a container was restarted.
const TOLD: Duration = Duration::from_secs(20);

/// As many operations as there are rounds, which get these numbers. With more than three, the kubelet
/// lets an operator that dies again and again wait for longer than clients may.
async fn one_step(
    stage: &Stage,
    ids: &mut std::ops::RangeFrom<i64>,
    step: &str,
    planned: bool,
) -> Result<()> {
    die_at(step).await?;
    for id in ids.take(usize::try_from(rounds_or(1).min(3))?) {
        one_death(stage, id, step, planned).await?;
    }
    Ok(())
}

async fn one_death(stage: &Stage, id: i64, step: &str, planned: bool) -> Result<()> {
    let (primary, _) = stage.roles().await?;
    let before = deaths().await?;
    if planned {
        let request = "heliosdb.io/switchover=auto";
        stage.space.kubectl(&["annotate", "hc/pg", request]).await?;
    } else {
        stage.container(&primary).await?.kill_postmaster()?;
    }
    let moved = settled(&stage.space, id).await?;
    // The kubelet tells of a restart later than the restarted operator needs to go on.
    let told = Instant::now() + TOLD;
    let mut died = deaths().await? - before;
    while died == 0 && Instant::now() < told {
        tokio::time::sleep(Duration::from_millis(200)).await;
        died = deaths().await? - before;
    }
    println!("{step}: {died} died; {}", last_operation(&moved));
    assert_eq!(died, 1, "{step}");
    Ok(())
}
