//! A session: one task that owns the client's socket and the backend's.
//!
//! `run` waits for bytes, for the gate and for the clock; `pump` moves bytes; `moving` changes the
//! backend. The invariant: bytes of the client go to the backend of the current epoch only, in the
//! order they came, and every reply goes to the client at most once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use helios_api::control::{Backend, Topology};
use helios_api::{Endpoint, Epoch, Timeline};
use helios_session::TxnStatus;
use helios_session::state::Snapshot;
use helios_session::tracker::Tracker;
use helios_wire::ErrorFields;
use helios_wire::message::back;
use tokio::sync::watch;
use tokio::time::Instant;

use super::ahead::{Blueprint, Warm};
use super::begin::{Beginning, Permits};
use super::events::{Moving, Noted};
use super::gate::{Ending, GateState, Member, Phase};
use super::link::Link;
use super::lost::{LastWords, Lost};
use super::opening::{IN_HOT_STANDBY, follow, is_primary, open_first};
use super::registry::{Entry, Registered, lock};
use super::room::Room;
use super::shared::Shared;
use super::tables::Rows;
use super::temporary::Temporary;
use crate::backend::{self, BackendConn};
use crate::login::ClientLogin;

/// A backend in use.
#[derive(Debug)]
pub(super) struct Server {
    pub link: Link,
    pub pid: i32,
    pub secret: Bytes,
    pub endpoint: Endpoint,
    pub epoch: Epoch,
    /// A position that the server's log had when the backend was there.
    pub floor: Option<helios_api::Lsn>,
    /// What of the session's state was restored on it ahead of the move.
    pub restored: Option<Box<Blueprint>>,
}

/// A backend that a session has, or had last, as it is known when its connection is gone.
#[derive(Debug)]
pub(super) struct OldBackend {
    pub pid: i32,
    /// The server that it runs on.
    pub at: Endpoint,
}

impl OldBackend {
    pub(super) fn at(pid: i32, at: &Endpoint) -> Option<Box<Self>> {
        let at = at.clone();
        Some(Box::new(Self { pid, at }))
    }
}

impl Server {
    pub(super) fn new(conn: BackendConn, epoch: Epoch) -> Self {
        Self {
            link: Link {
                parameters: conn.parameters,
                ..Link::new(conn.stream, conn.buf)
            },
            pid: conn.pid,
            secret: conn.secret,
            endpoint: conn.endpoint,
            epoch,
            floor: None,
            restored: None,
        }
    }

    /// A backend on the primary of `topology`. One that was opened while that server was a standby
    /// has not said yet that it takes writes, and was there when its timeline began: the server has
    /// not been started since.
    pub(super) fn adopted(warm: Warm, topology: &Topology) -> Self {
        let Warm { conn, restored, .. } = warm;
        let was_standby = !is_primary(&conn);
        let mut server = Self::new(conn, topology.epoch);
        server.restored = restored;
        if was_standby {
            let parameters = &mut server.link.parameters;
            parameters.insert(IN_HOT_STANDBY.to_owned(), "off".to_owned());
            let now = (topology.epoch, topology.timeline);
            let mut fences = topology.fences.iter();
            server.floor = fences
                .find(|f| (f.epoch, f.timeline) == now)
                .map(|f| f.fork);
        }
        server
    }
}

/// How a session ends.
#[derive(Debug)]
pub(super) enum End {
    /// The client left.
    ClientLeft,
    /// Told to the client, which is disconnected.
    Fatal(ErrorFields),
    /// The server's own fatal error, forwarded as it is.
    Forward(BytesMut),
    /// Another process has it: both sockets are that one's.
    HandedOver,
}

/// What woke the session.
#[derive(Debug)]
pub(super) enum Event {
    Gate,
    Cancel,
    ServerLost,
    Timer,
    HandOver,
    End(End),
}

/// Messages of a re-run exchange that the client already has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Skip {
    pub messages: u64,
    /// There is an error among them.
    pub failed: bool,
    /// They say that the transaction was rolled back.
    pub rolled_back: bool,
    pub digest: helios_session::reply::Digest,
}

