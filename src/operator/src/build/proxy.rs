//! The proxies' Deployment.

use helios_api::v1alpha1::names;
use helios_api::v1alpha1::valid::ValidCluster;
use k8s_openapi::api::apps::v1::Deployment;
use serde_json::{Value, json};

use super::{Built, apart, built, config, container_security, pod_security, schedule, with};
use crate::OperatorError;

/// The component's label.
pub(super) const COMPONENT: &str = "proxy";
/// User of our image.
const UID: i64 = 65532;
/// Clients come for 3 s more, transactions get 20 s to end, what is left is ended within 5 s.
const STOP_SECONDS: u32 = 30;

pub(super) fn deployment(cluster: &ValidCluster, image: &str) -> Result<Built, OperatorError> {
    let spec = &cluster.spec.proxy;
    let name = names::proxy(&cluster.name);
    let labels = super::labels(cluster, Some(COMPONENT));
    let hash = helios_api::fingerprint(config::proxy(cluster).as_bytes());
    let annotations = json!({ names::CONFIG_HASH: hash, names::RELOADS: "true" });
    Ok(built::<Deployment>(
        cluster,
        &name,
        Some(COMPONENT),
        json!({"spec": {
            "replicas": spec.replicas,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "selector": {"matchLabels": super::selector(cluster, COMPONENT)},
            "template": {
                "metadata": {
                    "labels": with(labels, &spec.pod_metadata.labels),
                    "annotations": with(annotations, &spec.pod_metadata.annotations),
                },
                "spec": pod(cluster, &name, image),
            },
        }}),
    ))
}

fn pod(cluster: &ValidCluster, name: &str, image: &str) -> Value {
    let spec = &cluster.spec.proxy;
    let probe = |path: &str, seconds: u32| {
        json!({
            "httpGet": {"path": path, "port": "http"},
            "periodSeconds": seconds, "timeoutSeconds": 5, "failureThreshold": 3,
        })
    };
    let mut container = json!({
        "name": "proxy",
        "image": image,
        "command": [
            "/helios", "proxy", "--log-format", "json",
            "--config", format!("{}/{}", config::CONFIG, config::PROXY_FILE),
            "--control", format!("0.0.0.0:{}", names::CONTROL_PORT),
            "--tls-dir", config::TLS,
            "--inspect", format!("127.0.0.1:{}", names::INSPECT_PORT),
            "--topology-file", format!("{}/topology.json", config::JOURNAL),
        ],
        "ports": [
            {"name": "postgresql", "containerPort": names::POSTGRES_PORT, "protocol": "TCP"},
            {"name": "control", "containerPort": names::CONTROL_PORT, "protocol": "TCP"},
            {"name": "http", "containerPort": names::HTTP_PORT, "protocol": "TCP"},
        ],
        "securityContext": container_security(),
        "livenessProbe": probe("/healthz", 10),
        "readinessProbe": probe("/readyz", 1),
        "volumeMounts": [
            {"name": "config", "mountPath": config::CONFIG, "readOnly": true},
            {"name": "tls", "mountPath": config::TLS, "readOnly": true},
            {"name": "journal", "mountPath": config::JOURNAL},
        ],
    });
    if let Some(level) = spec.observability.log_level
        && let Some(command) = container["command"].as_array_mut()
    {
        command.extend(["--log-level".into(), level.as_str().into()]);
    }
    if let Some(resources) = &spec.resources {
        container["resources"] = json!(resources);
    }
    let mut pod = json!({
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "securityContext": pod_security(UID),
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": config::name(cluster)}},
            {"name": "tls", "secret": {"secretName": names::tls_secret(name), "defaultMode": 0o440}},
            // Journals that outgrow their memory, without names, and the last topology.
            {"name": "journal", "emptyDir": {}},
        ],
    });
    schedule(&mut pod, &spec.scheduling, apart(cluster, COMPONENT));
    pod
}
