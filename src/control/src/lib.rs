//! How the control API travels: HTTP/JSON, one request a connection, over mutual TLS between Pods;
//! and the same certificates towards PostgreSQL.
//!
//! May do I/O on the connections it is given or asked to open, and read certificate files. Knows
//! nothing of what is said. Invariant: a listener of [`serve`] hands nothing to its router before
//! the peer has shown a certificate of the cluster's own authority with an allowed name.

mod client;
mod error;
pub mod http;
mod material;
mod postgres;
mod serve;

pub use client::{CallError, ControlClient};
pub use error::TlsError;
pub use material::{Material, TlsFiles};
pub use postgres::PostgresTls;
pub use serve::serve;
