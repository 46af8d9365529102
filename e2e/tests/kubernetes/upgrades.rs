//! Another version of what runs: the operator's, which restarts no database, and PostgreSQL's, which
//! is rolled out. Both images are there under a second name; on a foreign cluster somebody has to
//! provide these (`HELIOS_IMAGE_NEXT`, `HELIOS_POSTGRES_IMAGE_NEXT`).

use super::*;
use crate::charts::{helm, root};
use crate::life::{pods, settled as up_to_date};

/// The second name of an image.
fn next(variable: &str) -> Result<String> {
    std::env::var(variable).map_err(|_| format!("{variable} has to name a second image").into())
}

/// Has the operator installed with the image of this name, and waits for its Pods.
async fn install(image: &str) -> Result<()> {
    let chart = root().join("charts/helios-operator").display().to_string();
    let (repository, tag) = image.rsplit_once(':').ok_or("an image without a tag")?;
    let repository = format!("image.repository={repository}");
    let tag = format!("image.tag={tag}");
    let upgrade = [
        "upgrade",
        "helios-operator",
        &chart,
        "--namespace",
        "helios-system",
        "--reuse-values",
        "--disable-openapi-validation",
        "--set",
        &repository,
        "--set",
        &tag,
        "--wait",
    ];
    helm(&upgrade).await.map(drop)
}

/// The image that the operator runs.
async fn installed() -> Result<String> {
    let path = "jsonpath={.spec.template.spec.containers[0].image}";
    let args = [
        "get",
        "deployment/helios-operator",
        "--namespace",
        "helios-system",
        "-o",
        path,
    ];
    kube::run(&args, None).await
}

/// How often containers of instances have been started again.
async fn restarts(space: &Namespace) -> Result<String> {
    let path = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
    let selector = "heliosdb.io/component=instance";
    space
        .kubectl(&["get", "pods", "--selector", selector, "-o", path])
        .await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn an_upgrade_of_the_operator_restarts_no_database() -> std::result::Result<(), Shown> {
    Ok(there_and_back_again().await?)
}

/// The operator is as before afterwards, whatever was found.
async fn there_and_back_again() -> Result<()> {
    let (image, next) = (installed().await?, next("HELIOS_IMAGE_NEXT")?);
    assert_ne!(image, next, "an earlier test has left it");
    let done = tokio::spawn(async { upgraded(next).await.map_err(|e| e.to_string()) }).await;
    install(&image).await?;
    Ok(done??)
}

async fn upgraded(next: String) -> Result<()> {
    let space = Namespace::create("upgraded").await?;
    cluster(&space).await?;
    let ledger = Ledger::start_again_and_again(client(&space).await?, WRITERS, 0).await?;
    let before = (pods(&space).await?, restarts(&space).await?);
    install(&next).await?;
    assert_eq!(installed().await?, next);
    // The proxies are the operator's to replace; their clients are told so between transactions.
    let renewed = |o: &Value| text(o, "/spec/template/spec/containers/0/image") == next;
    space
        .until("deployment", "pg-proxy", MOVED, renewed)
        .await?;
    let wait = ["rollout", "status", "deployment/pg-proxy", "--timeout=150s"];
    space.kubectl(&wait).await?;
    gone(&space).await?;
    space.until("hc", "pg", MOVED, up_to_date).await?;
    assert_eq!((pods(&space).await?, restarts(&space).await?), before);
    // The new operator leads the old agents.
    space
        .until("hc", "pg", MOVED, |o| confirms(o, "pg-2"))
        .await?;
    let request = ["annotate", "hc/pg", "heliosdb.io/switchover=auto"];
    space.kubectl(&request).await?;
    let moved = settled(&space, 1).await?;
    println!("{}", last_operation(&moved));
    assert_eq!(text(&moved, "/status/currentPrimary"), "pg-2");
    assert_eq!((pods(&space).await?, restarts(&space).await?), before);
    told(ledger).await?;
    space.delete().await
}

/// Waits for the end of the proxies before: one that leaves while the primary is about to move has the
/// move called off.
async fn gone(space: &Namespace) -> Result<()> {
    let deadline = Instant::now() + MOVED;
    let proxies = [
        "get",
        "pods",
        "-l",
        "heliosdb.io/component=proxy",
        "-o",
        "name",
    ];
    while space.kubectl(&proxies).await?.lines().count() > 2 {
        if Instant::now() > deadline {
            return Err("old proxies do not end".into());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// Nothing was lost or doubled; connections may have ended where no transaction was open.
async fn told(ledger: Ledger) -> Result<()> {
    let all = ledger.account().await?;
    println!(
        "{} transactions, the longest took {:?}; {} connections ended",
        all.count,
        all.slowest,
        all.lost.len()
    );
    assert!(all.count > 0);
    assert_eq!(all.unknown, (0, 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn another_image_of_postgresql_is_rolled_out_under_load() -> std::result::Result<(), Shown> {
    Ok(Box::pin(rolled_out()).await?)
}

async fn rolled_out() -> Result<()> {
    let next = next("HELIOS_POSTGRES_IMAGE_NEXT")?;
    let space = Namespace::create("image").await?;
    cluster(&space).await?;
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    let first = pods(&space).await?;
    let patch = serde_json::json!({"spec": {"imageName": next}}).to_string();
    space
        .kubectl(&["patch", "hc/pg", "--type=merge", "-p", &patch])
        .await?;
    let object = space.until("hc", "pg", UP, up_to_date).await?;
    println!("{}", object["status"]["lastOperations"]);
    assert!(pods(&space).await?.is_disjoint(&first));
    assert_eq!(text(&object, "/status/currentPrimary"), "pg-2");
    let path = "jsonpath={.items[*].spec.containers[?(@.name=='postgres')].image}";
    let selector = "heliosdb.io/component=instance";
    let images = space
        .kubectl(&["get", "pods", "--selector", selector, "-o", path])
        .await?;
    assert_eq!(images, format!("{next} {next}"));
    // No connection ends for it.
    faults::accounted(ledger, 1, MOVED).await?;
    space.delete().await
}
