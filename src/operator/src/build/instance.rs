//! One instance: its volumes and its StatefulSet of one Pod.

use helios_api::InstanceName;
use helios_api::v1alpha1::valid::ValidCluster;
use helios_api::v1alpha1::{HeliosClusterSpec, OnDeletion, names};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::{Value, json};

use super::{Built, apart, built, config, container_security, pod_security, schedule, with};

/// The component's label.
pub(super) const COMPONENT: &str = "instance";
/// Folder of the agent's program, which an init container fills.
const PROGRAM: &str = "/helios-bin";
/// How long a Pod may take to stop: PostgreSQL gets 20 s of it for a fast shutdown.
const STOP_SECONDS: u32 = 45;

/// A claim that an instance has.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Claim<'a> {
    /// Its name.
    pub(crate) name: String,
    /// The field that it is made from, as people write it.
    pub(crate) field: &'static str,
    /// Its size, and the same in bytes.
    pub(crate) size: &'a Quantity,
    pub(crate) bytes: u64,
    /// The storage class that is asked for.
    pub(crate) class: Option<&'a String>,
}

/// The instance's claims: that of its write-ahead log, where it has one, in front of that of its
/// data. Where there are data, there was a volume for their log before.
pub(crate) fn claims<'a>(cluster: &'a ValidCluster, name: &InstanceName) -> Vec<Claim<'a>> {
    let data = &cluster.spec.storage;
    let log = cluster.spec.wal_storage.as_ref().zip(cluster.wal_bytes);
    let log = log.map(|(log, bytes)| Claim {
        name: names::wal_volume(name.as_str()),
        field: "spec.walStorage",
        size: &log.size,
        bytes,
        class: log.storage_class.as_ref(),
    });
    let data = Claim {
        name: name.to_string(),
        field: "spec.storage",
        size: &data.size,
        bytes: cluster.storage_bytes,
        class: data.storage_class.as_ref(),
    };
    log.into_iter().chain([data]).collect()
}

/// The instance's volumes. Claims of their own, not the StatefulSet's: they can grow, and they go
/// with the cluster only when the spec says so.
pub(super) fn volumes(cluster: &ValidCluster, name: &InstanceName) -> Vec<Built> {
    let claims = claims(cluster, name);
    claims.iter().map(|claim| volume(cluster, claim)).collect()
}

fn volume(cluster: &ValidCluster, claim: &Claim<'_>) -> Built {
    let mut spec = json!({
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": claim.size}},
    });
    if let Some(class) = claim.class {
        spec["storageClassName"] = class.clone().into();
    }
    let owners = match cluster.spec.storage.on_deletion {
        OnDeletion::Retain => json!([]),
        OnDeletion::Delete => json!([super::owner(cluster)]),
    };
    built::<PersistentVolumeClaim>(
        cluster,
        &claim.name,
        Some(COMPONENT),
        json!({"metadata": {"ownerReferences": owners}, "spec": spec}),
    )
}

/// The instance's StatefulSet. `OnDelete`: when its Pod is replaced is not for Kubernetes to
/// decide, because a primary has to be moved first.
pub(super) fn stateful_set(cluster: &ValidCluster, name: &InstanceName, image: &str) -> Built {
    let mut labels = super::labels(cluster, Some(COMPONENT));
    labels[names::INSTANCE] = name.as_str().into();
    let metadata = &cluster.spec.pod_metadata;
    let selector = json!({
        names::CLUSTER: cluster.name,
        names::INSTANCE: name.as_str(),
    });
    built::<StatefulSet>(
        cluster,
        name.as_str(),
        Some(COMPONENT),
        json!({"spec": {
            "replicas": 1,
            "serviceName": "",
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "selector": {"matchLabels": selector},
            "template": {
                "metadata": {
                    "labels": with(labels, &metadata.labels),
                    "annotations": with(
                        json!({ names::TEMPLATE: template(cluster), names::RELOADS: "true" }),
                        &metadata.annotations,
                    ),
                },
                "spec": pod(cluster, name, image),
            },
        }}),
    )
}

/// Tells Pods of one spec from those of another: what a person can ask for that a Pod has to be
/// replaced for. The agent's image and whatever else the operator puts into a Pod are left out: its
/// upgrade restarts no database, and the next replacement brings them along.
pub(crate) fn template(cluster: &ValidCluster) -> String {
    // Without `..`: a new field has to be thought of.
    let HeliosClusterSpec {
        instances: _,
        image_name,
        image_pull_policy: _,
        postgres_uid,
        storage: _,
        wal_storage: _,
        resources,
        postgresql: _,
        bootstrap: _,
        proxy: _,
        failover: _,
        switchover: _,
        certificates: _,
        scheduling,
        pod_metadata,
        service: _,
    } = &cluster.spec;
    let asked = json!([
        image_name,
        postgres_uid,
        resources,
        scheduling,
        pod_metadata
    ]);
    helios_api::fingerprint(asked.to_string().as_bytes())
}

