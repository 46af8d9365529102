//! What is known of the volumes, and whether they can have the size that is asked for. Pure.
//!
//! Invariant: a volume that cannot grow keeps nothing else from being reconciled.

use std::collections::BTreeSet;

use helios_api::InstanceName;
use helios_api::v1alpha1::valid::{Invalid, bytes};
use helios_api::v1alpha1::{ConditionType, names};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::OperatorError;
use crate::build::{Built, Claim};
use crate::conductor::Verdict;

/// Volumes that are not as they should be.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    there: Vec<String>,
    pending: Vec<String>,
    resizing: Vec<String>,
    refused: Vec<String>,
    kept: BTreeSet<InstanceName>,
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

    /// Takes note of an instance's data that are older than the cluster: they are an earlier one's.
    pub(crate) fn date(
        &mut self,
        instance: &InstanceName,
        data: &PersistentVolumeClaim,
        cluster: Option<&Time>,
    ) {
        let made = data.metadata.creation_timestamp.as_ref();
        if made
            .zip(cluster)
            .is_some_and(|(made, cluster)| made < cluster)
        {
            self.kept.insert(instance.clone());
        }
    }

    /// Instances that may hold the data of an earlier cluster of this name.
    pub(crate) fn kept(&self) -> &BTreeSet<InstanceName> {
        &self.kept
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

/// Whether a volume that is there may be what is wanted now.
pub(crate) fn check(wanted: &Claim<'_>, there: &PersistentVolumeClaim) -> Result<(), Invalid> {
    let Some(spec) = &there.spec else {
        return Ok(());
    };
    let requests = spec.resources.as_ref().and_then(|r| r.requests.as_ref());
    let size = requests.and_then(|r| r.get("storage").and_then(bytes));
    if size.is_some_and(|size| size > wanted.bytes) {
        let why = "a volume cannot shrink; give at least what it has";
        return Err(Invalid::new(format!("{}.size", wanted.field), why));
    }
    if wanted.class.is_some() && spec.storage_class_name.as_ref() != wanted.class {
        let why = "cannot be changed once there are volumes";
        return Err(Invalid::new(format!("{}.storageClass", wanted.field), why));
    }
    Ok(())
}

/// Whether an instance's volumes, for its data and for its log, were made as they are wanted now: a
/// cluster may be made again over those of an earlier one.
pub(crate) fn check_log(
    instance: &str,
    (data, log): (bool, bool),
    wanted: bool,
) -> Result<(), Invalid> {
    let volume = names::wal_volume(instance);
    let why = match (wanted, data, log) {
        (true, true, false) => format!(
            "cannot be added: volume \"{instance}\" holds data that were made without \"{volume}\""
        ),
        (false, _, true) => format!(
            "cannot be removed: volume \"{volume}\" holds the log of what is on \"{instance}\""
        ),
        _ => return Ok(()),
    };
    Err(Invalid::new("spec.walStorage", why))
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
    fn data_older_than_the_cluster_are_an_earlier_ones() {
        let made = |at: &str| json!({"metadata": {"creationTimestamp": at}});
        let cluster: Time = serde_json::from_value(json!("2026-01-02T00:00:00Z")).unwrap();
        let mut claims = Claims::default();
        for (name, at) in [
            ("pg-1", "2026-01-01T23:59:59Z"),
            ("pg-2", "2026-01-02T00:00:00Z"),
        ] {
            let claim = serde_json::from_value(made(at)).unwrap();
            claims.date(&name.parse().unwrap(), &claim, Some(&cluster));
        }
        assert_eq!(*claims.kept(), ["pg-1".parse().unwrap()].into());
    }

    #[test]
    fn a_log_is_neither_added_to_data_nor_taken_from_them() {
        for (data, log, wanted, good) in [
            (false, false, false, true),
            (false, false, true, true),
            (true, false, false, true),
            (true, true, true, true),
            // Begun, or the data are to be made anew.
            (false, true, true, true),
            (true, false, true, false),
            (true, true, false, false),
            (false, true, false, false),
        ] {
            let checked = check_log("pg-1", (data, log), wanted);
            assert_eq!(checked.is_ok(), good, "{data} {log} {wanted}: {checked:?}");
        }
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
