//! The charts and the samples on a real API server; what the operator may do there; and who may
//! talk to the control ports.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use helios_e2e::kube::{self, Namespace};
use helios_e2e::ledger::connect;
use helios_e2e::{Result, Shown};
use serde_json::Value;
use tokio::process::Command;

use crate::{UP, client_of, is_ready, sample, text};

/// The operator's identity where the tests install it.
const ACCOUNT: &str = "system:serviceaccount:helios-system:helios-operator";
/// How long one Helm command may take.
const LIMIT: Duration = Duration::from_secs(120);

pub(super) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What a program prints, or why it failed.
async fn output(program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).kill_on_drop(true);
    let output = tokio::time::timeout(LIMIT, command.output()).await??;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{args:?}: {}", String::from_utf8_lossy(&output.stderr)).into())
}

pub(super) async fn helm(args: &[&str]) -> Result<String> {
    let script = root().join("e2e/kubernetes/helm.sh");
    let program = output(&script.display().to_string(), &[]).await?;
    output(program.trim(), args).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_cluster_is_installed_from_values() -> std::result::Result<(), Shown> {
    Ok(from_values().await?)
}

async fn from_values() -> Result<()> {
    let space = Namespace::create("values").await?;
    let chart = root().join("charts/helios-cluster").display().to_string();
    let image = format!("imageName={}", std::env::var("HELIOS_POSTGRES_IMAGE")?);
    let install = [
        "install",
        "shop",
        &chart,
        "--namespace",
        &space.name,
        "--disable-openapi-validation",
        "--set",
        &image,
        "--set-string",
        "postgresql.parameters.max_connections=77",
        "--set",
        "proxy.transactionReplay.maxTotalJournalBytes=1073741824",
    ];
    helm(&install).await?;
    let object = space.until("hc", "shop", UP, is_ready).await?;
    let bytes = &object["spec"]["proxy"]["transactionReplay"]["maxTotalJournalBytes"];
    assert_eq!(
        bytes.as_i64(),
        Some(1_073_741_824),
        "a large number stays whole"
    );
    let session = connect(&client_of(&space, "shop").await?).await?;
    let row = session.query_one("show max_connections", &[]).await?;
    assert_eq!(row.get::<_, String>(0), "77");
    // What is no field is refused before the API server is asked.
    let template = |set: &'static str| {
        let chart = chart.clone();
        async move { helm(&["template", "x", &chart, "--set", set]).await }
    };
    for wrong in [
        "instances=0",
        "storage.siez=1Gi",
        "proxy.replicas=many",
        "instance=3",
    ] {
        assert!(template(wrong).await.is_err(), "{wrong}");
    }
    helm(&["uninstall", "shop", "--namespace", &space.name]).await?;
    space.delete().await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn every_sample_is_accepted_and_the_medium_ones_serve() -> std::result::Result<(), Shown> {
    Ok(samples().await?)
}

async fn samples() -> Result<()> {
    let space = Namespace::create("samples").await?;
    let folder = root().join("manifests/samples");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|n| n.to_str()).ok_or("no name")?;
        let yaml = sample(name)?;
        let dry = [
            "--namespace",
            &space.name,
            "apply",
            "--dry-run=server",
            "-f",
            "-",
        ];
        kube::run(&dry, Some(&yaml)).await?;
        seen += 1;
    }
    assert!(seen >= 5, "{seen} samples");
    // No connection without TLS, and every commit on another instance too.
    space.apply(&sample("tls")?).await?;
    space.apply(&sample("synchronous")?).await?;
    space.until("hc", "ledger", UP, is_ready).await?;
    space.until("hc", "vault", UP, is_ready).await?;
    let plain = client_of(&space, "vault").await?;
    let refused = connect(&plain).await.err();
    let refused = refused.map(|e| format!("{e:?}")).unwrap_or_default();
    assert!(refused.contains("28000"), "{refused}");
    let ledger = client_of(&space, "ledger").await?;
    let session = connect(&ledger).await?;
    let row = session
        .query_one("show synchronous_standby_names", &[])
        .await?;
    let names: String = row.get(0);
    assert!(names.contains("ledger-"), "{names}");
    space.delete().await
}

