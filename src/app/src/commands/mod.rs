//! One module a group of commands; each is thin: ask a library, show the answer.

mod alone;
pub(crate) mod first;
pub(crate) mod kubernetes;
pub(crate) mod local;
pub(crate) mod protection;
pub(crate) mod proxy;
pub(crate) mod serve;
pub(crate) mod show;
pub(crate) mod start;
