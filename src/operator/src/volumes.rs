//! What is known of the volumes, and whether they can have the size that is asked for. Pure.
//!
//! Invariant: a volume that cannot grow keeps nothing else from being reconciled.

use helios_api::v1alpha1::ConditionType;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;

use crate::OperatorError;
use crate::build::Built;
use crate::conductor::Verdict;

/// Volumes that are not as they should be.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    there: Vec<String>,
    pending: Vec<String>,
    resizing: Vec<String>,
    refused: Vec<String>,
}

impl Claims {
    /// Takes note of a claim as it is.
    pub(crate) fn look(&mut self, name: &str, claim: &PersistentVolumeClaim) {
        self.there.push(name.to_owned());
        let class = claim
            .spec
            .as_ref()
            .and_then(|spec| spec.storage_class_name.as_deref())
            .unwrap_or_default();
        let Some(status) = &claim.status else { return };
        if status.phase.as_deref() == Some("Pending") {
            self.pending.push(format!(
                "volume \"{name}\" is pending: nobody has provided one of storage class \"{class}\" yet"
            ));
        }
        let conditions = status.conditions.iter().flatten();
        let resizing = conditions.filter(|c| c.type_.ends_with("Pending") || c.type_ == "Resizing");
        self.resizing.extend(resizing.map(|c| {
            let message = c.message.as_deref().unwrap_or(&c.type_);
            format!("volume \"{name}\" grows: {message}")
        }));
    }

    /// Takes note of what came of applying an object: a claim that is there and may not be changed
    /// stays as it is.
    pub(crate) fn note(
        &mut self,
        object: &Built,
        applied: Result<(), OperatorError>,
    ) -> Result<(), OperatorError> {
        let claim = object.resource.kind == "PersistentVolumeClaim";
        match applied {
            Err(OperatorError::Api(kube::Error::Api(status)))
                if claim
                    && matches!(status.code, 403 | 422)
                    && self.there.contains(&object.name) =>
            {
                let why = format!(
                    "volume \"{}\" stays as it is: {}",
                    object.name, status.message
                );
                self.refused.push(why);
                Ok(())
            }
            other => other,
        }
    }
}

/// What is said of them.
pub(crate) fn verdict(claims: &Claims) -> Verdict {
    let kind = ConditionType::VolumesReady;
    let lists = [
        (&claims.refused, "CannotGrow"),
        (&claims.pending, "Pending"),
        (&claims.resizing, "Growing"),
    ];
    for (list, reason) in lists {
        if let Some(first) = list.first() {
            return Verdict::bad(kind, reason, first);
        }
    }
    Verdict::good(kind, "Ready", "every volume has the size that is asked for")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn claims(claim: serde_json::Value) -> Verdict {
        let mut claims = Claims::default();
        claims.look("pg-1", &serde_json::from_value(claim).unwrap());
        verdict(&claims)
    }

    #[test]
    fn what_a_volume_waits_for_is_named() {
        let bound = claims(json!({"status": {"phase": "Bound"}}));
        assert!(bound.good);
        let pending = claims(json!({
            "spec": {"storageClassName": "no-such-class"}, "status": {"phase": "Pending"},
        }));
        assert_eq!((pending.good, pending.reason), (false, "Pending"));
        assert!(
            pending.message.contains("no-such-class"),
            "{}",
            pending.message
        );
        let growing = claims(json!({"status": {"phase": "Bound", "conditions": [
            {"type": "FileSystemResizePending", "status": "True", "message": "start a Pod"},
        ]}}));
        assert_eq!((growing.good, growing.reason), (false, "Growing"));
    }
}
