//! Certificates that are renewed under load, on a real Kubernetes. Judged by what every program
//! shows to whoever connects, by what clients were told, and by the Pods, which are the same ones.

use std::collections::BTreeMap;

use super::*;

/// The kubelet brings a changed Secret within two minutes or so; then every program looks.
const BROUGHT: Duration = Duration::from_secs(300);
/// Who holds a certificate that is shown: the Secret, and the label that its Pods have.
const HOLDERS: [(&str, &str); 3] = [
    ("pg-1-tls", "heliosdb.io/instance=pg-1"),
    ("pg-2-tls", "heliosdb.io/instance=pg-2"),
    ("pg-proxy-tls", "heliosdb.io/component=proxy"),
];
/// The control port, and PostgreSQL's or the proxy's own.
const PORTS: [&str; 2] = ["8443", "5432 -starttls postgres"];

/// Runs a script where openssl is: in the first instance's Pod.
async fn inside(space: &Namespace, script: &str) -> Result<String> {
    let args = ["exec", "pg-1-0", "-c", "postgres", "--", "bash", "-c"];
    let mut all = args.to_vec();
    all.push(script);
    Ok(space.kubectl(&all).await?.trim().to_owned())
}

/// A value of a Secret as it is stored.
async fn stored(space: &Namespace, secret: &str, key: &str) -> Result<String> {
    let path = format!("jsonpath={{.data.{}}}", key.replace('.', "\\."));
    space.kubectl(&["get", "secret", secret, "-o", &path]).await
}

/// The serial number of the certificate in a Secret.
async fn serial(space: &Namespace, secret: &str) -> Result<String> {
    let text = stored(space, secret, "tls.crt").await?;
    let script = format!("echo {text} | base64 -d | openssl x509 -noout -serial");
    inside(space, &script).await
}

/// The serial numbers of what a holder's Pods show on both of their ports.
async fn shown(space: &Namespace, selector: &str) -> Result<Vec<String>> {
    let path = "jsonpath={.items[*].status.podIP}";
    let pods = space
        .kubectl(&["get", "pods", "--selector", selector, "-o", path])
        .await?;
    let mut all = Vec::new();
    for (ip, port) in pods
        .split_whitespace()
        .flat_map(|ip| PORTS.map(|port| (ip, port)))
    {
        let script = format!(
            "timeout 10 openssl s_client -connect {ip}:{port} </dev/null 2>/dev/null \
             | openssl x509 -noout -serial"
        );
        all.push(inside(space, &script).await?);
    }
    Ok(all)
}

/// Every Pod with its identity and how often its containers were started again.
async fn pods(space: &Namespace) -> Result<BTreeMap<String, (String, Value)>> {
    let list = space.kubectl(&["get", "pods", "-o", "json"]).await?;
    let list: Value = serde_json::from_str(&list)?;
    let pods = list["items"].as_array().cloned().unwrap_or_default();
    let one = |pod: &Value| {
        let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
        (
            text(pod, "/metadata/name").to_owned(),
            (text(pod, "/metadata/uid").to_owned(), restarts.clone()),
        )
    };
    Ok(pods.iter().map(one).collect())
}

/// Asks for a renewal, and waits until the operator has taken it.
async fn ask(space: &Namespace, what: &str) -> Result<()> {
    let request = format!("heliosdb.io/renew-certificates={what}");
    space.kubectl(&["annotate", "hc/pg", &request]).await?;
    let taken = |o: &Value| {
        let annotations = &o["metadata"]["annotations"];
        annotations.get("heliosdb.io/renew-certificates").is_none()
    };
    space.until("hc", "pg", MOVED, taken).await.map(drop)
}

/// A planned move: operator, agents, proxies and PostgreSQL all talk to each other.
async fn moves(space: &Namespace, number: i64, to: &str) -> Result<()> {
    let ready = |o: &Value| confirms(o, to);
    space.until("hc", "pg", MOVED, ready).await?;
    let request = format!("heliosdb.io/switchover={to}");
    space.kubectl(&["annotate", "hc/pg", &request]).await?;
    let moved = settled(space, number).await?;
    let operation = last_operation(&moved);
    assert_eq!(operation["outcome"], "succeeded", "{operation}");
    assert_eq!(text(&moved, "/status/currentPrimary"), to);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn certificates_are_renewed_under_load_and_nothing_is_restarted()
-> std::result::Result<(), Shown> {
    Ok(renewed().await?)
}

async fn renewed() -> Result<()> {
    let space = Namespace::create("certificates").await?;
    cluster(&space).await?;
    let good = |o: &Value| condition(o, "CertificatesValid")["status"] == "True";
    space.until("hc", "pg", MOVED, good).await?;
    let ledger = Ledger::start(client(&space).await?, WRITERS).await?;
    let before = pods(&space).await?;
    let mut old = BTreeMap::new();
    for (secret, selector) in HOLDERS {
        let serial = serial(&space, secret).await?;
        for shown in shown(&space, selector).await? {
            assert_eq!(shown, serial, "{secret}");
        }
        old.insert(secret, serial);
    }
    let began = Instant::now();
    ask(&space, "certificates").await?;
    for (secret, selector) in HOLDERS {
        let new = serial(&space, secret).await?;
        assert_ne!(Some(&new), old.get(secret), "{secret}");
        loop {
            let shown = shown(&space, selector).await?;
            if !shown.is_empty() && shown.iter().all(|one| *one == new) {
                break;
            }
            assert!(began.elapsed() < BROUGHT, "{secret}: {new}, not {shown:?}");
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        println!("{secret} is shown after {:?}", began.elapsed());
    }
    moves(&space, 1, "pg-2").await?;

    // Everybody is told of a new authority; it issues nothing before a day has passed.
    ask(&space, "authority").await?;
    let since = stored(&space, "pg-ca", "next.trusted-since").await?;
    assert!(!since.is_empty());
    for (secret, _) in HOLDERS {
        let text = stored(&space, secret, "ca.crt").await?;
        let script = format!("echo {text} | base64 -d | grep -c BEGIN");
        assert_eq!(inside(&space, &script).await?, "2", "{secret}");
    }
    moves(&space, 2, "pg-1").await?;

    let events = ["get", "events", "-o", "jsonpath={.items[*].reason}"];
    let events = space.kubectl(&events).await?;
    assert!(events.contains("CertificatesRenewed"), "{events}");
    assert_eq!(pods(&space).await?, before);
    let (count, slowest) = ledger.settle().await?;
    println!("{count} transactions, the longest took {slowest:?}");
    space.delete().await
}
