//! The exact requests of a reconciliation.

use super::*;
use crate::mock::{Call, Mock, refusal};
use k8s_openapi::ByteString;
use serde_json::{Value, json};

pub(crate) fn object(size: &str) -> HeliosCluster {
    let spec = json!({"imageName": "postgres:17", "storage": {"size": size}});
    let mut object = HeliosCluster::new("pg", serde_json::from_value(spec).unwrap());
    object.metadata.namespace = Some("shop".to_owned());
    object.metadata.uid = Some("u-1".to_owned());
    object
}

fn world(client: Client) -> World {
    world_with(client, reflector::store().0)
}

/// One that knows these Pods.
pub(crate) fn world_with(client: Client, pods: Store<Pod>) -> World {
    let reporter = Reporter {
        controller: "test".to_owned(),
        instance: None,
    };
    World {
        recorder: Recorder::new(client.clone(), reporter),
        metrics: Metrics::new().unwrap(),
        offers: Offers { budgets: None },
        options: Options {
            namespace: None,
            lease_namespace: "helios-system".to_owned(),
            identity: "test".to_owned(),
            in_pod: false,
            image: "helios:1".to_owned(),
            http: ([127, 0, 0, 1], 0).into(),
        },
        client,
        pods,
        conductors: Mutex::default(),
        failures: Mutex::default(),
        applied: Mutex::default(),
        fatal: CancellationToken::new(),
    }
}

/// An API server that has nothing yet: what is made is given back as it would store it.
pub(crate) fn empty(call: &Call) -> (u16, Value) {
    if call.what.starts_with("GET ") {
        return refusal(404, "not found");
    }
    let mut body = call.body.clone();
    if let Some(Value::Object(texts)) = body.get("stringData").cloned() {
        for (key, value) in texts {
            let bytes = ByteString(value.as_str().unwrap().as_bytes().to_vec());
            body["data"][key] = json!(bytes);
        }
    }
    (200, body)
}

pub(crate) const CORE: &str = "/api/v1/namespaces/shop";

fn looked(instances: &[&str]) -> Vec<String> {
    let both = |n: &&str| [n.to_string(), format!("{n}-wal")];
    let claims = instances.iter().flat_map(both);
    claims
        .map(|name| format!("GET {CORE}/persistentvolumeclaims/{name}"))
        .collect()
}

fn secrets() -> Vec<String> {
    let holders = ["pg-1-tls", "pg-2-tls", "pg-proxy-tls", "pg-operator-tls"];
    let read = |name: &&str| format!("GET {CORE}/secrets/{name}");
    let made = format!("POST {CORE}/secrets");
    // The authority is made before anybody is looked at who needs it.
    let mut all = vec![read(&"pg-ca"), made.clone()];
    all.extend(holders.iter().map(read));
    all.extend(holders.iter().map(|_| made.clone()));
    all.extend([read(&"pg-app"), made]);
    all
}

fn applied() -> Vec<String> {
    let policies = "/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies";
    let sets = "/apis/apps/v1/namespaces/shop/statefulsets";
    [
        format!("{CORE}/configmaps/pg-config"),
        format!("{CORE}/services/pg"),
        format!("{CORE}/services/pg-primary"),
        format!("{CORE}/services/pg-replicas"),
        format!("{policies}/pg-instances"),
        format!("{policies}/pg-proxy"),
        format!("{CORE}/persistentvolumeclaims/pg-1"),
        format!("{sets}/pg-1"),
        format!("{CORE}/persistentvolumeclaims/pg-2"),
        format!("{sets}/pg-2"),
        "/apis/apps/v1/namespaces/shop/deployments/pg-proxy".to_owned(),
    ]
    .map(|path| format!("PATCH {path}"))
    .into()
}

#[tokio::test]
async fn a_new_cluster_takes_exactly_these_requests() {
    let mock = Mock::start(empty).await;
    let world = world(mock.client.clone());
    let (input, _) = prepare(&object("1Gi"), &world).await.unwrap();
    let mut expected = looked(&["pg-1", "pg-2"]);
    expected.extend(secrets());
    expected.extend(applied());
    assert_eq!(mock.lines(), expected);
    // Server-side apply under our name, over whatever others have said of the same fields.
    for call in mock.calls().iter().filter(|c| c.what.starts_with("PATCH")) {
        assert!(
            call.query.contains("fieldManager=helios-operator"),
            "{call:?}"
        );
        assert!(call.query.contains("force=true"), "{call:?}");
    }
    let good = |kind| input.verdicts.iter().any(|v| v.kind == kind && v.good);
    assert!(good(ConditionType::Valid) && good(ConditionType::VolumesReady));
}

