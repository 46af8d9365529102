//! The proxy's edge against a real PostgreSQL server, with clients of other people's making.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests are tests

mod logins;
mod manners;
mod support;
mod tls;
