//! From a valid cluster to the objects that have to exist for it. Pure: the same cluster gives the
//! same objects, byte for byte, so that applying them again changes nothing.

mod config;
mod instance;
mod network;
mod proxy;

use helios_api::v1alpha1::valid::ValidCluster;
use helios_api::v1alpha1::{HeliosCluster, names};
use kube::core::ApiResource;
use serde_json::{Value, json};

pub(crate) use config::{check, latency_interval_ms, server_settings};
pub(crate) use instance::{Claim, claims, template};

use crate::OperatorError;

/// An object to apply.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Built {
    pub(crate) resource: ApiResource,
    pub(crate) name: String,
    pub(crate) body: Value,
}

/// What the API server offers of what is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offers {
    /// Version of the group `policy` that has PodDisruptionBudgets.
    pub(crate) budgets: Option<&'static str>,
}

/// Everything for a cluster.
pub(crate) fn objects(
    cluster: &ValidCluster,
    image: &str,
    offers: Offers,
) -> Result<Vec<Built>, OperatorError> {
    let mut all = vec![config::config_map(cluster)?];
    all.extend(network::services(cluster));
    all.extend(network::policies(cluster));
    for name in &cluster.instances {
        all.extend(instance::volumes(cluster, name));
        all.push(instance::stateful_set(cluster, name, image));
    }
    all.push(proxy::deployment(cluster, image)?);
    if let Some(version) = offers.budgets {
        all.extend(network::budgets(cluster, version));
    }
    Ok(all)
}

/// Labels of everything that belongs to a cluster.
pub(crate) fn labels(cluster: &ValidCluster, component: Option<&str>) -> Value {
    let mut labels = json!({
        "app.kubernetes.io/name": "helios",
        "app.kubernetes.io/instance": cluster.name,
        "app.kubernetes.io/managed-by": names::FIELD_MANAGER,
        names::CLUSTER: cluster.name,
    });
    if let Some(component) = component {
        labels[names::COMPONENT] = component.into();
    }
    labels
}

/// What selects the Pods of a component.
pub(crate) fn selector(cluster: &ValidCluster, component: &str) -> Value {
    json!({ names::CLUSTER: cluster.name, names::COMPONENT: component })
}

/// Makes an object go with its cluster.
pub(crate) fn owner(cluster: &ValidCluster) -> Value {
    let resource = ApiResource::erase::<HeliosCluster>(&());
    json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "name": cluster.name,
        "uid": cluster.uid,
        "controller": true,
    })
}

/// An object of a kind that `k8s_openapi` knows.
fn built<K: k8s_openapi::Resource>(
    cluster: &ValidCluster,
    name: &str,
    component: Option<&str>,
    mut rest: Value,
) -> Built {
    let resource = ApiResource {
        group: K::GROUP.to_owned(),
        version: K::VERSION.to_owned(),
        api_version: K::API_VERSION.to_owned(),
        kind: K::KIND.to_owned(),
        plural: K::URL_PATH_SEGMENT.to_owned(),
    };
    rest["apiVersion"] = K::API_VERSION.into();
    rest["kind"] = K::KIND.into();
    let metadata = &mut rest["metadata"];
    metadata["name"] = name.into();
    metadata["namespace"] = cluster.namespace.clone().into();
    metadata["labels"] = labels(cluster, component);
    if metadata.get("ownerReferences").is_none() {
        metadata["ownerReferences"] = json!([owner(cluster)]);
    }
    Built {
        resource,
        name: name.to_owned(),
        body: rest,
    }
}

/// What every container of ours may do: nothing.
fn container_security() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "runAsNonRoot": true,
        "capabilities": {"drop": ["ALL"]},
    })
}

/// The same for a Pod.
fn pod_security(uid: i64) -> Value {
    json!({
        "runAsNonRoot": true,
        "runAsUser": uid,
        "runAsGroup": uid,
        "fsGroup": uid,
        "seccompProfile": {"type": "RuntimeDefault"},
    })
}

/// Adds what the spec says about nodes to a Pod.
fn schedule(pod: &mut Value, scheduling: &helios_api::v1alpha1::Scheduling, fallback: Value) {
    pod["affinity"] = scheduling
        .affinity
        .as_ref()
        .map_or(fallback, |affinity| json!(affinity));
    if !scheduling.topology_spread_constraints.is_empty() {
        pod["topologySpreadConstraints"] = json!(scheduling.topology_spread_constraints);
    }
    if !scheduling.tolerations.is_empty() {
        pod["tolerations"] = json!(scheduling.tolerations);
    }
    if !scheduling.node_selector.is_empty() {
        pod["nodeSelector"] = json!(scheduling.node_selector);
    }
    if let Some(class) = &scheduling.priority_class_name {
        pod["priorityClassName"] = class.clone().into();
    }
}

/// Affinity of Pods that would rather not share a node.
fn apart(cluster: &ValidCluster, component: &str) -> Value {
    json!({"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{
        "weight": 100,
        "podAffinityTerm": {
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchLabels": selector(cluster, component)},
        },
    }]}})
}

