//! Ports for tests.

use std::io::Result;
use std::net::TcpListener;

/// A TCP port that is free on 127.0.0.1 at the moment, given by the kernel.
///
/// # Errors
///
/// The kernel has none left.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
