//! The exact requests of renewals, against an API server that keeps Secrets.

use serde_json::Value;

use super::*;
use crate::certificates::{self, Pair};
use crate::reconcile::tests::{CORE, object};
use crate::shelf::{CLUSTER, EVENT, HOLDERS, OLD, Server, days_ago, pod};
use helios_control::{ControlClient, Live, Material};

fn reads() -> Vec<String> {
    let secrets = ["pg-ca"].into_iter().chain(HOLDERS);
    secrets
        .map(|name| format!("GET {CORE}/secrets/{name}"))
        .collect()
}

fn write(name: &str) -> String {
    format!("PUT {CORE}/secrets/{name}")
}

/// All reads, then these, and the application's Secret at some place.
#[track_caller]
fn asked_for(lines: &[String], rest: &[String]) {
    let mut lines = lines.to_vec();
    lines.retain(|line| !line.ends_with("/pg-app") && *line != format!("POST {CORE}/secrets"));
    let mut expected = reads();
    expected.extend_from_slice(rest);
    assert_eq!(lines, expected);
}

#[tokio::test]
async fn where_nothing_is_due_nothing_is_written() {
    let server = Server::start(None).await;
    // Made in the first round.
    server.keep(None, &[]).await;
    let (kept, lines) = server.keep(None, &[]).await;
    asked_for(&lines, &[]);
    assert_eq!(server.days("pg-2-tls"), 90);
    assert!(kept.verdict.good, "{:?}", kept.verdict);
    assert_eq!(kept.verdict.reason, "Valid");
    let days = kept.again.as_secs() / 86_400;
    assert!((59..=60).contains(&days), "{days}");
}

#[tokio::test]
async fn a_certificate_whose_end_is_near_is_renewed_alone() {
    let server = Server::with(days_ago(10, 3650), days_ago(10, 90)).await;
    let ca = Pair {
        certificate: server.text("pg-ca", "ca.crt"),
        key: server.text("pg-ca", "ca.key"),
    };
    server.issue(&ca, "pg-2-tls", days_ago(61, 90));
    let before = server.pair("pg-2-tls");
    let (kept, lines) = server.keep(None, &[]).await;
    asked_for(&lines, &[write("pg-2-tls"), EVENT.to_owned()]);
    let after = server.pair("pg-2-tls");
    assert!(before.certificate != after.certificate && before.key != after.key);
    assert!(certificates::fits(&ca.certificate, &after));
    assert_eq!(server.days("pg-2-tls"), 90);
    assert_eq!(server.text("pg-2-tls", "ca.crt"), ca.certificate);
    assert!(kept.verdict.good);
    // What somebody else has put there stays.
    let calls = server.mock.calls();
    let put = calls.iter().find(|c| c.what.starts_with("PUT")).unwrap();
    assert_eq!(put.body["metadata"]["labels"]["mine"], "too");
    let event = calls.iter().find(|c| c.what == EVENT).unwrap();
    assert_eq!(event.body["reason"], "CertificatesRenewed");
    let note = event.body["note"].as_str().unwrap();
    assert_eq!(
        note,
        "\"pg-2-tls\" has a new certificate (its end was near)"
    );
}

#[tokio::test]
async fn an_authority_is_believed_for_a_day_before_it_issues() {
    let server = Server::with(days_ago(2500, 3650), days_ago(10, 90)).await;
    let first = server.text("pg-ca", "ca.crt");
    let leaf = server.pair("pg-1-tls");
    let (_, lines) = server.keep(None, &[]).await;
    let all = |one: &str, then: Option<&str>| {
        let mut all = vec![write(one)];
        all.extend(HOLDERS.iter().map(|holder| write(holder)));
        all.extend(then.map(write));
        all.push(EVENT.to_owned());
        all
    };
    asked_for(&lines, &all("pg-ca", Some("pg-ca")));
    let next = server.text("pg-ca", "next.crt");
    for holder in HOLDERS {
        assert_eq!(server.text(holder, "ca.crt"), format!("{first}{next}"));
    }
    // Nothing was issued, and nothing more is done on the same day.
    assert_eq!(server.pair("pg-1-tls"), leaf);
    assert_eq!(server.text("pg-ca", "ca.crt"), first);
    let (kept, lines) = server.keep(None, &[]).await;
    asked_for(&lines, &[]);
    let hours = kept.again.as_secs() / 3600;
    assert!((23..=24).contains(&hours), "{hours}");

    let yesterday = (now() - DAY).to_string();
    let (next_key, ca_key) = (
        server.text("pg-ca", "next.key"),
        server.text("pg-ca", "ca.key"),
    );
    let data = [
        ("ca.crt", &*first),
        ("ca.key", &*ca_key),
        ("next.crt", &*next),
        ("next.key", &*next_key),
        ("next.trusted-since", &*yesterday),
    ];
    server.set("pg-ca", &data);
    let (_, lines) = server.keep(None, &[]).await;
    asked_for(&lines, &all("pg-ca", None));
    assert_eq!(server.text("pg-ca", "ca.crt"), next);
    assert_eq!(server.text("pg-ca", "ca.key"), next_key);
    assert_eq!(server.text("pg-ca", "former.crt"), first);
    assert_eq!(server.text("pg-ca", "next.key"), "");
    for holder in HOLDERS {
        let pair = server.pair(holder);
        assert!(certificates::is_issued_by(&pair.certificate, &next));
        // Peers that still have the one before are believed.
        assert_eq!(server.text(holder, "ca.crt"), format!("{next}{first}"));
    }
}

