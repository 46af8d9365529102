//! The session engine: forwarding, the gate that a move closes and opens, migration and replay.
//!
//! One task a session owns both its sockets. The gate (`gate`) tells all sessions what phase a move
//! is in; sessions answer by acknowledging a phase once they stand as it asks. The invariant: while
//! a session migrates nothing is read from its client, and a replay works for one epoch only.

mod aborted;
mod again;
pub mod ahead;
mod answers;
mod asking;
mod before;
mod begin;
pub mod bell;
pub mod counting;
mod cursors;
mod domain;
mod ending;
mod events;
pub mod evidence;
mod failing;
mod feed;
pub mod gate;
mod gather;
mod groups;
pub(crate) mod handover;
pub mod heir;
pub mod history;
mod io;
mod kept;
pub(crate) mod kept_topology;
pub mod latency;
mod later;
pub(crate) mod leaving;
pub mod link;
mod lost;
mod making;
pub mod monitor;
mod moving;
pub(crate) mod opening;
mod own;
mod own_answers;
mod preallocate;
mod presence;
pub mod progress;
pub mod protection;
mod pump;
pub(crate) mod raise;
mod reach;
mod reads;
mod rebuild;
pub mod registry;
pub mod rehearsal;
mod replay;
mod resolve;
mod restarts;
pub mod room;
pub mod running;
mod runs;
mod sequences;
pub mod session;
mod set_back;
pub mod shared;
mod tables;
pub(crate) mod temporary;
mod timers;
mod turn;
mod verify;
