//! The proxy: listener, TLS, authentication, backends, drain, migration engine, control API.

pub mod auth;
pub mod backend;
pub mod config;
mod framed;
pub mod listener;
pub mod login;
pub mod stream;
pub mod tls;
pub mod engine;
pub mod handle;

pub use handle::{CommandError, Proxy, ProxyHandle, ProxyOptions, StartError};
