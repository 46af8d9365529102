//! How the answers to a long replay are read: many at a time.
//!
//! The invariant: a thread sleeps only while all its sessions are held behind the barrier.

use std::time::Duration;

use helios_session::tracker::Tracker;

use super::link::Link;

/// As many exchanges in flight are worth waiting for their answers together.
const MANY: usize = 32;

/// How long a server is left alone with them.
const ALONE: Duration = Duration::from_micros(150);

/// Lets the answers to a long pipeline come in. The server writes each by itself, and where both
/// share a machine each wakes this thread up, most often in the place of the server, for which it is
/// then switched out again: half of the time of a long replay. So it is the thread that sleeps, not
/// the task, which would be woken up all the same. Behind the barrier nobody else on it has anything
/// to do but this.
pub(super) fn gather(link: &Link, new: &Tracker) {
    if link.output.is_empty() && new.journal().in_flight().len() >= MANY {
        std::thread::sleep(ALONE);
    }
}
