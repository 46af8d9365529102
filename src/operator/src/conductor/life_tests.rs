//! The exact requests of each act upon objects.

use super::*;
use crate::build::tests::cluster;
use crate::mock::{Mock, refusal};
use serde_json::{Value, json};

fn spec(policy: &str) -> ValidCluster {
    cluster(json!({
        "imageName": "postgres:17",
        "storage": {"size": "1Gi", "onDeletion": policy},
    }))
}

fn replace() -> Act {
    Act::Replace {
        instance: "pg-2".parse().unwrap(),
        pod: crate::conductor::plan::PodView {
            name: "pg-2-0".to_owned(),
            uid: "u-7".to_owned(),
            ..Default::default()
        },
    }
}

fn remove() -> Act {
    Act::Remove("pg-3".parse().unwrap())
}

fn deleted() -> (u16, Value) {
    (
        200,
        json!({"apiVersion": "v1", "kind": "Status", "status": "Success"}),
    )
}

const POD: &str = "DELETE /api/v1/namespaces/shop/pods/pg-2-0";
const SET: &str = "DELETE /apis/apps/v1/namespaces/shop/statefulsets/pg-3";
const VOLUME: &str = "DELETE /api/v1/namespaces/shop/persistentvolumeclaims/pg-3";

#[tokio::test]
async fn exactly_the_pod_that_was_decided_about_is_deleted() {
    let mock = Mock::start(|_| deleted()).await;
    carry_out(&mock.client, &spec("Retain"), &replace())
        .await
        .unwrap();
    assert_eq!(mock.lines(), [POD]);
    assert_eq!(mock.calls()[0].body["preconditions"]["uid"], "u-7");
}

#[tokio::test]
async fn a_volume_goes_with_its_instance_only_when_told_to() {
    for (policy, expected) in [("Retain", vec![SET]), ("Delete", vec![SET, VOLUME])] {
        let mock = Mock::start(|_| deleted()).await;
        carry_out(&mock.client, &spec(policy), &remove())
            .await
            .unwrap();
        assert_eq!(mock.lines(), expected, "{policy}");
    }
}

#[tokio::test]
async fn a_log_goes_behind_its_data() {
    let both = cluster(json!({
        "imageName": "postgres:17",
        "storage": {"size": "1Gi", "onDeletion": "Delete"},
        "walStorage": {"size": "1Gi"},
    }));
    let mock = Mock::start(|_| deleted()).await;
    carry_out(&mock.client, &both, &remove()).await.unwrap();
    let log = format!("{VOLUME}-wal");
    assert_eq!(mock.lines(), [SET, VOLUME, &log]);
}

#[tokio::test]
async fn what_is_gone_already_is_as_good_and_what_fails_is_said() {
    // 409: there is another Pod of that name by now.
    for (code, act, good) in [
        (404, replace(), true),
        (409, replace(), true),
        (404, remove(), true),
        (403, remove(), false),
        (500, replace(), false),
    ] {
        let mock = Mock::start(move |_| refusal(code, "no")).await;
        let done = carry_out(&mock.client, &spec("Retain"), &act).await;
        assert_eq!(done.is_ok(), good, "{code} {act:?}: {done:?}");
        assert_eq!(mock.lines().len(), 1);
    }
}