/// What is known of the exchange in front when it runs again.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rerun {
    /// The client has been told an error in it, and nothing else of it is delivered: its end is
    /// missing.
    pub told: bool,
    /// It gave something else than before.
    pub differed: bool,
}

/// A client session.
#[derive(Debug)]
pub struct Session {
    pub(super) shared: Arc<Shared>,
    pub(super) registered: Registered,
    pub(super) member: Member,
    pub(super) gate: GateState,
    pub(super) client: Link,
    pub(super) server: Option<Server>,
    pub(super) tracker: Tracker,
    pub(super) room: Room,
    /// State outside a transaction, as the backend told it last.
    pub(super) state: Snapshot,
    /// Its temporary objects, if it has any.
    pub(super) temporary: Option<Box<Temporary>>,
    /// The answer to a question for the state that is on its way; ReadyForQuery waits for it.
    pub(super) asking: Option<Snapshot>,
    /// Parameters as the client knows them.
    pub(super) known: BTreeMap<String, String>,
    /// Replies of the re-run exchange in front that are checked, not delivered.
    pub(super) skip: Option<Skip>,
    pub(super) rerun: Rerun,
    /// Takes the place of the next error of the (emptied) transaction.
    pub(super) instead: Option<ErrorFields>,
    /// The next exchange is answered with this.
    pub(super) refuse: Option<ErrorFields>,
    /// The client's messages are dropped up to its Sync.
    pub(super) discarding: bool,
    /// A fatal error that the server sent before it went away.
    pub(super) last_words: Option<LastWords>,
    /// Epoch of the backend that ran the open transaction.
    pub(super) epoch: Epoch,
    /// The backend is gone while it was needed.
    pub(super) lost: Option<Lost>,
    pub(super) attempts: u32,
    /// Every notification through the proxy has reached it, since sessions stand still.
    pub(super) heard: bool,
    /// It has been idle since it was asked to watch that.
    pub(super) idle: bool,
    /// When the session was last held, for the pause.
    pub(super) held_since: Option<Instant>,
    /// What is in flight has to be sent to the backend in the phase *send*.
    pub(super) resend: Option<BytesMut>,
    /// Bytes at the front of the client's input that were in flight before a move.
    pub(super) resend_left: usize,
    /// Timeline of the backend that ran the open transaction.
    pub(super) timeline: Timeline,
    /// The rebuilt session waits for the phase *send*.
    pub(super) rebuilt: bool,
    /// Its replay sets sequences back for one record at a time: a run of several took other values
    /// than were seen.
    pub(super) one_by_one: bool,
    /// Its replay was broken off with sequences set back, or about to be: others were let in.
    pub(super) late: bool,
    /// It has found the primary by itself, which has started anew in its epoch, before the gate
    /// closed for those who have not: its transaction goes on to its end.
    pub(super) stays: bool,
    /// A cancel request of the client's waits for the moment when it may go on.
    pub(super) cancel_waits: bool,
    /// We cancelled the statement in flight ourselves, for a planned move.
    pub(super) cut: bool,
    pub(super) cancelled_by_client: bool,
    /// The rest of a large client message is thrown away.
    pub(super) dropping_rest: bool,
    /// The client's next message waits for the domain of its mark.
    pub(super) domain_due: bool,
    /// The state changed and has not been asked for yet.
    pub(super) state_due: bool,
    /// The transaction must be aborted, for this reason.
    pub(super) forced: Option<String>,
    /// `until_event` has a timer running.
    pub(super) timer_at: Option<Instant>,
    /// Next attempt to find a server, not before.
    pub(super) retry_at: Option<Instant>,
    /// It has waited for all to be told of a restarted server, and nobody was.
    pub(super) awaited: bool,
    pub(super) last_activity: Instant,
    /// The last backend, until it is known to have ended.
    pub(super) old: Option<Box<OldBackend>>,
    /// Epoch of the last move that was reported.
    pub(super) shown_epoch: Epoch,
    pub(super) noted: Noted,
    pub(super) moving: Moving,
    pub(super) rows: Rows,
    /// Requests of the client's that the migration has run again.
    pub(super) replayed: u64,
    pub(super) _permits: Permits,
}

