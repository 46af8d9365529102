//! Randomised experiments on real servers behind the proxy, and the verdict over them.
//!
//! A seed decides workload, level, faults and their times; what happens then is judged by a
//! [`checker`] that sees nothing but the clients' histories and the data.

pub mod checker;
pub mod cluster;
pub mod disk;
pub mod errors;
pub mod experiment;
pub mod fault;
pub mod history;
pub mod notes;
pub mod plan;
pub mod processes;
pub mod report;
pub mod runner;
pub mod wire;
pub mod workload;
