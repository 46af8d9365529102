//! Types that operator, agents, proxies, command line and the Kubernetes API exchange.
//!
//! Plain data with serde: no I/O, no clock, no runtime. Values that have rules are newtypes that
//! are validated once, when they are made or deserialised.

pub mod agent;
pub mod control;
pub mod ids;
pub mod lease;
pub mod protection;
#[allow(unreachable_pub, reason = "kube's derive re-exports what it is given")]
pub mod v1alpha1;

/// FNV-1a in hexadecimal digits: the same in every build of this program, which the standard
/// library's is not. Tells one text from another; no secret.
#[must_use]
pub fn fingerprint(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

pub use ids::{Endpoint, Epoch, Host, InstanceName, Lsn, ParseError, SessionId, Timeline, Xid};
