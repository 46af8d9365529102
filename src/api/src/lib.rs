//! Types that operator, agents, proxies and command line exchange.
//!
//! Plain data with serde: no I/O, no clock, no runtime. Values that have rules are newtypes that
//! are validated once, when they are made or deserialised.

pub mod agent;
pub mod control;
pub mod ids;

pub use ids::{Endpoint, Epoch, Host, InstanceName, Lsn, ParseError, SessionId, Timeline, Xid};
