//! Temporary tables of a session: kept beside it while its backend lives, made again on the next.
//!
//! They are read by the session's own backend, nobody else could, while its client is idle, in front
//! of a transaction, or when a planned move stops the session. The invariant: what is made again is
//! what was there behind the last exchange that the journal does not hold; otherwise the session is
//! unprotected, and its client is told.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt as _;
use helios_api::protection::Unprotected;
use helios_session::keyword::{Hint, hint};
use helios_session::temporary::Objects;
use helios_session::tracker::until_zero;
use helios_session::{ReplayMode, TxnStatus};
use helios_wire::frontend;
use helios_wire::message::read;
use tokio::sync::{SemaphorePermit, oneshot, watch};
use tokio::time::Instant;

use super::asking::{Asking, Failure};
use super::gate::{GateState, Phase};
use super::kept::{Has, Kept, MAKERS, keep};
use super::later::{Later, jitter};
use super::lost::LastWords;
use super::rebuild::Attempt;
use super::registry::{Entry, lock};
use super::replay::ReplayError;
use super::session::{End, Server, Session};
use super::shared::Shared;

/// A client is idle for so long before its tables are read.
const IDLE: Duration = Duration::from_millis(50);

/// Reading the tables takes at most this part of a session's time, and [`AT_FIRST`].
const SHARE: u32 = 20;

/// What reading them may take beside: the first time takes most, for all objects are asked for.
const AT_FIRST: Duration = Duration::from_millis(250);

/// Tables that took longer to read are not read while a planned move holds everybody; and who reads
/// for longer holds up no other reader.
const LONG: Duration = Duration::from_secs(1);

/// Sessions whose tables are read side by side.
pub(super) const READERS: usize = 8;

/// Idle sessions that look for a backend side by side, behind a move.
pub(super) const RETURNING: usize = 2;

/// How long the preparation of a move waits for those who read.
const AHEAD: Duration = Duration::from_secs(10);

/// What only the backend of a session has: temporary objects, cursors WITH HOLD, the last values of
/// sequences.
#[derive(Debug)]
pub(super) struct Temporary {
    has: Has,
    kept: Option<Kept>,
    /// Number of the exchange behind which they were as they are kept.
    at: u64,
    /// Why they are not, as of that exchange.
    why: Option<(u64, String)>,
    /// When they are read, unless the client says something before.
    due: Instant,
    /// Since when there are any.
    since: Instant,
    /// How long reading them has taken, together and the last time.
    spent: Duration,
    took: Duration,
    /// They can be read where the backend is left afterwards.
    later: bool,
    /// They are to be read before the client's next message is sent.
    wanted: bool,
    /// When they are made again after a move, unless the client says something before.
    back: Option<Instant>,
    /// Dropped when they have been read: a move that is prepared waits for it.
    done: Option<oneshot::Sender<()>>,
    /// Those that the session goes on without, for now.
    pub(super) pending: Option<Later>,
    /// The same, of the backend that is being rebuilt.
    next: BTreeSet<usize>,
}

impl Default for Temporary {
    fn default() -> Self {
        Self {
            has: Has::default(),
            kept: None,
            at: 0,
            why: None,
            due: Instant::now() + IDLE,
            since: Instant::now(),
            spent: Duration::ZERO,
            took: Duration::ZERO,
            later: false,
            wanted: false,
            back: None,
            done: None,
            pending: None,
            next: BTreeSet::new(),
        }
    }
}

impl Temporary {
    /// What makes them again, as of whenever that was.
    pub(super) fn kept(&self) -> Option<&Kept> {
        self.kept.as_ref()
    }

    /// Groups of them are there again, behind exchange `now`; `reached`: a statement comes that may
    /// use them.
    pub(super) fn made(&mut self, groups: &BTreeSet<usize>, reached: bool, now: u64) {
        let Some(later) = &mut self.pending else {
            return;
        };
        let untouched = later.is_untouched();
        if !later.made(groups, reached) {
            return;
        }
        self.pending = None;
        match (untouched, &self.kept) {
            (true, _) => self.at = now,
            (false, Some(kept)) => kept.forget_rows(),
            (false, None) => {}
        }
    }

    /// How long to wait until reading them again has not taken too large a part of the time.
    fn debt(&self) -> Duration {
        let allowed = self.since.elapsed() / SHARE + AT_FIRST;
        self.spent.saturating_sub(allowed) * SHARE
    }
}