/// What `kubectl auth can-i` answers for the operator.
async fn may(verb: &str, what: &str, space: &str) -> Result<bool> {
    let mut command = Command::new("kubectl");
    command.args(["auth", "can-i", verb, what, "--as", ACCOUNT]);
    match space {
        "" => command.arg("--all-namespaces"),
        name => command.args(["--namespace", name]),
    };
    let output = tokio::time::timeout(LIMIT, command.output()).await??;
    Ok(String::from_utf8_lossy(&output.stdout).trim() == "yes")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn the_operator_may_do_what_it_does_and_no_more() -> std::result::Result<(), Shown> {
    Ok(rights().await?)
}

async fn rights() -> Result<()> {
    for (verb, what) in [
        ("list", "secrets"),
        ("watch", "secrets"),
        ("delete", "deployments"),
        ("create", "pods"),
        ("create", "pods/exec"),
        ("create", "pods/portforward"),
        ("delete", "heliosclusters"),
        ("create", "roles"),
        ("create", "clusterrolebindings"),
        ("get", "nodes"),
        ("impersonate", "users"),
        ("create", "serviceaccounts/token"),
        ("get", "leases"),
    ] {
        assert!(
            !may(verb, what, "").await?,
            "the operator may {verb} {what}"
        );
    }
    // Its own lease, in its own namespace.
    assert!(may("get", "leases/helios-operator", "helios-system").await?);
    assert!(!may("get", "leases/another", "helios-system").await?);
    for (verb, what) in [
        ("watch", "heliosclusters"),
        ("patch", "heliosclusters/status"),
        ("get", "secrets"),
        ("create", "statefulsets"),
        ("patch", "services"),
        ("delete", "pods"),
        ("delete", "statefulsets"),
    ] {
        assert!(
            may(verb, what, "").await?,
            "the operator may not {verb} {what}"
        );
    }
    // Nothing that it tried was refused, and it has tried a whole cluster.
    let space = Namespace::create("rights").await?;
    crate::cluster(&space).await?;
    let args = [
        "logs",
        "--namespace",
        "helios-system",
        "--tail=-1",
        "--selector",
    ];
    let mut all = args.to_vec();
    all.push("app.kubernetes.io/name=helios-operator");
    let logs = kube::run(&all, None).await?;
    let refused = |l: &&str| l.contains("orbidden") && !l.contains(NAMESPACE_ENDS);
    let refused: Vec<_> = logs.lines().filter(refused).collect();
    assert!(refused.is_empty(), "{refused:#?}");
    audited()?;
    space.delete().await
}

/// Nobody may make anything in a namespace that is being deleted: admission says so, with the same
/// code as RBAC.
const NAMESPACE_ENDS: &str = "because it is being terminated";

/// What the API server has noted of the operator's requests, where it keeps notes: none was
/// refused. Rights that no request has used are shown.
fn audited() -> Result<()> {
    let path = std::env::var("HELIOS_AUDIT_LOG").unwrap_or_default();
    if path.is_empty() {
        println!("no audit log: the API server was started without one");
        return Ok(());
    }
    let mut used = BTreeSet::new();
    let mut refused = BTreeSet::new();
    for line in std::fs::read_to_string(path)?.lines() {
        let entry: Value = serde_json::from_str(line)?;
        let object = &entry["objectRef"];
        if object.is_null() {
            continue;
        }
        let subresource = match text(object, "/subresource") {
            "" => String::new(),
            name => format!("/{name}"),
        };
        let what = format!("{}{subresource}", text(object, "/resource"));
        let right = (what, text(&entry, "/verb").to_owned());
        // Admission refuses with the same code what would be made in a namespace that ends; it is
        // noted without its words.
        if entry["annotations"]["authorization.k8s.io/decision"] == "forbid" {
            refused.insert(right.clone());
        }
        used.insert(right);
    }
    assert!(refused.is_empty(), "refused: {refused:?}");
    assert!(used.len() > 10, "hardly anything was noted: {used:?}");
    let rules = std::fs::read_to_string(root().join("charts/helios-operator/templates/rbac.yaml"))?;
    let list = |line: &str| -> Vec<String> {
        let inner = line
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'));
        let inner = inner.map_or("", |(inner, _)| inner);
        inner.split(',').map(|w| w.trim().to_owned()).collect()
    };
    let mut resources = Vec::new();
    for line in rules.lines() {
        if line.trim_start().starts_with("resources:") {
            resources = list(line);
        }
        if line.trim_start().starts_with("verbs:") {
            for (what, verb) in resources
                .iter()
                .flat_map(|r| list(line).into_iter().map(move |v| (r.clone(), v)))
            {
                if !used.contains(&(what.clone(), verb.clone())) {
                    println!("not used so far: {verb} {what}");
                }
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn a_pod_without_the_certificates_is_refused() -> std::result::Result<(), Shown> {
    Ok(strangers().await?)
}

/// Asks `port` of `address` from inside of a Pod, with the given options of openssl.
async fn ask_from(space: &Namespace, pod: &str, address: &str, options: &str) -> Result<String> {
    let script = format!(
        "(printf 'GET /v1/status HTTP/1.1\\r\\nhost: helios\\r\\nconnection: close\\r\\n\\r\\n'; \
         sleep 2) | timeout 10 openssl s_client -quiet -connect {address}:8443 {options} 2>&1 || true"
    );
    space
        .kubectl(&["exec", pod, "--", "bash", "-c", &script])
        .await
}

async fn strangers() -> Result<()> {
    let space = Namespace::create("strangers").await?;
    crate::cluster(&space).await?;
    let image = std::env::var("HELIOS_POSTGRES_IMAGE")?;
    let args = [
        "run",
        "stranger",
        "--image",
        &image,
        "--restart=Never",
        "--command",
        "--",
    ];
    let mut all = args.to_vec();
    all.extend(["sleep", "600"]);
    space.kubectl(&all).await?;
    let running = |o: &Value| text(o, "/status/phase") == "Running";
    space.until("pod", "stranger", UP, running).await?;
    // A certificate of the cluster's authority, but not the operator's: that of the proxies.
    let mut write = String::new();
    for (secret, own) in [("pg-proxy-tls", "proxy"), ("pg-operator-tls", "operator")] {
        for key in ["ca.crt", "tls.crt", "tls.key"] {
            let path = format!("jsonpath={{.data.{}}}", key.replace('.', "\\."));
            let value = space
                .kubectl(&["get", "secret", secret, "-o", &path])
                .await?;
            write.push_str(&format!("echo {value} | base64 -d >/tmp/{own}.{key}\n"));
        }
    }
    space
        .kubectl(&["exec", "stranger", "--", "bash", "-c", &write])
        .await?;
    let with = |own: &str| format!("-cert /tmp/{own}.tls.crt -key /tmp/{own}.tls.key");
    for selector in [
        "heliosdb.io/component=instance",
        "heliosdb.io/component=proxy",
    ] {
        let pods = space
            .kubectl(&["get", "pods", "-l", selector, "-o", "json"])
            .await?;
        let pods: Value = serde_json::from_str(&pods)?;
        let address = text(&pods, "/items/0/status/podIP").to_owned();
        // Whoever may is answered, whatever it is: otherwise the refusals would say nothing.
        let own = ask_from(&space, "stranger", &address, &with("operator")).await?;
        assert!(own.contains("HTTP/1.1 "), "{selector}: {own}");
        for options in [String::new(), with("proxy")] {
            let answer = ask_from(&space, "stranger", &address, &options).await?;
            println!("{selector} with \"{options}\": {}", answer.trim());
            assert!(
                !answer.contains("HTTP/1.1 "),
                "{selector} {options}: {answer}"
            );
        }
    }
    space.delete().await
}
