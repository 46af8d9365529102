//! The proxy: listener, TLS, authentication, backends, drain, migration engine, control API.

pub mod auth;
pub mod backend;
pub mod config;
pub mod control;
pub mod engine;
mod framed;
pub mod handle;
pub mod listener;
pub mod login;
pub mod managed;
pub mod options;
pub mod stream;
pub mod takeover;
pub mod tls;
mod workers;

pub use handle::{CommandError, Proxy, ProxyHandle, StartError};
pub use handle::{Followed, Given, TakeOverError, TakenOver};
pub use options::ProxyOptions;
