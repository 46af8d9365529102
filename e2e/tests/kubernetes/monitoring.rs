//! Every query of the dashboards and of the alerts, on a real Prometheus that scrapes the real
//! operator and real proxies while primaries move.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use helios_e2e::kube::{self, Namespace};
use helios_e2e::ledger::Ledger;
use helios_e2e::{Result, Shown};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

use crate::{MOVED, WRITERS, client, cluster, confirms, settled, text};

/// Where the Prometheus of the test listens.
const ADDRESS: &str = "127.0.0.1:19090";
/// How long it may take to have what is asked for.
const LIMIT: Duration = Duration::from_secs(60);

/// Alerts that a planned switchover under load may never fulfil, not even for a moment.
const QUIET: [&str; 7] = [
    "HeliosOperationFailed",
    "HeliosFailover",
    "HeliosOperatorGone",
    "HeliosSessionErrors",
    "HeliosCommitOutcomeUnknown",
    "HeliosLossyPromotion",
    "HeliosReplayMismatch",
];

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn dashboards_and_alerts_ask_for_what_there_is() -> std::result::Result<(), Shown> {
    Ok(queries().await?)
}

async fn queries() -> Result<()> {
    if Command::new("prometheus")
        .arg("--version")
        .output()
        .await
        .is_err()
    {
        return Err("there is no Prometheus: apt-get install prometheus".into());
    }
    let space = Namespace::create("monitoring").await?;
    cluster(&space).await?;
    let folder = tempfile::tempdir()?;
    let _prometheus = start(&space, folder.path()).await?;
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    space
        .until("hc", "pg", MOVED, |o| confirms(o, "pg-2"))
        .await?;
    space
        .kubectl(&["annotate", "hc/pg", "heliosdb.io/switchover=auto"])
        .await?;
    settled(&space, 1).await?;
    let mut wrong = Vec::new();
    for (name, expr) in panels()? {
        let found = until_found(&expr).await?;
        println!("{found:>4} series: {name}: {expr}");
        // What has not happened, one hopes: Prometheus shows no series for it, or zeros.
        if found == 0 {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "nothing to show: {wrong:#?}");
    for (name, expr) in alerts()? {
        let answer = ask(&expr).await?;
        assert_eq!(answer["status"], "success", "{name}: {answer}");
        // A switchover is no reason for these; others may be true for a moment.
        assert!(
            !QUIET.contains(&&*name) || count(&answer) == 0,
            "{name}: {answer}"
        );
    }
    ledger.settle().await?;
    space.delete().await
}

/// The queries of all panels, with Grafana's variables put in.
fn panels() -> Result<Vec<(String, String)>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../charts/helios-operator/files/dashboards");
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let board: Value = serde_json::from_str(&std::fs::read_to_string(entry?.path())?)?;
        for panel in board["panels"].as_array().ok_or("no panels")? {
            for target in panel["targets"].as_array().ok_or("no targets")? {
                let name = format!(
                    "{}: {} {}",
                    text(&board, "/title"),
                    text(panel, "/title"),
                    text(target, "/refId")
                );
                let expr = text(target, "/expr")
                    .replace("$__rate_interval", "1m")
                    .replace("$namespace", ".*")
                    .replace("$cluster", ".*");
                all.push((name, expr));
            }
        }
    }
    assert!(all.len() > 20, "{} queries", all.len());
    Ok(all)
}

/// The alerts' expressions, as Prometheus has read them. What a switchover in the last minutes
/// says of itself is left out.
fn alerts() -> Result<Vec<(String, String)>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../charts/helios-operator/files/alerts.yaml");
    let lines = std::fs::read_to_string(path)?;
    let mut all = Vec::new();
    let mut name = String::new();
    let mut lines = lines.lines().map(str::trim).peekable();
    while let Some(line) = lines.next() {
        if let Some(alert) = line.strip_prefix("- alert: ") {
            alert.clone_into(&mut name);
        } else if line == "expr: >-" {
            let mut expr = String::new();
            while let Some(more) = lines.next_if(|l| !l.starts_with("for:")) {
                expr.push_str(more);
                expr.push(' ');
            }
            all.push((name.clone(), expr));
        } else if let Some(expr) = line.strip_prefix("expr: ") {
            all.push((name.clone(), expr.to_owned()));
        }
    }
    assert!(all.len() > 10, "{} alerts", all.len());
    Ok(all)
}

/// A Prometheus with what the chart's PodMonitors say, written out.
async fn start(space: &Namespace, folder: &Path) -> Result<Child> {
    let job = |name: &str, targets: Vec<Value>| json!({"job_name": name, "honor_labels": true, "static_configs": targets});
    let operators = targets("helios-system", "app.kubernetes.io/name=helios-operator").await?;
    let proxies = targets(&space.name, "heliosdb.io/component=proxy").await?;
    let config = json!({
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [job("operator", operators), job("proxies", proxies)],
    });
    let file = folder.join("prometheus.yml");
    std::fs::write(&file, config.to_string())?;
    let child = Command::new("prometheus")
        .arg(format!("--config.file={}", file.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            folder.join("data").display()
        ))
        .arg(format!("--web.listen-address={ADDRESS}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let deadline = Instant::now() + LIMIT;
    while ask("up == 1").await.map_or(0, |a| count(&a)) < 4 {
        if Instant::now() > deadline {
            return Err("Prometheus does not reach all targets".into());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(child)
}

async fn targets(space: &str, selector: &str) -> Result<Vec<Value>> {
    let list = [
        "get",
        "pods",
        "--namespace",
        space,
        "-l",
        selector,
        "-o",
        "json",
    ];
    let pods: Value = serde_json::from_str(&kube::run(&list, None).await?)?;
    let running = |p: &&Value| text(p, "/status/phase") == "Running";
    let one = |p: &Value| {
        json!({
            "targets": [format!("{}:9187", text(p, "/status/podIP"))],
            "labels": {
                "namespace": space,
                "pod": text(p, "/metadata/name"),
                "cluster": p["metadata"]["labels"]["heliosdb.io/cluster"],
            },
        })
    };
    let all = pods["items"].as_array().ok_or("no Pods")?;
    let mut all: Vec<Value> = all.iter().filter(running).map(one).collect();
    for target in &mut all {
        if target["labels"]["cluster"].is_null()
            && let Some(labels) = target["labels"].as_object_mut()
        {
            labels.remove("cluster");
        }
    }
    Ok(all)
}

fn count(answer: &Value) -> usize {
    answer["data"]["result"].as_array().map_or(0, Vec::len)
}

/// Asks until there is something, for a while.
async fn until_found(expr: &str) -> Result<usize> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let answer = ask(expr).await?;
        if answer["status"] != "success" {
            return Err(format!("{expr}: {answer}").into());
        }
        if count(&answer) > 0 || Instant::now() > deadline {
            return Ok(count(&answer));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// One query. Prometheus speaks HTTP/1.0 too, which needs no library.
async fn ask(expr: &str) -> Result<Value> {
    let hex = |b: u8| match b {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(b).to_string(),
        _ => format!("%{b:02X}"),
    };
    let query: String = expr.bytes().map(hex).collect();
    let mut stream = tokio::net::TcpStream::connect(ADDRESS).await?;
    let request = format!("GET /api/v1/query?query={query} HTTP/1.0\r\nhost: {ADDRESS}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
    Ok(serde_json::from_str(body)?)
}
