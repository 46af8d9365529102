//! Test support: real PostgreSQL servers, fault-injecting sockets, seeded schedules.
//!
//! A dev-dependency only; nothing of the product may depend on it.

pub mod bench;
pub mod frames;
pub mod interpose;
pub mod net;
pub mod pg;

pub use bench::Bench;
pub use pg::{PgOptions, PgServer};