/// Has sessions read their temporary tables ahead of a planned move: what has not changed when it
/// stops them holds nobody up.
pub(crate) async fn keep_ahead(shared: &Shared) {
    let ask = |entry: Arc<Entry>| {
        let (done, read) = oneshot::channel::<()>();
        *lock(&entry.keep) = Some(done);
        entry.bell.ring();
        read
    };
    // A few at a time: whoever waits for its turn lets its client go on. One that takes long is waited
    // for behind the others.
    let slow = Mutex::new(Vec::new());
    let each = |entry| async {
        let mut read = ask(entry);
        if tokio::time::timeout(LONG, &mut read).await.is_err() {
            lock(&slow).push(read);
        }
    };
    let all = async {
        futures_util::stream::iter(shared.registry.all())
            .for_each_concurrent(READERS, each)
            .await;
        let slow = std::mem::take(&mut *lock(&slow));
        futures_util::future::join_all(slow).await;
    };
    let _ = tokio::time::timeout(AHEAD, all).await;
}

impl Session {
    /// The session has so much that only its backend has, or has none any more.
    pub(super) fn has_own(&mut self, mut has: Has) {
        has.last_values = self.tracker.asks_last_values();
        // Of what is not there yet the server knows nothing.
        has.objects |= self.temporary.as_ref().is_some_and(|t| t.pending.is_some());
        self.registered.owns(has.objects);
        match has == Has::default() {
            true => self.temporary = None,
            false => self.temporary.get_or_insert_default().has = has,
        }
    }

    /// An exchange of the client's is answered: what is kept may be out of date.
    pub(super) fn temporary_used(&mut self) {
        if self.tracker.asks_last_values() {
            self.temporary.get_or_insert_default().has.last_values = true;
        }
        let (status, now) = (self.tracker.status(), self.tracker.sequence());
        if let Some(temporary) = &mut self.temporary {
            temporary.due = Instant::now() + IDLE.max(temporary.debt());
            if let Some(later) = &mut temporary.pending {
                later.used();
                // It has reached nothing of what was kept.
                if later.is_untouched() && status == TxnStatus::Idle {
                    temporary.at = now;
                }
            }
        }
    }

    /// These groups are not there on the backend that the session goes on with.
    pub(super) fn make_rest_later(&mut self, groups: BTreeSet<usize>) {
        if let Some(temporary) = &mut self.temporary {
            temporary.next = groups;
        }
    }

    /// What makes the temporary objects again, as they were when the open transaction began.
    pub(super) fn kept(&self) -> Option<&Kept> {
        let temporary = self.temporary.as_ref()?;
        let covers = self.tracker.covers_since(temporary.at);
        temporary.kept.as_ref().filter(|_| covers)
    }

    /// What would be lost with the backend. Last values of sequences are not lost in silence: they
    /// are undefined then.
    pub(super) fn own_unkept(&self) -> Option<Unprotected> {
        let has = self.temporary.as_ref()?.has;
        let lost = match has {
            Has { objects: true, .. } => Unprotected::TemporaryObject,
            Has { cursors: true, .. } => Unprotected::CursorWithHold,
            _ => return None,
        };
        self.kept().is_none().then_some(lost)
    }

    /// Why they would be lost with the backend.
    pub(super) fn temporary_unkept(&self) -> Option<String> {
        let lost = self.own_unkept()?;
        let why = self.temporary.as_ref()?.why.as_ref();
        let why = why.map_or("changed since they were read", |(_, why)| why.as_str());
        Some(format!("{}: {why}", lost.text()))
    }

    /// They cannot be made again. False when they were given up before.
    pub(super) fn give_up_temporary(&mut self, error: &ReplayError) -> bool {
        let now = self.tracker.sequence();
        let kept = |t: &mut Box<Temporary>| {
            t.why = Some((now, error.to_string()));
            (t.pending, t.next) = (None, BTreeSet::new());
            t.kept.take().is_some()
        };
        self.temporary.as_mut().is_some_and(kept)
    }