/// The end of the login, as the client expects it.
fn greet(link: &mut Link, conn: &BackendConn, entry: &Entry) {
    for (name, value) in &conn.parameters {
        back::parameter_status(&mut link.output, name, value);
    }
    back::backend_key_data(&mut link.output, entry.key.pid, &entry.key.secret);
    back::ready_for_query(&mut link.output, TxnStatus::Idle.byte());
}

/// A client's last message; one that does not read it is not waited for.
async fn farewell(client: &mut Link, frame: &[u8]) {
    client.output.extend_from_slice(frame);
    let _ = tokio::time::timeout(Duration::from_secs(5), client.flush()).await;
}

/// Runs a client's session from its login to its end.
pub async fn serve(shared: Arc<Shared>, client: ClientLogin) {
    let secret_len = if client.protocol_minor >= 2 { 32 } else { 4 };
    let peer = client.peer.clone();
    let registered = shared.registry.add(client.login.clone(), peer, secret_len);
    let id = registered.entry.id;
    let mut gate = shared.gate.watch();
    let mut link = Link::new(client.stream, client.buf);
    // Boxed, as everything that is seldom: a session's own future is small.
    let opened = Box::pin(open_first(&shared, &mut gate, &registered.entry)).await;
    let (conn, epoch) = match opened {
        Ok(opened) => opened,
        Err(frame) => return farewell(&mut link, &frame).await,
    };
    greet(&mut link, &conn, &registered.entry);
    let session = Session::begin(Beginning {
        tracker: follow(&shared, &conn),
        known: conn.parameters.clone(),
        server: Server::new(conn, epoch),
        gate: gate.borrow_and_update().clone(),
        shared,
        registered,
        client: link,
        permits: client.permits,
    });
    tracing::debug!(session = %id, "session started");
    session.run(gate).await;
    tracing::debug!(session = %id, "session ended");
}

pub(super) fn frame_of(fields: &ErrorFields) -> Bytes {
    let mut out = BytesMut::new();
    fields.write_error(&mut out);
    out.freeze()
}

impl Session {
    pub(super) fn entry(&self) -> &Arc<Entry> {
        &self.registered.entry
    }

    pub(super) fn primary(&self) -> &Backend {
        &self.gate.topology.primary
    }

    pub(super) async fn run(mut self: Box<Self>, mut gate: watch::Receiver<GateState>) {
        self.show_instance();
        self.begin_meter();
        let end = loop {
            match self.until_event(&gate).await {
                Event::End(end) => break end,
                event => {
                    if let Err(end) = Box::pin(self.handle(event, &mut gate)).await {
                        break end;
                    }
                }
            }
        };
        Box::pin(self.end(end)).await;
    }

    async fn handle(
        &mut self,
        event: Event,
        gate: &mut watch::Receiver<GateState>,
    ) -> Result<(), End> {
        match event {
            Event::Gate => {
                self.gate = gate.borrow_and_update().clone();
                if self.shared.gate.ending() == Ending::Now {
                    return Err(self.ended_with_proxy());
                }
                self.gate_changed(gate).await
            }
            Event::Cancel => {
                if self.entry().cancel.swap(false, Ordering::SeqCst) {
                    self.cancel_waits = true;
                    self.forward_cancel();
                }
                self.asked_to_leave();
                self.asked_to_keep();
                self.asked_for_blueprint();
                Ok(())
            }
            Event::ServerLost => {
                self.server_lost();
                Ok(())
            }
            Event::Timer => self.timer(gate).await,
            Event::HandOver => self.hand_over().await,
            Event::End(end) => Err(end),
        }
    }