fn pod(cluster: &ValidCluster, name: &InstanceName, image: &str) -> Value {
    let spec = &cluster.spec;
    let mut pod = json!({
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "securityContext": pod_security(spec.postgres_uid),
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "initContainers": [{
            "name": "agent",
            "image": image,
            "command": ["/helios", "copy-to", format!("{PROGRAM}/helios")],
            "securityContext": container_security(),
            "resources": {
                "requests": {"cpu": "10m", "memory": "32Mi"},
                "limits": {"cpu": "500m", "memory": "256Mi"},
            },
            "volumeMounts": [{"name": "program", "mountPath": PROGRAM}],
        }],
        "containers": [postgres(cluster, name)],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": name.as_str()}},
            {"name": "program", "emptyDir": {}},
            {"name": "run", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            // PostgreSQL's dynamic shared memory; a container's own has 64 MiB.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "config", "configMap": {"name": config::name(cluster)}},
            // PostgreSQL refuses a key that others may read.
            {"name": "tls", "secret": {
                "secretName": names::tls_secret(name.as_str()), "defaultMode": 0o440,
            }},
        ],
    });
    if spec.wal_storage.is_some() {
        let claim = json!({"claimName": names::wal_volume(name.as_str())});
        add(
            &mut pod["volumes"],
            json!({"name": "wal", "persistentVolumeClaim": claim}),
        );
    }
    if config::copies_with_secrets(cluster, name) {
        add(&mut pod["volumes"], source(cluster));
    }
    schedule(&mut pod, &spec.scheduling, apart(cluster, COMPONENT));
    pod
}

/// What a copy of a running server needs. Optional: it counts only once, and a Secret that is gone
/// afterwards keeps no Pod from starting.
fn source(cluster: &ValidCluster) -> Value {
    let source = cluster.spec.bootstrap.base_backup.as_ref();
    let keys = source.map(|s| {
        [
            (&s.password_secret, config::PASSWORD),
            (&s.ca_secret, config::CA),
        ]
    });
    let keys = keys.into_iter().flatten();
    let secrets: Vec<Value> = keys
        .filter_map(|(key, path)| {
            let key = key.as_ref()?;
            let items = json!([{"key": key.key, "path": path}]);
            Some(json!({"secret": {"name": key.name, "optional": true, "items": items}}))
        })
        .collect();
    json!({"name": "source", "projected": {"sources": secrets, "defaultMode": 0o440}})
}

/// Adds to a list.
fn add(list: &mut Value, entry: Value) {
    if let Some(list) = list.as_array_mut() {
        list.push(entry);
    }
}

fn postgres(cluster: &ValidCluster, name: &InstanceName) -> Value {
    let spec = &cluster.spec;
    let probe = |path: &str, seconds: u32, failures: u32| {
        json!({
            "httpGet": {"path": path, "port": "http"},
            "periodSeconds": seconds, "timeoutSeconds": 5, "failureThreshold": failures,
        })
    };
    let mut container = json!({
        "name": "postgres",
        "image": spec.image_name,
        "imagePullPolicy": spec.image_pull_policy.as_str(),
        "command": [
            format!("{PROGRAM}/helios"), "agent", "--log-format", "json", "--forward-log",
            "--config", format!("{}/{name}.json", config::CONFIG),
        ],
        "ports": [
            {"name": "postgresql", "containerPort": names::POSTGRES_PORT, "protocol": "TCP"},
            {"name": "control", "containerPort": names::CONTROL_PORT, "protocol": "TCP"},
            {"name": "http", "containerPort": names::HTTP_PORT, "protocol": "TCP"},
        ],
        "securityContext": container_security(),
        // The agent answers while PostgreSQL recovers: no probe kills a server that does.
        "startupProbe": probe("/healthz", 1, 60),
        "livenessProbe": probe("/healthz", 10, 6),
        "readinessProbe": probe("/readyz", 2, 2),
        "volumeMounts": [
            {"name": "data", "mountPath": config::DATA},
            {"name": "program", "mountPath": PROGRAM, "readOnly": true},
            {"name": "run", "mountPath": config::RUN},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "config", "mountPath": config::CONFIG, "readOnly": true},
            {"name": "tls", "mountPath": config::TLS, "readOnly": true},
        ],
    });
    if spec.wal_storage.is_some() {
        let mount = json!({"name": "wal", "mountPath": config::WAL});
        add(&mut container["volumeMounts"], mount);
    }
    if config::copies_with_secrets(cluster, name) {
        let mount = json!({"name": "source", "mountPath": config::SOURCE, "readOnly": true});
        add(&mut container["volumeMounts"], mount);
    }
    if let Some(resources) = &spec.resources {
        container["resources"] = json!(resources);
    }
    container
}
