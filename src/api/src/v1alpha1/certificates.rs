//! How long the certificates of a cluster's own authority are valid.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// Certificates that operator, proxies and instances show each other. They are renewed before they
/// end, and nothing is restarted for that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(self.renewBeforeDays) || self.renewBeforeDays * 2 <= self.durationDays"
    )
    .message("spec.certificates.renewBeforeDays must be at most half of durationDays")
)]
pub struct Certificates {
    /// How long a certificate is valid. In days.
    #[serde(default = "duration")]
    #[schemars(range(min = 7, max = 730))]
    pub duration_days: i64,
    /// It is renewed when it is valid for so long only; at most half of `durationDays`, a third of
    /// it when this is not given. In days.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 3, max = 365))]
    pub renew_before_days: Option<i64>,
}

impl Default for Certificates {
    fn default() -> Self {
        Self {
            duration_days: duration(),
            renew_before_days: None,
        }
    }
}

fn duration() -> i64 {
    90
}