    /// Acknowledges the gate's step once the session stands as the phase asks.
    pub(super) fn acknowledge(&mut self) {
        let step = self.gate.step;
        if self.member.has_acknowledged(step) {
            return;
        }
        let quiet = self.tracker.is_between() && self.tracker.is_quiet() && self.asking.is_none();
        let stands = (quiet && !self.keeps_now()) || self.server.is_none();
        let yes = match self.gate.phase {
            Phase::Open => true,
            Phase::Hold => stands && self.tracker.status() == TxnStatus::Idle,
            Phase::Freeze | Phase::Cut | Phase::Still => stands,
            Phase::Gather => {
                let current = self.gate.topology.epoch;
                self.server.as_ref().is_none_or(|s| s.epoch >= current)
            }
            Phase::Turn if !self.entry().wants_turn.load(Ordering::Relaxed) => true,
            Phase::Turn | Phase::Replay => {
                self.rebuilt || self.stays || !self.must_rebuild() || self.is_left_behind()
            }
            Phase::Send => !self.rebuilt,
        };
        if yes {
            if self.gate.phase != Phase::Open {
                self.entry().set_state(4);
            }
            self.member.acknowledge(step);
        }
    }

    pub(super) fn show_instance(&self) {
        let mut shown = lock(&self.entry().shown);
        shown.instance = self.server.as_ref().map(|_| self.primary().name.clone());
    }

    async fn end(mut self: Box<Self>, end: End) {
        self.end_migration(&end);
        let frame = match end {
            End::ClientLeft => None,
            End::Fatal(fields) => Some(frame_of(&fields)),
            End::Forward(frame) => Some(frame.freeze()),
            // Nobody but the other process may say anything.
            End::HandedOver => return,
        };
        if let Some(frame) = frame {
            farewell(&mut self.client, &frame).await;
        }
        if let Some(mut server) = self.server.take() {
            // A statement that still runs would hold its locks: a client that vanishes cancels.
            if !self.tracker.is_between() && !self.commit_in_flight() {
                self.spawn_cancel(&server, false);
            }
            helios_wire::message::front::terminate(&mut server.link.output);
            let _ = tokio::time::timeout(Duration::from_secs(1), server.link.flush()).await;
        }
    }

    /// `holds`: nothing new is sent to this server until the request has been delivered.
    pub(super) fn spawn_cancel(&self, server: &Server, holds: bool) {
        let shared = Arc::clone(&self.shared);
        let entry = Arc::clone(self.entry());
        let (endpoint, pid, secret) = (server.endpoint.clone(), server.pid, server.secret.clone());
        entry.cancel_under_way.store(holds, Ordering::SeqCst);
        let waiting = std::mem::take(&mut *lock(&entry.cancelling));
        tokio::spawn(async move {
            let limit = shared.options.connect_timeout;
            if let Err(e) = backend::cancel(&endpoint, &shared.tls, pid, secret, limit).await {
                tracing::debug!(error = %e, "cancel request was not delivered");
            }
            drop(waiting);
            entry.cancel_under_way.store(false, Ordering::SeqCst);
            entry.bell.ring();
        });
    }

    /// Forwards the client's cancel request to where its statement runs now, when it is safe: never
    /// into a COMMIT (design rule 4), never into a question of our own.
    pub(super) fn forward_cancel(&mut self) {
        if self.tracker.is_between() {
            self.cancel_waits = false;
            lock(&self.entry().cancelling).clear();
            return;
        }
        if self.commit_in_flight() || self.tracker.expect().head_is_own() {
            return;
        }
        if let Some(server) = &self.server {
            self.cancel_waits = false;
            self.cancelled_by_client = true;
            self.spawn_cancel(server, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, B, F>(_: fn(A, B) -> F) -> usize {
        size_of::<F>()
    }

    /// A thousand idle sessions are a thousand of these.
    #[test]
    fn a_session_is_small() {
        assert!(size_of::<Session>() <= 2160, "{}", size_of::<Session>());
        assert!(size(serve) <= 8192, "{}", size(serve));
    }
}
