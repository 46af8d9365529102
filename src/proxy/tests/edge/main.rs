//! The proxy's edge against a real PostgreSQL server, with clients of other people's making.

mod logins;
mod manners;
mod support;
mod tls;