    /// The backend that the session goes on with has what was kept, where that was `restored`, and
    /// the journal begins anew.
    pub(super) fn temporary_installed(&mut self, restored: bool) {
        if let Some(temporary) = &mut self.temporary {
            // What was out of date is not what the new backend has.
            temporary.kept.take_if(|_| !restored);
            temporary.at = 0;
            temporary.why = None;
            temporary.back = None;
            let after = self.shared.make_later_after();
            temporary.pending = Later::new(std::mem::take(&mut temporary.next), after);
        }
    }

    /// A move has left an idle session without a backend: its tables are made again before its client
    /// asks for them, when nobody else waits for that.
    pub(super) fn comes_back(&mut self) {
        if let Some(temporary) = &mut self.temporary {
            temporary.back = Some(Instant::now() + jitter(self.shared.make_later_after()));
        }
    }

    /// When that is to be looked at.
    pub(super) fn back_at(&self) -> Option<Instant> {
        let temporary = self.temporary.as_ref()?;
        let idle = self.server.is_none() && self.gate.phase == Phase::Open && self.lost.is_none();
        temporary.back.filter(|_| idle)
    }

    /// Makes them again, or puts it off. Should it fail, the client's next statement finds out why.
    pub(super) async fn come_back(&mut self, gate: &watch::Receiver<GateState>) -> Result<(), End> {
        let shared = Arc::clone(&self.shared);
        // Sessions whose clients wait come first.
        let turn = shared.returning.try_acquire().ok();
        let busy = turn.is_none() || shared.makers.available_permits() < MAKERS / 2;
        if let Some(temporary) = &mut self.temporary {
            temporary.back = busy.then(|| Instant::now() + jitter(shared.make_later_after()));
        }
        if busy {
            return Ok(());
        }
        match self.attempt(gate).await {
            Err(Attempt::End(end)) => Err(end),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Whether they could be read now, and it is not known that it would be in vain.
    fn may_keep(&self, temporary: &Temporary) -> bool {
        let Some(Server { link, .. }) = &self.server else {
            return false;
        };
        let stands = self.tracker.status() == TxnStatus::Idle
            && self.tracker.is_between()
            && self.tracker.is_quiet()
            && self.asking.is_none()
            && !self.state_due;
        let now = self.tracker.sequence();
        let again = temporary.later && self.gate.phase != Phase::Open;
        let tried = !again && temporary.why.as_ref().is_some_and(|(at, _)| *at == now);
        let fresh = temporary.kept.is_some() && temporary.at == now;
        let quiet = link.input.is_empty() && link.output.is_empty() && !link.ended;
        let moves = self.tracker.mode() != ReplayMode::None;
        moves && stands && quiet && !tried && !fresh && self.resend.is_none() && !self.rebuilt
    }

    /// When they are to be read, if they are.
    pub(super) fn keeps_at(&self) -> Option<Instant> {
        let temporary = self.temporary.as_ref()?;
        if !self.may_keep(temporary) {
            return None;
        }
        match self.gate.phase {
            Phase::Open if temporary.wanted => Some(Instant::now()),
            // They are made first.
            Phase::Open if temporary.pending.is_some() => None,
            Phase::Open => Some(temporary.due),
            Phase::Hold | Phase::Freeze | Phase::Cut | Phase::Still => {
                let long = temporary.took > LONG;
                (!long).then(Instant::now)
            }
            Phase::Gather | Phase::Turn | Phase::Replay | Phase::Send => None,
        }
    }

    /// Whether they are to be read now.
    pub(super) fn keeps_now(&self) -> bool {
        self.temporary.is_some() && self.keeps_at().is_some_and(|at| at <= Instant::now())
    }

    /// Whether they are to be read before this message is sent: it begins a transaction, which would
    /// be unprotected as a whole.
    pub(super) fn keeps_before(&mut self, tag: u8, have: usize) -> bool {
        let Some(temporary) = &self.temporary else {
            return false;
        };
        let affordable = temporary.debt().is_zero();
        let body = self.client.input.get(5..have).unwrap_or_default();
        let begins = match tag {
            frontend::QUERY => hint(until_zero(body)) == Hint::Begin,
            frontend::PARSE => {
                let text = body.iter().position(|b| *b == 0).map_or(0, |at| at + 1);
                hint(until_zero(body.get(text..).unwrap_or_default())) == Hint::Begin
            }
            frontend::BIND => {
                let names = read::bind_names(body).ok();
                let known = names.and_then(|(_, n)| self.tracker.prepared().get(n));
                known.is_some_and(|p| p.hint == Hint::Begin)
            }
            _ => false,
        };
        if !begins || !affordable || self.gate.phase != Phase::Open || !self.may_keep(temporary) {
            return false;
        }
        if let Some(temporary) = &mut self.temporary {
            temporary.wanted = true;
        }
        true
    }

    /// Reads them ahead of a planned move, if one asks for it and they can be read now.
    pub(super) fn asked_to_keep(&mut self) {
        let Some(done) = lock(&self.entry().keep).take() else {
            return;
        };
        let may = self.temporary.as_ref().is_some_and(|t| self.may_keep(t));
        if let Some(temporary) = self.temporary.as_mut().filter(|_| may) {
            temporary.wanted = true;
            temporary.done = Some(done);
        }
    }

    /// A turn to read, which few have at a time: a thousand that read side by side would all take
    /// long. Waited for where somebody waits for the tables; else the client goes on meanwhile.
    async fn turn_to_keep<'a>(
        &mut self,
        shared: &'a Shared,
        gate: &watch::Receiver<GateState>,
    ) -> Option<SemaphorePermit<'a>> {
        let temporary = self.temporary.as_mut()?;
        let patient = self.gate.phase == Phase::Open && !temporary.wanted;
        // Clients wait for those whose tables are being made again.
        let busy = patient && shared.makers.available_permits() == 0;
        if !busy && let Ok(turn) = shared.readers.try_acquire() {
            return Some(turn);
        }
        if patient {
            temporary.due = Instant::now() + IDLE;
            return None;
        }
        let mut watch = gate.clone();
        tokio::select! {
            biased;
            turn = shared.readers.acquire() => turn.ok(),
            _ = watch.changed() => None,
        }
    }

