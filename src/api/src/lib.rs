//! Types that operator, agents, proxies, command line and the Kubernetes API exchange.
//!
//! Plain data with serde: no I/O, no clock, no runtime. Values that have rules are newtypes that
//! are validated once, when they are made or deserialised.

pub mod agent;
pub mod control;
pub mod ids;
pub mod protection;
#[allow(unreachable_pub, reason = "kube's derive re-exports what it is given")]
pub mod v1alpha1;

pub use ids::{Endpoint, Epoch, Host, InstanceName, Lsn, ParseError, SessionId, Timeline, Xid};
