//! What the product tells of itself: log lines ([`log`]) and metrics ([`metrics`]).
//!
//! Touches the standard error stream or one log file, and the process-wide tracing subscriber;
//! nothing else. Invariant: a metric's name, type, unit and labels are written down once, in
//! [`metrics::names`].

pub mod log;
pub mod metrics;

pub use log::{InitError, LogFormat, init};
pub use metrics::Metrics;
