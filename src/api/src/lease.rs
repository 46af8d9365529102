//! The primary's lease: what the operator grants, what an agent asks for (`POST /v1/lease`).
//!
//! An agent numbers its asks and remembers when it made each. A grant names the ask that it
//! answers, and counts from that moment by the agent's own clock, however long it travelled: so no
//! grant is worth more than whoever gave it meant, and no two clocks are compared.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{Epoch, InstanceName};

/// Who keeps a primary writable while the operator is away: the others whose confirmation takes
/// the place of a grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rule", content = "of", rename_all = "snake_case")]
pub enum Rule {
    /// Nobody may take over, so nothing has to be renewed.
    Free,
    /// One of these, because all of them have to stop before anybody is promoted.
    Any(BTreeSet<InstanceName>),
    /// All of these, because one of them has to stop before anybody is promoted.
    All(BTreeSet<InstanceName>),
}

/// What a lease is held under.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// Grows with every change of terms; an agent never goes back to earlier ones.
    pub version: u64,
    /// Whose confirmation counts beside the operator's.
    pub rule: Rule,
    /// For how long a grant or a confirmation holds, in milliseconds.
    pub hold_ms: u64,
}

/// Asks for the next number, and grants for the last one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRequest {
    /// The epoch in which the instance may be writable.
    pub epoch: Epoch,
    /// The terms in force from now on.
    pub terms: Terms,
    /// The ask that is granted; `None`: this one only asks for a number.
    pub grant: Option<u64>,
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseReply {
    /// The number of an ask that was made now.
    pub ask: u64,
    /// Version of the terms that the instance holds itself to; `None`: to none.
    pub version: Option<u64>,
}
