//! Tests against a whole cluster, and what builds that cluster.
//!
//! Everything here goes through real sockets to real servers, and judges by the data and by what
//! a client received; nothing asks the product's own counters.

pub mod driver;
pub mod raw;
pub mod restart;
pub mod sources;
pub mod subject;

/// Errors of tests: told to a person, matched by nobody.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