#[tokio::test]
async fn a_volume_that_cannot_grow_keeps_nothing_else_from_being_applied() {
    let mock = Mock::start(|call: &Call| {
        let claim = call.what.contains("/persistentvolumeclaims/");
        if call.what.ends_with("-wal") {
            return refusal(404, "not found");
        }
        if claim && call.what.starts_with("GET ") {
            let spec = json!({"resources": {"requests": {"storage": "1Gi"}}});
            let status = json!({"phase": "Bound"});
            return (
                200,
                json!({"metadata": {"name": "x"}, "spec": spec, "status": status}),
            );
        }
        match claim {
            true => refusal(403, "only dynamically provisioned pvc can be resized"),
            false => empty(call),
        }
    })
    .await;
    let world = world(mock.client.clone());
    let (input, _) = prepare(&object("2Gi"), &world).await.unwrap();
    let patches = mock.lines().into_iter().filter(|l| l.starts_with("PATCH"));
    assert_eq!(patches.collect::<Vec<_>>(), applied());
    let volumes = input
        .verdicts
        .iter()
        .find(|v| v.kind == ConditionType::VolumesReady);
    let volumes = volumes.unwrap();
    assert_eq!((volumes.good, volumes.reason), (false, "CannotGrow"));
    assert!(volumes.message.contains("only dynamically provisioned"));
}

#[tokio::test]
async fn an_object_that_is_wrong_takes_none() {
    let mock = Mock::start(empty).await;
    let world = world(mock.client.clone());
    let mut wrong = object("1Gi");
    let parameters = &mut wrong.spec.postgresql.parameters;
    parameters.insert("port".to_owned(), "1".to_owned());
    let refused = prepare(&wrong, &world).await;
    assert!(matches!(refused, Err(OperatorError::Invalid(_))));
    assert_eq!(mock.lines(), [""; 0]);
    // A volume that is larger already: what is there is looked at, nothing is changed.
    let larger = |call: &Call| {
        let spec = json!({"resources": {"requests": {"storage": "9Gi"}}});
        match call.what.ends_with("-wal") {
            true => refusal(404, "not found"),
            false => (200, json!({"metadata": {"name": "x"}, "spec": spec})),
        }
    };
    let mock = Mock::start(larger).await;
    let refused = prepare(&object("1Gi"), &self::world(mock.client.clone())).await;
    assert!(matches!(refused, Err(OperatorError::Invalid(_))));
    assert_eq!(mock.lines(), looked(&["pg-1"]));
    // Data without a volume for their log do not get one.
    let mock = Mock::start(larger).await;
    let refused = prepare(&with_log("9Gi"), &self::world(mock.client.clone())).await;
    let Err(OperatorError::Invalid(invalid)) = &refused else {
        panic!("{refused:?}")
    };
    assert_eq!(invalid.field, "spec.walStorage");
    assert_eq!(mock.lines(), looked(&["pg-1"]));
}

fn with_log(size: &str) -> HeliosCluster {
    let mut object = object(size);
    let log = json!({"size": "1Gi"});
    object.spec.wal_storage = Some(serde_json::from_value(log).unwrap());
    object
}

#[tokio::test]
async fn a_volume_for_the_log_is_made_before_that_for_the_data() {
    let mock = Mock::start(empty).await;
    let world = world(mock.client.clone());
    prepare(&with_log("1Gi"), &world).await.unwrap();
    let lines = mock.lines();
    let at = |name: &str| {
        let line = format!("PATCH {CORE}/persistentvolumeclaims/{name}");
        lines.iter().position(|l| *l == line).unwrap()
    };
    assert!(at("pg-1-wal") < at("pg-1") && at("pg-2-wal") < at("pg-2"));
    assert_eq!(
        lines.len(),
        looked(&["pg-1", "pg-2"]).len() + secrets().len() + applied().len() + 2
    );
}
