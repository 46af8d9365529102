//! The exact requests of each write to a cluster's status, and who gives way to whom.

use super::*;
use crate::build::tests::cluster;
use crate::mock::{Call, Mock, refusal};
use std::sync::atomic::{AtomicU64, Ordering};

const OBJECT: &str = "/apis/heliosdb.io/v1alpha1/namespaces/shop/heliosclusters/pg";

fn spec() -> ValidCluster {
    cluster(json!({"imageName": "postgres:17", "storage": {"size": "1Gi"}}))
}

/// The object as an API server gives it.
fn object(version: u64, uid: &str, state: Option<&str>) -> (u16, Value) {
    let object = json!({
        "apiVersion": "heliosdb.io/v1alpha1", "kind": "HeliosCluster",
        "metadata": {"name": "pg", "namespace": "shop", "uid": uid,
            "resourceVersion": version.to_string()},
        "spec": {"imageName": "postgres:17", "storage": {"size": "1Gi"}},
        "status": {"state": state},
    });
    (200, object)
}

fn next(store: &Store) -> Saved {
    Saved {
        consumed: !store.now().consumed,
        ..store.now().clone()
    }
}

fn get() -> String {
    format!("GET {OBJECT}")
}

fn patch() -> String {
    format!("PATCH {OBJECT}/status")
}

/// A store, loaded from what `answer` says; it is asked with the number of the request, from 1.
async fn loaded<F>(answer: F) -> (Mock, Store)
where
    F: Fn(u64, &Call) -> (u16, Value) + Clone + Send + Sync + 'static,
{
    let asked = std::sync::Arc::new(AtomicU64::new(0));
    let mock =
        Mock::start(move |call| answer(asked.fetch_add(1, Ordering::SeqCst) + 1, call)).await;
    let store = Store::load(&mock.client, &spec()).await.unwrap().unwrap();
    (mock, store)
}

#[tokio::test]
async fn a_state_is_written_once_over_the_version_that_was_read() {
    let (mock, mut store) = loaded(|n, _| object(6 + n, "u-1", None)).await;
    let first = next(&store);
    assert!(store.save(first.clone()).await.unwrap());
    assert!(store.save(first.clone()).await.unwrap(), "nothing to write");
    let second = next(&store);
    assert!(store.save(second.clone()).await.unwrap());
    assert_eq!(mock.lines(), [get(), patch(), patch()]);
    for (call, (version, saved)) in mock.calls()[1..].iter().zip([("7", first), ("8", second)]) {
        let state = serde_json::to_string(&saved).unwrap();
        let body = json!({"metadata": {"resourceVersion": version}, "status": {"state": state}});
        assert_eq!(call.body, body);
        assert_eq!(call.query, "");
    }
}

#[tokio::test]
async fn a_change_by_others_is_looked_at_and_written_over() {
    // Somebody has annotated the object: a conflict, and the state is as it was.
    let (mock, mut store) = loaded(|n, _| match n {
        2 => refusal(409, "the object has been modified"),
        n => object(n, "u-1", None),
    })
    .await;
    assert!(store.write(json!({"phase": "Ready"}), None).await.unwrap());
    assert_eq!(mock.lines(), [get(), patch(), get(), patch()]);
    let versions: Vec<_> = mock.calls().iter().map(version).collect();
    assert_eq!(versions[1..], ["1", "", "3"]);
}

fn version(call: &Call) -> String {
    let version = &call.body["metadata"]["resourceVersion"];
    version.as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn a_state_of_somebody_else_is_not_written_over() {
    let (mock, mut store) = loaded(|n, _| match n {
        2 => refusal(409, "the object has been modified"),
        3 => object(n, "u-1", Some("{\"another\": 1}")),
        n => object(n, "u-1", None),
    })
    .await;
    let before = store.now().clone();
    let result = store.save(next(&store)).await;
    assert!(matches!(result, Err(OperatorError::Overtaken(_))));
    assert_eq!(mock.lines(), [get(), patch(), get()]);
    assert_eq!(*store.now(), before);
}

#[tokio::test]
async fn a_write_of_ours_whose_answer_was_lost_is_ours() {
    // The first try was done, and told to nobody: the client's own retry met its traces.
    let (mock, mut store) = loaded(|n, call| match n {
        2 => refusal(409, "the object has been modified"),
        3 => {
            assert!(call.what.starts_with("GET"));
            let saved = Saved {
                consumed: true,
                ..Saved::default()
            };
            object(n, "u-1", Some(&serde_json::to_string(&saved).unwrap()))
        }
        n => object(n, "u-1", None),
    })
    .await;
    assert!(store.save(next(&store)).await.unwrap());
    assert_eq!(mock.lines(), [get(), patch(), get(), patch()]);
    assert_eq!(version(&mock.calls()[3]), "3");
}

#[tokio::test]
async fn who_is_in_the_way_for_good_has_overtaken_us() {
    let (mock, mut store) = loaded(|n, call| match call.what.starts_with("PATCH") {
        true => refusal(409, "the object has been modified"),
        false => object(n, "u-1", None),
    })
    .await;
    let result = store.save(next(&store)).await;
    assert!(matches!(result, Err(OperatorError::Overtaken(_))));
    let tries = usize::try_from(ATTEMPTS).unwrap();
    assert_eq!(mock.lines().len(), 1 + 2 * tries);
}

#[tokio::test]
async fn an_object_that_is_gone_is_left_alone() {
    // Deleted, or deleted and made again under its name.
    let (mock, mut store) = loaded(|n, _| match n {
        1 => object(n, "u-1", None),
        _ => refusal(404, "not found"),
    })
    .await;
    assert!(!store.save(next(&store)).await.unwrap());
    assert_eq!(mock.lines(), [get(), patch()]);
    assert!(!store.now().consumed);
    let (mock, mut store) = loaded(|n, _| match n {
        2 => refusal(409, "the object has been modified"),
        3 => object(n, "u-2", None),
        n => object(n, "u-1", None),
    })
    .await;
    assert!(!store.save(next(&store)).await.unwrap());
    assert_eq!(mock.lines(), [get(), patch(), get()]);
    for answer in [object(1, "u-2", None), refusal(404, "not found")] {
        let mock = Mock::start(move |_| answer.clone()).await;
        let store = Store::load(&mock.client, &spec()).await.unwrap();
        assert!(store.is_none());
        assert_eq!(mock.lines(), [get()]);
    }
}

#[tokio::test]
async fn a_state_of_another_version_is_not_read() {
    let mut saved = Saved::default();
    saved.cluster.format += 1;
    for state in [serde_json::to_string(&saved).unwrap(), "{".to_owned()] {
        let mock = Mock::start(move |_| object(1, "u-1", Some(&state))).await;
        let loaded = Store::load(&mock.client, &spec()).await;
        assert!(matches!(loaded, Err(OperatorError::State { .. })));
        assert_eq!(mock.lines(), [get()]);
    }
}

#[tokio::test]
async fn an_annotation_is_taken_away_and_nothing_else() {
    let (mock, store) = loaded(|n, _| object(n, "u-1", None)).await;
    let name = "heliosdb.io/switchover";
    store.remove_annotation(name).await.unwrap();
    assert_eq!(mock.lines(), [get(), format!("PATCH {OBJECT}")]);
    let body = json!({"metadata": {"annotations": {name: null}}});
    assert_eq!(mock.calls()[1].body, body);
}
