//! Services, network policies and disruption budgets.

use helios_api::v1alpha1::names;
use helios_api::v1alpha1::valid::ValidCluster;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde_json::{Value, json};

use super::{Built, built, instance, proxy, selector};

/// The Service for applications, and those in front of the primary and of the standbys.
pub(super) fn services(cluster: &ValidCluster) -> Vec<Built> {
    let template = &cluster.spec.service;
    let role = |role: &str| {
        let mut labels = selector(cluster, instance::COMPONENT);
        labels[names::ROLE] = role.into();
        labels
    };
    let port = json!([{
        "name": "postgresql", "port": names::POSTGRES_PORT, "targetPort": "postgresql",
        "protocol": "TCP",
    }]);
    let service = |name: &str, kind: &str, selector: Value, annotations: Value| {
        built::<Service>(
            cluster,
            name,
            None,
            json!({
                "metadata": {"annotations": annotations},
                "spec": {"type": kind, "selector": selector, "ports": port},
            }),
        )
    };
    let name = &cluster.name;
    vec![
        service(
            name,
            template.kind.as_str(),
            selector(cluster, proxy::COMPONENT),
            json!(template.annotations),
        ),
        service(
            &names::primary_service(name),
            "ClusterIP",
            role("primary"),
            json!({}),
        ),
        service(
            &names::replicas_service(name),
            "ClusterIP",
            role("replica"),
            json!({}),
        ),
    ]
}

/// Nothing reaches a Pod but on the ports that it serves; each of them asks who is there itself.
pub(super) fn policies(cluster: &ValidCluster) -> [Built; 2] {
    let policy = |component: &str, name: String| {
        let port = |number: u16| json!({"protocol": "TCP", "port": number});
        built::<NetworkPolicy>(
            cluster,
            &name,
            None,
            json!({"spec": {
                "podSelector": {"matchLabels": selector(cluster, component)},
                "policyTypes": ["Ingress"],
                "ingress": [{"ports": [
                    port(names::POSTGRES_PORT), port(names::CONTROL_PORT), port(names::HTTP_PORT),
                ]}],
            }}),
        )
    };
    [
        policy(instance::COMPONENT, format!("{}-instances", cluster.name)),
        policy(proxy::COMPONENT, names::proxy(&cluster.name)),
    ]
}

/// One instance and one proxy may be evicted at a time.
pub(super) fn budgets(cluster: &ValidCluster, version: &str) -> [Built; 2] {
    let budget = |component: &str, name: String| {
        let mut built = built::<PodDisruptionBudget>(
            cluster,
            &name,
            None,
            json!({"spec": {
                "maxUnavailable": 1,
                "selector": {"matchLabels": selector(cluster, component)},
            }}),
        );
        built.resource.version = version.to_owned();
        built.resource.api_version = format!("policy/{version}");
        built.body["apiVersion"] = built.resource.api_version.clone().into();
        built
    };
    [
        budget(instance::COMPONENT, format!("{}-instances", cluster.name)),
        budget(proxy::COMPONENT, names::proxy(&cluster.name)),
    ]
}
