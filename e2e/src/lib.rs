//! Tests against a whole cluster, and what builds that cluster.
//!
//! Everything here goes through real sockets to real servers, and judges by the data and by what
//! a client received; nothing asks the product's own counters.

pub mod chaos;
pub mod crowd;
pub mod driver;
pub mod kube;
pub mod ledger;
pub mod lockstep;
pub mod node;
pub mod raw;
pub mod restart;
pub mod schedule;
pub mod sources;
pub mod subject;

/// Errors of tests: told to a person, matched by nobody.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// An error that a failed test prints as it is, over several lines.
pub struct Shown(String);

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Box<dyn std::error::Error + Send + Sync>> for Shown {
    fn from(error: Box<dyn std::error::Error + Send + Sync>) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text.push_str(&format!("\ncaused by: {error}"));
            cause = error.source();
        }
        Self(text)
    }
}
