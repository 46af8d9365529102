//! An API server for tests that keeps Secrets, and what they are filled with.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use helios_api::v1alpha1::names;
use helios_api::v1alpha1::valid::ValidCluster;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::runtime::{reflector, watcher};
use serde_json::{Value, json};

use crate::certificates::{self, Pair, Span};
use crate::mock::{Call, Mock, refusal};
use crate::reconcile::tests::{CORE, empty, object, world_with};
use crate::renewal::DAY;
use crate::renewing::{Kept, keep, now};

pub(crate) const HOLDERS: [&str; 4] = ["pg-1-tls", "pg-2-tls", "pg-proxy-tls", "pg-operator-tls"];
pub(crate) const EVENT: &str = "POST /apis/events.k8s.io/v1/namespaces/shop/events";
pub(crate) const CLUSTER: &str =
    "PATCH /apis/heliosdb.io/v1alpha1/namespaces/shop/heliosclusters/pg";
/// As certificates were made before any was renewed: 2020 to 2049.
pub(crate) const OLD: Span = Span {
    from: 1_577_836_800,
    until: 2_524_521_600,
};

pub(crate) type Shelf = Arc<Mutex<BTreeMap<String, Value>>>;

/// An API server with a shelf of Secrets, which refuses to change one of them.
pub(crate) struct Server {
    pub(crate) mock: Mock,
    pub(crate) shelf: Shelf,
}

impl Server {
    pub(crate) async fn start(refused: Option<&'static str>) -> Self {
        let shelf: Shelf = Arc::default();
        let kept = Arc::clone(&shelf);
        let answer = move |call: &Call| {
            if call.what == CLUSTER {
                return (200, json!(object("1Gi")));
            }
            let mut shelf = kept.lock().unwrap();
            let (verb, path) = call.what.split_once(' ').unwrap();
            let Some(rest) = path.strip_prefix(&format!("{CORE}/secrets")) else {
                return empty(call);
            };
            let name = rest.trim_start_matches('/').to_owned();
            match verb {
                "GET" => match shelf.get(&name) {
                    Some(secret) => (200, secret.clone()),
                    None => refusal(404, "not found"),
                },
                "PUT" if refused == Some(&*name) => refusal(403, "it may not be changed"),
                "PUT" => {
                    let version = |o: &Value| o["metadata"]["resourceVersion"].clone();
                    if version(&shelf[&name]) != version(&call.body) {
                        return refusal(409, "it has been changed");
                    }
                    (200, put(&mut shelf, call.body.clone()))
                }
                _ => (200, put(&mut shelf, empty(call).1)),
            }
        };
        let mock = Mock::start(answer).await;
        Self { mock, shelf }
    }

    /// One whose cluster was made at some time, with an authority that is valid from then on.
    pub(crate) async fn with(authority: Span, leaf: Span) -> Self {
        let server = Self::start(None).await;
        let ca = certificates::authority(authority).unwrap();
        server.set_authority(&ca);
        for holder in HOLDERS {
            server.issue(&ca, holder, leaf);
        }
        server
    }

    pub(crate) fn set_authority(&self, ca: &Pair) {
        let data = [("ca.crt", &*ca.certificate), ("ca.key", &*ca.key)];
        self.set("pg-ca", &data);
    }

    /// A holder's Secret, as it would have been made.
    pub(crate) fn issue(&self, ca: &Pair, holder: &str, valid: Span) {
        let name = match holder.strip_suffix("-tls") {
            Some("pg-proxy") => names::PROXY_IDENTITY,
            Some("pg-operator") => names::OPERATOR_IDENTITY,
            other => other.unwrap(),
        };
        let pair = certificates::issue(ca, "helios", &[name.to_owned()], valid).unwrap();
        let data = [
            ("ca.crt", &*ca.certificate),
            ("tls.crt", &*pair.certificate),
            ("tls.key", &*pair.key),
        ];
        self.set(holder, &data);
    }

    pub(crate) fn set(&self, name: &str, data: &[(&str, &str)]) {
        let bytes = |text: &str| json!(ByteString(text.as_bytes().to_vec()));
        let data: serde_json::Map<_, _> = data
            .iter()
            .map(|(key, text)| ((*key).to_owned(), bytes(text)))
            .collect();
        let labels = json!({"app.kubernetes.io/managed-by": "helios-operator", "mine": "too"});
        let secret = json!({"metadata": {"name": name, "labels": labels}, "data": data});
        put(&mut self.shelf.lock().unwrap(), secret);
    }

    /// What a Secret holds.
    pub(crate) fn text(&self, name: &str, key: &str) -> String {
        let secret = self.shelf.lock().unwrap()[name].clone();
        let secret: Secret = serde_json::from_value(secret).unwrap();
        let data = secret.data.unwrap();
        let text = data.get(key).map(|bytes| bytes.0.clone());
        String::from_utf8(text.unwrap_or_default()).unwrap()
    }

    pub(crate) fn pair(&self, name: &str) -> Pair {
        Pair {
            certificate: self.text(name, "tls.crt"),
            key: self.text(name, "tls.key"),
        }
    }

    /// Days that a holder's certificate is still valid for.
    pub(crate) fn days(&self, name: &str) -> i64 {
        let valid = certificates::span(&self.text(name, "tls.crt")).unwrap();
        (valid.until - now() + 60) / DAY
    }

    /// One reconciliation's part, and what it asked of the API server.
    pub(crate) async fn keep(&self, ask: Option<&str>, pods: &[Pod]) -> (Kept, Vec<String>) {
        let before = self.mock.lines().len();
        let mut cluster = object("1Gi");
        let annotation = ask.map(|text| (names::RENEW.to_owned(), text.to_owned()));
        cluster.metadata.annotations = Some(annotation.into_iter().collect());
        let (store, mut writer) = reflector::store();
        writer.apply_watcher_event(&watcher::Event::Init);
        for pod in pods {
            writer.apply_watcher_event(&watcher::Event::InitApply(pod.clone()));
        }
        writer.apply_watcher_event(&watcher::Event::InitDone);
        let world = world_with(self.mock.client.clone(), store);
        let valid = ValidCluster::new(&cluster).unwrap();
        let kept = keep(&cluster, &valid, &world).await.unwrap();
        (kept, self.mock.lines().split_off(before))
    }
}

fn put(shelf: &mut BTreeMap<String, Value>, mut secret: Value) -> Value {
    let old = secret["metadata"]["resourceVersion"].as_str();
    let next = old.and_then(|v| v.parse::<u64>().ok()).unwrap_or(1000) + 1;
    secret["metadata"]["resourceVersion"] = json!(next.to_string());
    let name = secret["metadata"]["name"].as_str().unwrap().to_owned();
    shelf.insert(name, secret.clone());
    secret
}

pub(crate) fn days_ago(days: i64, life: i64) -> Span {
    Span {
        from: now() - days * DAY,
        until: now() + (life - days) * DAY,
    }
}

pub(crate) fn pod(instance: &str, reloads: bool) -> Pod {
    let annotations = match reloads {
        true => json!({names::RELOADS: "true"}),
        false => json!({}),
    };
    let metadata = json!({
        "name": format!("{instance}-0"), "namespace": "shop", "annotations": annotations,
        "labels": {
            names::CLUSTER: "pg", names::COMPONENT: "instance", names::INSTANCE: instance,
        },
    });
    serde_json::from_value(json!({"metadata": metadata})).unwrap()
}