/// Labels or annotations with the user's added.
fn with(mut base: Value, more: &std::collections::BTreeMap<String, String>) -> Value {
    for (key, value) in more {
        base[key] = value.clone().into();
    }
    base
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn cluster(spec: Value) -> ValidCluster {
        let mut object = HeliosCluster::new("pg", serde_json::from_value(spec).unwrap());
        object.metadata.namespace = Some("shop".to_owned());
        object.metadata.uid = Some("u-1".to_owned());
        ValidCluster::new(&object).unwrap()
    }

    fn minimal() -> Value {
        json!({"imageName": "postgres:17", "storage": {"size": "1Gi"}})
    }

    fn kinds(objects: &[Built]) -> Vec<String> {
        objects
            .iter()
            .map(|o| format!("{}/{}", o.resource.kind, o.name))
            .collect()
    }

    #[test]
    fn a_minimal_cluster_is_two_instances_and_a_proxy() {
        let offers = Offers { budgets: None };
        let objects = objects(&cluster(minimal()), "helios:1", offers).unwrap();
        assert_eq!(
            kinds(&objects),
            [
                "ConfigMap/pg-config",
                "Service/pg",
                "Service/pg-primary",
                "Service/pg-replicas",
                "NetworkPolicy/pg-instances",
                "NetworkPolicy/pg-proxy",
                "PersistentVolumeClaim/pg-1",
                "StatefulSet/pg-1",
                "PersistentVolumeClaim/pg-2",
                "StatefulSet/pg-2",
                "Deployment/pg-proxy",
            ]
        );
    }

    #[test]
    fn the_samples_are_understood() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../manifests/samples");
        for entry in std::fs::read_dir(folder).unwrap() {
            let text = &*std::fs::read_to_string(entry.unwrap().path()).unwrap();
            let mut object: HeliosCluster = serde_saphyr::from_str(text).unwrap();
            object.metadata.namespace = Some("shop".to_owned());
            object.metadata.uid = Some("u-1".to_owned());
            // What is not understood would be missing after a round trip.
            let written: Value = serde_saphyr::from_str(text).unwrap();
            let read = json!(object.spec);
            for (field, value) in written["spec"].as_object().unwrap() {
                contains(&read[field], value, field);
            }
            check(&ValidCluster::new(&object).unwrap()).unwrap();
        }
    }

    fn contains(read: &Value, written: &Value, path: &str) {
        match written {
            Value::Object(fields) => {
                for (field, value) in fields {
                    contains(&read[field], value, &format!("{path}.{field}"));
                }
            }
            _ => assert_eq!(read, written, "{path}"),
        }
    }

    #[test]
    fn what_is_written_for_the_proxy_reaches_it() {
        let mut all = minimal();
        all["proxy"] = json!({
            "tlsRequired": true,
            "threads": 3,
            "maxConnectionsPerUser": 7,
            "sessionMigration": {"lostNotificationPayload": "look again"},
        });
        let file = config::proxy(&cluster(all));
        let read = helios_proxy::config::ProxyConfig::parse(&file, "test").unwrap();
        assert!(read.proxy.tls_required);
        assert_eq!(read.proxy.threads, Some(3));
        assert_eq!(read.proxy.max_connections_per_user, Some(7));
        let payload = read.migration.lost_notification_payload;
        assert_eq!(payload.as_deref(), Some("look again"));
    }

    #[test]
    fn what_a_reader_would_refuse_is_refused_by_field() {
        for (field, spec) in [
            (
                "spec.postgresql",
                json!({"postgresql": {"parameters": {"port": "1"}}}),
            ),
            (
                "spec.proxy",
                json!({"proxy": {"transactionReplay": {
                    "maxJournalBytes": 8192, "maxTotalJournalBytes": 4096,
                }}}),
            ),
        ] {
            let mut all = minimal();
            for (key, value) in spec.as_object().unwrap() {
                all[key] = value.clone();
            }
            assert_eq!(check(&cluster(all)).unwrap_err().field, field);
        }
    }

    #[test]
    fn what_is_built_twice_is_the_same() {
        let offers = Offers {
            budgets: Some("v1"),
        };
        let build = || objects(&cluster(minimal()), "helios:1", offers).unwrap();
        assert_eq!(build(), build());
    }

    #[test]
    fn budgets_are_of_the_version_that_is_offered() {
        let offers = Offers {
            budgets: Some("v1beta1"),
        };
        let objects = objects(&cluster(minimal()), "helios:1", offers).unwrap();
        let budgets: Vec<_> = objects
            .iter()
            .filter(|o| o.resource.kind == "PodDisruptionBudget")
            .collect();
        assert_eq!(budgets.len(), 2);
        assert!(
            budgets
                .iter()
                .all(|b| b.body["apiVersion"] == "policy/v1beta1")
        );
    }

    #[test]
    fn no_container_may_do_anything_special() {
        let offers = Offers { budgets: None };
        let objects = objects(&cluster(minimal()), "helios:1", offers).unwrap();
        let mut seen = 0;
        for object in &objects {
            let pod = &object.body["spec"]["template"]["spec"];
            let Some(containers) = pod["containers"].as_array() else {
                continue;
            };
            let first = pod["initContainers"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            assert_eq!(
                pod["securityContext"]["seccompProfile"]["type"],
                "RuntimeDefault"
            );
            assert_eq!(pod["automountServiceAccountToken"], false);
            for container in containers.iter().chain(&first) {
                seen += 1;
                let security = &container["securityContext"];
                assert_eq!(security, &container_security(), "{container}");
            }
        }
        assert_eq!(seen, 5);
    }

    #[test]
    fn volumes_go_with_the_cluster_only_when_told_to() {
        let volume = |spec| {
            let cluster = cluster(spec);
            instance::volumes(&cluster, &cluster.instances[0]).remove(0)
        };
        let kept = volume(minimal());
        assert_eq!(kept.body["metadata"]["ownerReferences"], json!([]));
        let gone = volume(json!({
            "imageName": "postgres:17",
            "storage": {"size": "1Gi", "onDeletion": "Delete", "storageClass": "fast"},
        }));
        assert_eq!(gone.body["metadata"]["ownerReferences"][0]["uid"], "u-1");
        assert_eq!(gone.body["spec"]["storageClassName"], "fast");
    }

    #[test]
    fn only_the_first_instance_can_copy_a_running_server() {
        let cluster = cluster(json!({
            "imageName": "postgres:17",
            "storage": {"size": "1Gi"},
            "bootstrap": {"baseBackup": {
                "host": "old.example", "user": "mover", "sslMode": "verify-full",
                "passwordSecret": {"name": "mover", "key": "pw"},
                "caSecret": {"name": "old-ca", "key": "ca"},
            }},
        }));
        let objects = objects(&cluster, "helios:1", Offers { budgets: None }).unwrap();
        let find = |what: &str| objects.iter().find(|o| o.name == what).unwrap();
        let config = |name: &str| {
            let data = &find("pg-config").body["data"][format!("{name}.json")];
            serde_json::from_str::<Value>(data.as_str().unwrap()).unwrap()
        };
        assert_eq!(
            config("pg-1")["base_backup"],
            json!({
                "options": {
                    "host": "old.example", "port": "5432", "user": "mover",
                    "sslmode": "verify-full", "sslrootcert": "/etc/helios/source/ca.crt",
                },
                "password_file": "/etc/helios/source/password",
            })
        );
        assert!(config("pg-2").get("base_backup").is_none());
        let set = |name: &str| {
            let mut sets = objects.iter().filter(|o| o.resource.kind == "StatefulSet");
            let set = sets.find(|o| o.name == name).unwrap();
            set.body["spec"]["template"]["spec"].to_string()
        };
        assert!(set("pg-1").contains(r#"{"key":"pw","path":"password"}"#));
        assert!(set("pg-1").contains(r#"{"key":"ca","path":"ca.crt"}"#));
        assert!(set("pg-1").contains("/etc/helios/source"));
        assert!(!set("pg-2").contains("/etc/helios/source"));
    }

    #[test]
    fn a_log_on_a_volume_of_its_own_is_there_before_the_data_and_mounted() {
        let cluster = cluster(json!({
            "imageName": "postgres:17",
            "instances": 1,
            "storage": {"size": "1Gi", "onDeletion": "Delete"},
            "walStorage": {"size": "2Gi", "storageClass": "fast"},
        }));
        let objects = objects(&cluster, "helios:1", Offers { budgets: None }).unwrap();
        let at = |what: &str| kinds(&objects).iter().position(|k| k == what).unwrap();
        let log = at("PersistentVolumeClaim/pg-1-wal");
        assert!(log < at("PersistentVolumeClaim/pg-1"));
        let claim = &objects[log].body;
        assert_eq!(claim["metadata"]["ownerReferences"][0]["uid"], "u-1");
        assert_eq!(claim["spec"]["storageClassName"], "fast");
        assert_eq!(claim["spec"]["resources"]["requests"]["storage"], "2Gi");
        let pod = &objects[at("StatefulSet/pg-1")].body["spec"]["template"]["spec"];
        let all = [&pod["volumes"], &pod["containers"][0]["volumeMounts"]];
        let last = all.map(|list| list.as_array().unwrap().last().unwrap().clone());
        assert_eq!(
            last,
            [
                json!({"name": "wal", "persistentVolumeClaim": {"claimName": "pg-1-wal"}}),
                json!({"name": "wal", "mountPath": "/var/lib/helios-wal"}),
            ]
        );
        let config = &objects[at("ConfigMap/pg-config")].body["data"]["pg-1.json"];
        let config: Value = serde_json::from_str(config.as_str().unwrap()).unwrap();
        assert_eq!(config["wal_dir"], "/var/lib/helios-wal/pg");
        // An agent of an earlier version knows no such field.
        let without = config::config_map(&self::cluster(minimal())).unwrap();
        assert!(!without.body.to_string().contains("wal_dir"));
    }
}