#[tokio::test]
async fn an_old_cluster_changes_only_where_programs_read_again() {
    let server = Server::with(OLD, OLD).await;
    let old = server.pair("pg-1-tls");
    let pods = [pod("pg-1", false), pod("pg-2", true)];
    let (kept, lines) = server.keep(None, &pods).await;
    let written = ["pg-2-tls", "pg-proxy-tls", "pg-operator-tls"].map(write);
    let mut expected = written.to_vec();
    expected.push(EVENT.to_owned());
    asked_for(&lines, &expected);
    assert_eq!(server.pair("pg-1-tls"), old);
    assert_eq!(server.days("pg-2-tls"), 90);
    assert_eq!((kept.verdict.good, kept.verdict.reason), (true, "OldPods"));
    assert!(kept.verdict.message.contains("pg-1"), "{:?}", kept.verdict);
    // Its Pod was replaced: the rest follows, and a new authority is announced.
    let pods = [pod("pg-1", true), pod("pg-2", true)];
    let (_, lines) = server.keep(None, &pods).await;
    let mut expected = vec![write("pg-ca")];
    expected.extend(HOLDERS.map(write));
    expected.extend([write("pg-ca"), EVENT.to_owned()]);
    asked_for(&lines, &expected);
    assert_eq!(server.days("pg-1-tls"), 90);
    let believed = certificates::each(&server.text("pg-1-tls", "ca.crt"));
    assert_eq!(believed.len(), 2);
}

#[tokio::test]
async fn what_cannot_be_written_is_said_and_keeps_nothing_else() {
    let server = Server::start(Some("pg-1-tls")).await;
    let ca = certificates::authority(days_ago(10, 3650)).unwrap();
    server.set_authority(&ca);
    for holder in HOLDERS {
        server.issue(&ca, holder, days_ago(70, 90));
    }
    let (kept, lines) = server.keep(None, &[]).await;
    let mut expected: Vec<_> = HOLDERS.iter().map(|holder| write(holder)).collect();
    // One of what was renewed, one of what was not.
    expected.extend([EVENT.to_owned(), EVENT.to_owned()]);
    asked_for(&lines, &expected);
    assert_eq!(server.days("pg-1-tls"), 20);
    assert_eq!(server.days("pg-2-tls"), 90);
    assert_eq!(
        (kept.verdict.good, kept.verdict.reason),
        (false, "CannotRenew")
    );
    assert!(kept.verdict.message.contains("it may not be changed"));
    assert!(kept.again <= Duration::from_secs(60));
    let reasons: Vec<_> = server
        .mock
        .calls()
        .iter()
        .filter(|call| call.what == EVENT)
        .map(|call| call.body["reason"].clone())
        .collect();
    assert_eq!(reasons, ["CertificatesRenewed", "CertificatesNotRenewed"]);
}

#[tokio::test]
async fn an_annotation_asks_and_is_removed() {
    let server = Server::with(days_ago(10, 3650), days_ago(10, 90)).await;
    let (_, lines) = server.keep(Some("certificates"), &[]).await;
    let mut expected: Vec<_> = HOLDERS.iter().map(|holder| write(holder)).collect();
    expected.extend([EVENT.to_owned(), CLUSTER.to_owned()]);
    asked_for(&lines, &expected);
    let calls = server.mock.calls();
    let patch = calls.iter().find(|call| call.what == CLUSTER).unwrap();
    let removed = json!({"metadata": {"annotations": {names::RENEW: null}}});
    assert_eq!(patch.body, removed);
    // An authority is announced, and everybody is told of it with a new certificate.
    let (_, lines) = server.keep(Some("authority"), &[]).await;
    let mut expected = vec![write("pg-ca")];
    expected.extend(HOLDERS.map(write));
    expected.extend([write("pg-ca"), EVENT.to_owned(), CLUSTER.to_owned()]);
    asked_for(&lines, &expected);
    // What is not understood is told.
    let (_, lines) = server.keep(Some("everything"), &[]).await;
    asked_for(&lines, &[EVENT.to_owned(), CLUSTER.to_owned()]);
    let last = server.mock.calls().into_iter().rfind(|c| c.what == EVENT);
    assert_eq!(last.unwrap().body["reason"], "RenewalRefused");
}

