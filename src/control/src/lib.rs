//! How the control API travels: HTTP/JSON, one request a connection, over mutual TLS between Pods;
//! and the same certificates towards PostgreSQL, replaced while they are used.
//!
//! May do I/O on the connections it is given or asked to open, and read certificate files. Knows
//! nothing of what is said. Invariant: a listener of [`serve`] hands nothing to its router before
//! the peer has shown a certificate of the cluster's own authority with an allowed name.

mod client;
mod error;
mod files;
pub mod http;
mod live;
mod material;
mod postgres;
mod serve;

pub use client::{CallError, ControlClient};
pub use error::{Part, TlsError};
pub use files::{FileSet, LOOK_EVERY};
pub use live::Live;
pub use material::{Material, TlsFiles};
pub use postgres::PostgresTls;
pub use serve::serve;
