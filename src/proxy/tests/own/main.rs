//! What only a session's backend has, before and after a move, as the session's own queries and the
//! catalogs show it: cursors WITH HOLD, the last values of sequences, all kinds of temporary objects.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

mod cursors;
mod last_values;
mod objects;
mod settings;
mod support;
