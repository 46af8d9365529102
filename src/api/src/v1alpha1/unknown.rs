//! Fields that somebody has written and that nothing knows: the API server drops them without a
//! word, but what `kubectl apply` was given is in the object's annotation.
//!
//! Pure. Finds what can be found and is silent otherwise: a hint, never a refusal.

use kube::CustomResourceExt as _;
use serde_json::Value;

use super::HeliosCluster;

/// Where `kubectl apply` keeps what it was given.
const APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// So many are told.
const MOST: usize = 5;
/// A name that is less like it is no misspelling.
const LIKE: f64 = 0.75;

/// What was written in `spec` and is not known, with the field that may have been meant.
#[must_use]
pub fn fields(cluster: &HeliosCluster) -> Vec<String> {
    let annotations = cluster.metadata.annotations.as_ref();
    let Some(text) = annotations.and_then(|all| all.get(APPLIED)) else {
        return Vec::new();
    };
    let (Ok(written), Ok(definition)) = (
        serde_json::from_str::<Value>(text),
        serde_json::to_value(HeliosCluster::crd()),
    ) else {
        return Vec::new();
    };
    let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let mut found = Vec::new();
    walk(
        &written["spec"],
        &schema["properties"]["spec"],
        "spec",
        &mut found,
    );
    found.truncate(MOST);
    found
}

fn walk(written: &Value, schema: &Value, path: &str, found: &mut Vec<String>) {
    match written {
        Value::Object(fields) => {
            let known = schema["properties"].as_object();
            for (name, value) in fields {
                let path = format!("{path}.{name}");
                match (known.and_then(|known| known.get(name)), known) {
                    (Some(schema), _) => walk(value, schema, &path, found),
                    // A map has names of the user's own.
                    (None, None) => walk(value, &schema["additionalProperties"], &path, found),
                    (None, Some(known)) => found.push(hint(&path, name, known.keys())),
                }
            }
        }
        Value::Array(items) => {
            for (number, item) in items.iter().enumerate() {
                walk(item, &schema["items"], &format!("{path}[{number}]"), found);
            }
        }
        _ => {}
    }
}

fn hint<'a>(path: &str, name: &str, known: impl Iterator<Item = &'a String>) -> String {
    let nearest = known
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((likeness, candidate)) if likeness >= LIKE => {
            format!("{path} is not known; did you mean \"{candidate}\"?")
        }
        _ => format!("{path} is not known"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn found(spec: &Value) -> Vec<String> {
        let least = json!({"imageName": "x", "storage": {"size": "1Gi"}});
        let mut cluster = HeliosCluster::new("pg", serde_json::from_value(least).unwrap());
        let text = json!({"kind": "HeliosCluster", "spec": spec}).to_string();
        cluster.metadata.annotations = Some([(APPLIED.to_owned(), text)].into());
        fields(&cluster)
    }

    #[test]
    fn what_is_known_is_not_named() {
        let spec = json!({
            "instances": 3, "imageName": "x", "storage": {"size": "1Gi"},
            "postgresql": {"parameters": {"work_mem": "1MB"}, "pgHBA": ["local all all trust"]},
            "podMetadata": {"labels": {"anything": "goes"}},
            "resources": {"limits": {"cpu": "1"}},
            "scheduling": {"tolerations": [{"key": "a", "operator": "Exists"}]},
        });
        assert_eq!(found(&spec), [""; 0]);
        assert_eq!(found(&Value::Null), [""; 0]);
    }

    #[test]
    fn what_is_not_known_is_named_with_what_may_have_been_meant() {
        let spec = json!({
            "instance": 3,
            "postgresql": {"paramters": {}},
            "scheduling": {"tolerations": [{"keys": "a"}]},
            "somethingElse": 1,
        });
        assert_eq!(
            found(&spec),
            [
                "spec.instance is not known; did you mean \"instances\"?",
                "spec.postgresql.paramters is not known; did you mean \"parameters\"?",
                "spec.scheduling.tolerations[0].keys is not known; did you mean \"key\"?",
                "spec.somethingElse is not known",
            ]
        );
    }
}