    /// Reads the temporary objects. Nothing else of the session goes on meanwhile.
    pub(super) async fn keep_temporary(&mut self, gate: &watch::Receiver<GateState>) {
        if !self.make_all(gate).await || !self.keeps_now() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let Some(turn) = self.turn_to_keep(&shared, gate).await else {
            return;
        };
        let give_up_turn = async {
            tokio::time::sleep(LONG).await;
            drop(turn);
            std::future::pending::<Infallible>().await
        };
        let Some(server) = self.server.as_mut() else {
            return;
        };
        let Some(mut temporary) = self.temporary.take() else {
            return;
        };
        let began = Instant::now();
        let (now, epoch) = (self.tracker.sequence(), self.gate.topology.epoch);
        let seen = self.tracker.temporary();
        let mut asking = Asking {
            link: &mut server.link,
            client: &mut self.client.output,
        };
        let objects = |rows: &[Vec<Option<String>>]| Objects::from_rows(rows, seen);
        let last = temporary.kept.take();
        let good = self.gate.phase != Phase::Open;
        let mut watch = gate.clone();
        let gone = watch.wait_for(|g| g.topology.epoch != epoch || g.phase >= Phase::Gather);
        let result = tokio::select! {
            biased;
            result = keep(&mut asking, &shared, temporary.has, (last, good), objects) => result,
            _ = gone => Err(Failure::Gone(None)),
            never = give_up_turn => match never {},
        };
        temporary.took = began.elapsed();
        temporary.spent += temporary.took;
        temporary.wanted = false;
        let done = temporary.done.take();
        temporary.why = None;
        temporary.later = matches!(result, Err(Failure::Later(_)));
        let mut used_up = false;
        let gone = match result {
            Ok(kept) => {
                used_up = kept.used_up();
                (temporary.kept, temporary.at) = (Some(kept), now);
                None
            }
            Err(Failure::Not(why) | Failure::Later(why)) => {
                temporary.why = Some((now, why));
                None
            }
            Err(Failure::Gone(words)) => Some(words),
        };
        tracing::debug!(session = %self.entry().id, why = ?temporary.why, took = ?began.elapsed(),
            lost = gone.is_some(), "temporary tables were read");
        self.temporary = Some(temporary);
        if let Some(words) = gone {
            self.last_words = words.map(|frame| LastWords::new(&frame, &self.shared));
            self.server_lost();
        }
        if used_up {
            self.leave_used_up();
        }
        self.show_protection();
        drop(done);
    }
}
