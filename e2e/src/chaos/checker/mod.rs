//! Verdicts over histories. Pure: no clock, no I/O; judged are only what clients sent and received
//! and what the database holds in the end.

pub mod anomaly;
pub mod effects;
pub mod graph;
pub mod ledger;
pub mod list_append;
pub mod sequences;
pub mod two_phase;

pub use anomaly::{Anomaly, Finding};
