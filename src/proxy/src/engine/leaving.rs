//! Idle sessions leave the primary before it is stopped for a planned move.
//!
//! The end of a thousand backends takes a server a third of a second, and would be a part of the
//! pause. The invariant: only a session leaves that stands outside a transaction, has nothing that
//! could not be restored, nothing that others would miss meanwhile, and has a backend waiting on the candidate; should its client speak
//! before the move, or should there be none, it logs in again.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use helios_session::{ReplayMode, TxnStatus};
use tokio::sync::oneshot;

use super::gate::Phase;
use super::registry::{Entry, Leave, lock};
use super::session::{Server, Session};
use super::shared::Shared;

/// Backends that end side by side: others want to work meanwhile.
const SIDE_BY_SIDE: usize = 8;

/// How long one backend may take to end.
const LIMIT: Duration = Duration::from_secs(2);

/// Sessions begin to watch whether they are idle. False when there are too few: it would not be
/// worth the login of one whose client speaks before the move.
pub(crate) fn watch(shared: &Shared) -> bool {
    let all = shared.registry.all();
    if all.len() < shared.options.leave_ahead_from {
        return false;
    }
    for entry in all {
        *lock(&entry.leave) = Some(Leave::Watch);
        entry.bell.ring();
    }
    true
}

/// Lets those that have been idle since leave their backends, a few at a time; waits until the
/// backends have ended.
pub(crate) async fn leave(shared: &Shared) {
    let one = |entry: Arc<Entry>| async move {
        let (done, ended) = oneshot::channel();
        *lock(&entry.leave) = Some(Leave::Now(done));
        entry.bell.ring();
        let _ = tokio::time::timeout(LIMIT, ended).await;
        *lock(&entry.leave) = None;
    };
    futures_util::stream::iter(shared.registry.all())
        .for_each_concurrent(SIDE_BY_SIDE, one)
        .await;
}

impl Session {
    /// Does what the preparation of a move asks, if it does.
    pub(super) fn asked_to_leave(&mut self) {
        let asked = lock(&self.entry().leave).take();
        match asked {
            None => {}
            Some(Leave::Watch) => self.idle = self.may_leave(),
            Some(Leave::Now(done)) => {
                let warm = lock(&self.entry().warm).is_some();
                if self.idle && warm && self.may_leave() {
                    if let Some(server) = self.server.take() {
                        tokio::spawn(goodbye(server, done));
                    }
                    self.show_instance();
                }
                self.idle = false;
            }
        }
    }

    /// Leaves a backend that has been read to the end, before a move; should there be none, the
    /// session logs in again.
    pub(super) fn leave_used_up(&mut self) {
        if let Some(server) = self.server.take() {
            let (done, _) = oneshot::channel();
            tokio::spawn(goodbye(server, done));
        }
        self.show_instance();
    }

    fn may_leave(&self) -> bool {
        let Some(server) = &self.server else {
            return false;
        };
        let quiet = self.tracker.status() == TxnStatus::Idle
            && self.tracker.is_between()
            && self.tracker.is_quiet()
            && self.asking.is_none()
            && !self.state_due;
        let (client, link) = (&self.client, &server.link);
        let nothing_under_way = client.input.is_empty()
            && client.passing == 0
            && link.input.is_empty()
            && link.output.is_empty()
            && !link.ended
            && !self.discarding
            && self.resend.is_none()
            && self.refuse.is_none()
            && self.instead.is_none()
            && self.forced.is_none()
            && self.last_words.is_none();
        let movable = self.tracker.mode() != ReplayMode::None
            && self.shared.options.move_on_maintenance
            && self.unprotected().is_none();
        let missed = self.state.is_felt_by_others();
        // What a session would rather have, though it would not be an error.
        let kept = self.temporary.is_none() || self.kept().is_some();
        self.gate.phase == Phase::Open && quiet && nothing_under_way && movable && kept && !missed
    }
}

/// Ends a backend and waits until it is gone.
async fn goodbye(mut server: Server, done: oneshot::Sender<()>) {
    let ending = async {
        helios_wire::message::front::terminate(&mut server.link.output);
        server.link.flush().await?;
        while server.link.read_more().await? {
            server.link.input.clear();
        }
        std::io::Result::Ok(())
    };
    // One that does not end is ended with its server.
    let _ = tokio::time::timeout(LIMIT, ending).await;
    drop(done);
}
