//! The agent: in charge of one PostgreSQL instance. It starts, stops, fences, promotes and rejoins
//! it, on the orders of whoever holds the epoch, and tells what the instance is.
//!
//! May do I/O: processes, files, SQL on its own instance and on the primary it follows, and the
//! control socket. Decides nothing about the cluster, but ends a primary whose lease has ended.
//!
//! Invariants: what it must remember is durable before it acts; a command of an older epoch than
//! the latest it has seen is refused; there is never more than one postmaster on the data
//! directory; "stopped" means that no process of the instance is left.

mod agent;
mod bootstrap;
mod certificates;
pub mod client;
mod config;
mod copy;
mod disk;
mod durable;
mod error;
mod files;
mod follow;
mod forward;
mod hub;
mod instance;
mod lease;
mod logs;
mod observer;
mod postmaster;
mod process;
mod promote;
pub mod record;
mod server;
mod settings;
mod source;
mod sql;
mod stop;
mod survey;
mod synchronous;
mod tools;
mod wal;

pub use agent::run;
pub use config::{AgentConfig, BaseBackup, Network, ServerTls, User};
pub use error::AgentFailure;
pub use forward::forward_log;
