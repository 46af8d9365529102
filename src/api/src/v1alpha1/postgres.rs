//! PostgreSQL: parameters, client authentication, synchronous replication, and what counts as a
//! failure.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// PostgreSQL itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Postgresql {
    /// Parameters, over helios' defaults. Those that fencing and replication rest on are refused.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, String>,
    /// Lines for `pg_hba.conf`, behind those that helios itself needs. Without any, everybody who
    /// comes over the network needs a SCRAM password.
    #[serde(default, rename = "pgHBA", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 200), inner(length(min = 1, max = 1000)))]
    pub pg_hba: Vec<String>,
    /// Whether commits wait for a standby.
    #[serde(default)]
    pub synchronous: Synchronous,
}

/// Synchronous replication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Synchronous {
    /// How many standbys must confirm a commit: any one of them, or none.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1))]
    pub number: i32,
    /// What commits do when no standby is left to confirm them.
    #[serde(default)]
    pub data_durability: DataDurability,
}

impl Default for Synchronous {
    fn default() -> Self {
        Self {
            number: one(),
            data_durability: DataDurability::default(),
        }
    }
}

fn one() -> i32 {
    1
}

/// What commits do when no standby is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DataDurability {
    /// They wait for one.
    Required,
    /// They go on without. A primary that fails then is waited for, not replaced.
    #[default]
    Preferred,
}

/// When a primary counts as failed, and how long its successor is looked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failover {
    /// A postmaster or an agent that answers nothing for so long is taken for dead when a second
    /// witness agrees. In milliseconds.
    #[serde(default = "unresponsive")]
    #[schemars(range(min = 500, max = 600_000))]
    pub unresponsive_ms: i64,
    /// A synchronous standby may be gone for so long before commits stop waiting for it.
    #[serde(default = "standby_grace")]
    #[schemars(range(min = 0, max = 600_000))]
    pub standby_grace_ms: i64,
    /// A standby that is further behind is no target for a switchover and confirms no commits.
    #[serde(default = "max_lag")]
    #[schemars(range(min = 1_048_576))]
    pub max_lag_bytes: i64,
    /// An old primary that does not come up within this is replaced by a standby that may.
    #[serde(default = "restart_patience")]
    #[schemars(range(min = 1000, max = 3_600_000))]
    pub restart_patience_ms: i64,
    /// A primary that has failed is tried where it is for so long before a standby takes over; 0:
    /// a standby takes over at once. In milliseconds.
    #[serde(default)]
    #[schemars(range(min = 0, max = 3_600_000))]
    pub delay_ms: i64,
    /// A primary that neither the operator nor the standbys that could take over have confirmed
    /// for so long stops itself. Whoever replaces one that cannot be reached waits for this and an
    /// eighth of it. In milliseconds.
    #[serde(default = "lease")]
    #[schemars(range(min = 2000, max = 600_000))]
    pub lease_ms: i64,
    /// How often the operator confirms the primary; at most a fifth of `leaseMs`. In milliseconds.
    #[serde(default = "renew")]
    #[schemars(range(min = 100, max = 60_000))]
    pub renew_ms: i64,
}

impl Default for Failover {
    fn default() -> Self {
        Self {
            unresponsive_ms: unresponsive(),
            standby_grace_ms: standby_grace(),
            max_lag_bytes: max_lag(),
            restart_patience_ms: restart_patience(),
            delay_ms: 0,
            lease_ms: lease(),
            renew_ms: renew(),
        }
    }
}

fn unresponsive() -> i64 {
    3_000
}

fn standby_grace() -> i64 {
    2_000
}

fn max_lag() -> i64 {
    16 << 20
}

fn restart_patience() -> i64 {
    15_000
}

fn lease() -> i64 {
    3_000
}

fn renew() -> i64 {
    300
}

/// A planned move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Switchover {
    /// How long sessions that cannot be moved may take to end by themselves. In seconds.
    #[serde(default = "drain_timeout")]
    #[schemars(range(min = 0, max = 3600))]
    pub drain_timeout_secs: i64,
}

impl Default for Switchover {
    fn default() -> Self {
        Self {
            drain_timeout_secs: drain_timeout(),
        }
    }
}

fn drain_timeout() -> i64 {
    30
}