#[tokio::test]
async fn what_somebody_else_has_made_is_not_touched() {
    let server = Server::with(days_ago(10, 3650), days_ago(10, 90)).await;
    let ca = Pair {
        certificate: server.text("pg-ca", "ca.crt"),
        key: server.text("pg-ca", "ca.key"),
    };
    server.issue(&ca, "pg-proxy-tls", days_ago(80, 90));
    let labels = |secret: &mut Value| secret["metadata"]["labels"] = json!({});
    labels(
        server
            .shelf
            .lock()
            .unwrap()
            .get_mut("pg-proxy-tls")
            .unwrap(),
    );
    let (kept, lines) = server.keep(Some("certificates"), &[]).await;
    let ours = ["pg-1-tls", "pg-2-tls", "pg-operator-tls"].map(write);
    let mut expected = ours.to_vec();
    expected.extend([EVENT.to_owned(), CLUSTER.to_owned()]);
    asked_for(&lines, &expected);
    assert_eq!((kept.verdict.good, kept.verdict.reason), (false, "NotOurs"));
    assert!(kept.verdict.message.contains("pg-proxy-tls"));
}

fn material(authorities: &str, pair: &Pair) -> Material {
    let material = Material::from_pem(
        authorities.as_bytes(),
        pair.certificate.as_bytes(),
        pair.key.as_bytes(),
    );
    material.unwrap()
}

/// A control port.
async fn port(at: &str, live: &Live) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind(at).await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = axum::Router::new().route("/", axum::routing::get(|| async { "here" }));
    let stop = tokio_util::sync::CancellationToken::new();
    helios_control::serve(listener, router, live, names::OPERATOR_IDENTITY, stop);
    address
}

/// A control port with what an instance's Secret holds, believing the authority that issues now.
async fn instance(server: &Server) -> SocketAddr {
    let pair = server.pair("pg-1-tls");
    let live = Live::new(&material(&server.text("pg-ca", "ca.crt"), &pair)).unwrap();
    port("127.0.0.1:0", &live).await
}

/// All Secrets have named it for a day; but a program that serves has not heard of it.
#[tokio::test]
async fn an_authority_issues_only_when_every_program_was_seen_to_believe_it() {
    let server = Server::with(days_ago(2500, 3650), days_ago(10, 90)).await;
    server.keep(None, &[]).await;
    let keys = ["ca.crt", "ca.key", "next.crt", "next.key"];
    let texts = keys.map(|key| server.text("pg-ca", key));
    let mut data: Vec<_> = keys
        .iter()
        .copied()
        .zip(texts.iter().map(|t| &**t))
        .collect();
    let yesterday = (now() - DAY).to_string();
    data.push(("next.trusted-since", &yesterday));
    server.set("pg-ca", &data);

    // Where nothing else listens on that port.
    let ip = format!("127.{}.8.43", std::process::id() % 250 + 1);
    let first = server.text("pg-ca", "ca.crt");
    let live = Live::new(&material(&first, &server.pair("pg-1-tls"))).unwrap();
    port(&format!("{ip}:{}", names::CONTROL_PORT), &live).await;
    let mut serves = pod("pg-1", true);
    let status = json!({"podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]});
    serves.status = serde_json::from_value(status).unwrap();
    let pods = [serves, pod("pg-2", true)];
    let (kept, lines) = server.keep(None, &pods).await;
    asked_for(&lines, &[]);
    assert_eq!(
        (kept.verdict.good, kept.verdict.reason),
        (false, "NotBelieved")
    );
    assert!(
        kept.verdict.message.contains("pg-1-0"),
        "{:?}",
        kept.verdict
    );
    assert!(kept.again <= Duration::from_secs(60));

    // It reads its files.
    let all = server.text("pg-1-tls", "ca.crt");
    live.replace(&material(&all, &server.pair("pg-1-tls")))
        .unwrap();
    let (_, lines) = server.keep(None, &pods).await;
    let mut expected = vec![write("pg-ca")];
    expected.extend(HOLDERS.map(write));
    expected.push(EVENT.to_owned());
    asked_for(&lines, &expected);
    assert_ne!(server.text("pg-ca", "ca.crt"), first);
}

#[tokio::test]
async fn clients_of_the_operator_go_on_with_new_certificates() {
    let server = Server::with(days_ago(10, 3650), days_ago(10, 90)).await;
    let (first, _) = server.keep(None, &[]).await;
    let asks = async |address| {
        let certificates = &first.secrets.operator;
        let client = ControlClient::new(address, "pg-1", certificates).unwrap();
        let limit = Duration::from_secs(10);
        let asked = client.call(hyper::Method::GET, "/", Vec::new(), limit);
        asked.await.is_ok()
    };
    assert!(asks(instance(&server).await).await);
    // Another authority, of which the operator's clients have heard nothing yet.
    let second = certificates::authority(days_ago(0, 3650)).unwrap();
    server.set_authority(&second);
    let (next, _) = server.keep(None, &[]).await;
    let address = instance(&server).await;
    assert!(!asks(address).await);
    // The conductor is told of the new Secrets; clients that it has made before use them.
    let known = first.secrets.renewed(&next.secrets);
    assert!(asks(address).await);
    assert_eq!(known.app_password, next.secrets.app_password);
}

#[test]
fn pods_that_are_not_known_are_taken_for_old_ones() {
    let valid = ValidCluster::new(&object("1Gi")).unwrap();
    let all = unchanging(&valid, None);
    assert_eq!(Vec::from_iter(all), ["pg-1", "pg-2", "pg-proxy"]);
    assert_eq!(unchanging(&valid, Some(&[])), BTreeSet::new());
}
