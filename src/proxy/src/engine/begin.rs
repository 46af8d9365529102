//! Where a session begins: outside a transaction, with nothing under way.

use std::collections::BTreeMap;
use std::sync::Arc;

use helios_session::state::Snapshot;
use helios_session::tracker::Tracker;
use tokio::time::Instant;

use super::events::{Moving, Noted};
use super::gate::GateState;
use super::link::Link;
use super::registry::Registered;
use super::session::{OldBackend, Rerun, Server, Session};
use super::shared::Shared;
use super::tables::Rows;

/// A session's places among all connections and among its user's.
pub(super) type Permits = (
    crate::listener::ConnectionPermit,
    crate::listener::UserPermit,
);

/// What a session begins with.
pub(super) struct Beginning {
    pub(super) shared: Arc<Shared>,
    pub(super) registered: Registered,
    pub(super) gate: GateState,
    pub(super) client: Link,
    pub(super) server: Server,
    pub(super) tracker: Tracker,
    pub(super) known: BTreeMap<String, String>,
    pub(super) permits: Permits,
}

impl Session {
    /// A session on this backend.
    pub(super) fn begin(from: Beginning) -> Box<Self> {
        let Beginning {
            shared,
            registered,
            gate,
            client,
            server,
            tracker,
            known,
            permits,
        } = from;
        let epoch = server.epoch;
        Box::new(Self {
            old: OldBackend::at(server.pid, &server.endpoint),
            server: Some(server),
            timeline: gate.topology.timeline,
            room: shared.room(),
            member: shared.gate.join(Arc::clone(&registered.entry.bell)),
            tracker,
            known,
            gate,
            shared,
            registered,
            client,
            state: Snapshot::default(),
            temporary: None,
            asking: None,
            skip: None,
            rerun: Rerun::default(),
            instead: None,
            refuse: None,
            discarding: false,
            last_words: None,
            epoch,
            lost: None,
            attempts: 0,
            heard: false,
            idle: false,
            held_since: None,
            resend: None,
            resend_left: 0,
            rebuilt: false,
            domain_due: false,
            one_by_one: false,
            late: false,
            stays: false,
            cancel_waits: false,
            cut: false,
            cancelled_by_client: false,
            dropping_rest: false,
            state_due: false,
            forced: None,
            timer_at: None,
            retry_at: None,
            awaited: false,
            last_activity: Instant::now(),
            shown_epoch: epoch,
            noted: Noted::default(),
            moving: Moving::No,
            rows: Rows::default(),
            replayed: 0,
            _permits: permits,
        })
    }
}
