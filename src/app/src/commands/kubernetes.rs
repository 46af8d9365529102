//! Commands about Kubernetes: `operator`, `crds`, `copy-to`.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use helios_api::v1alpha1::HeliosCluster;
use helios_operator::Options;
use kube::CustomResourceExt as _;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::cli::OperatorArgs;
use crate::failure::Failure;
use crate::out;

/// `helios operator`.
pub(crate) async fn operator(args: &OperatorArgs) -> Result<(), Failure> {
    let failed = |e| Failure::failed(format!("could not listen for signals: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let options = Options {
        namespace: args.namespace.clone(),
        lease_namespace: args.lease_namespace.clone(),
        identity: args.identity.clone(),
        in_pod: std::env::var_os("POD_NAME").is_some_and(|name| *name == *args.identity),
        image: args.image.clone(),
        http: args.http,
    };
    let cancel = CancellationToken::new();
    let stop = cancel.clone();
    let mut running = Box::pin(helios_operator::run(options, stop));
    tokio::select! {
        result = &mut running => return result.map_err(|e| Failure::failed(e.to_string())),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    cancel.cancel();
    running.await.map_err(|e| Failure::failed(e.to_string()))
}

/// `helios crds`.
pub(crate) fn crds(values_schema: bool) -> Result<(), Failure> {
    let text = match values_schema {
        true => values()?,
        false => definition()?,
    };
    out::print_raw(text.as_bytes());
    Ok(())
}

/// The schema of the values of `charts/helios-cluster`: those of the spec, and what stands around
/// it.
fn values() -> Result<String, Failure> {
    let failed =
        |why: &dyn std::fmt::Display| Failure::failed(format!("could not write the schema: {why}"));
    let crd = serde_json::to_value(HeliosCluster::crd()).map_err(|e| failed(&e))?;
    let path = "/spec/versions/0/schema/openAPIV3Schema/properties/spec";
    let mut schema = crd
        .pointer(path)
        .cloned()
        .ok_or_else(|| failed(&"no spec"))?;
    as_json_schema(&mut schema);
    schema["$schema"] = "http://json-schema.org/draft-07/schema#".into();
    let strings = json!({"type": "object", "additionalProperties": {"type": "string"}});
    schema["properties"]["global"] = json!({"type": "object"});
    schema["properties"]["nameOverride"] = json!({
        "type": "string", "maxLength": 40, "pattern": "^([a-z]([-a-z0-9]*[a-z0-9])?)?$",
        "description": "Name of the HeliosCluster; that of the release without it.",
    });
    for (name, text) in [
        ("labels", "Labels of the HeliosCluster."),
        ("annotations", "Annotations of the HeliosCluster."),
    ] {
        schema["properties"][name] = strings.clone();
        schema["properties"][name]["description"] = text.into();
    }
    let text = serde_json::to_string_pretty(&schema).map_err(|e| failed(&e))?;
    Ok(format!("{text}\n"))
}

/// From Kubernetes' structural schema to JSON Schema: what only Kubernetes knows becomes what
/// everybody does, and a field that is not named is refused, as by the API server with strict
/// validation.
fn as_json_schema(schema: &mut Value) {
    match schema {
        Value::Array(all) => all.iter_mut().for_each(as_json_schema),
        Value::Object(fields) => {
            let number = fields.remove("x-kubernetes-int-or-string");
            if number == Some(Value::Bool(true)) {
                fields.insert("type".to_owned(), json!(["integer", "string"]));
            }
            let open = fields.remove("x-kubernetes-preserve-unknown-fields");
            fields.retain(|name, value| {
                // "format" may also be the name of a property.
                !name.starts_with("x-kubernetes-") && (name != "format" || value.is_object())
            });
            let nullable = fields.remove("nullable") == Some(Value::Bool(true));
            if let (true, Some(kind)) = (nullable, fields.get("type").cloned()) {
                fields.insert("type".to_owned(), json!([kind, "null"]));
                if let Some(values) = fields.get_mut("enum").and_then(Value::as_array_mut)
                    && !values.contains(&Value::Null)
                {
                    values.push(Value::Null);
                }
            }
            if fields.get("properties").is_some_and(Value::is_object)
                && !fields.contains_key("additionalProperties")
                && open.is_none()
            {
                fields.insert("additionalProperties".to_owned(), false.into());
            }
            fields.values_mut().for_each(as_json_schema);
        }
        _ => {}
    }
}

/// The definition as it lies in `crds/`.
fn definition() -> Result<String, Failure> {
    let yaml = serde_saphyr::to_string(&HeliosCluster::crd())
        .map_err(|e| Failure::failed(format!("could not write the definition: {e}")))?;
    Ok(format!(
        "# Generated by \"helios crds\". Do not edit.\n{yaml}"
    ))
}

/// `helios copy-to`.
pub(crate) fn copy_to(path: &Path) -> Result<(), Failure> {
    let failed = |e: std::io::Error| {
        Failure::failed(format!("could not copy to \"{}\": {e}", path.display()))
    };
    let program = std::env::current_exe().map_err(failed)?;
    std::fs::copy(program, path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_of_the_cluster_chart_is_what_is_generated() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../charts/helios-cluster/values.schema.json");
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            there == values().unwrap(),
            "{0} has drifted; run: cargo run -p helios -- crds --values-schema > {0}",
            path.display()
        );
    }

    #[test]
    fn kubernetes_own_schema_words_become_json_schema() {
        let mut schema = json!({
            "type": "object",
            "properties": {
                "size": {"x-kubernetes-int-or-string": true},
                "mode": {"type": "string", "enum": ["a"], "nullable": true, "format": "x"},
                "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true,
                         "properties": {}},
            },
            "x-kubernetes-validations": [{"rule": "true"}],
        });
        as_json_schema(&mut schema);
        assert_eq!(
            schema,
            json!({
                "type": "object", "additionalProperties": false,
                "properties": {
                    "size": {"type": ["integer", "string"]},
                    "mode": {"type": ["string", "null"], "enum": ["a", null]},
                    "open": {"type": "object", "properties": {}},
                },
            })
        );
    }

    #[test]
    fn the_definitions_in_the_repository_are_what_is_generated() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for path in ["crds", "charts/helios-operator/files"] {
            let path = root.join(path).join("heliosclusters.yaml");
            let there = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(
                there == definition().unwrap(),
                "{0} has drifted; run: cargo run -p helios -- crds > {0}",
                path.display()
            );
        }
    }
}
