//! Temporary objects that are not there yet behind a move, and when they are made.
//!
//! A thousand sessions that make theirs again at once keep the server busy for many seconds, while
//! their clients wait. So a session goes on without, and a statement waits for those that it may
//! reach; the others are made in the background, when no client waits for any. The invariant: no
//! statement runs that could reach an object which is not there, and as long as nobody has reached
//! any, what was kept is what is restored at the next move.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use helios_session::TxnStatus;
use helios_session::needs::{Needs, to_prepare, to_run};
use helios_session::state::Prepared;
use helios_session::tracker::until_zero;
use helios_wire::{frontend, peek_header};
use tokio::sync::{SemaphorePermit, watch};
use tokio::time::Instant;

use super::asking::{Asking, Failure};
use super::gate::{GateState, Phase};
use super::kept::{Kept, MAKERS, note_state};
use super::link::Link;
use super::lost::LastWords;
use super::making::{make, words_of};
use super::reach;
use super::replay::ReplayError;
use super::session::{Event, Session};

/// Groups that are made together in the background, where all rows of the session are [`SMALL`]: they
/// need one transaction, and a client that comes meanwhile waits for milliseconds.
const TOGETHER: usize = 4;

/// Bytes of rows that take no time.
const SMALL: usize = 64 << 10;

/// Objects that are still to be made.
#[derive(Debug)]
pub(super) struct Later {
    groups: BTreeSet<usize>,
    /// Some that were made have been in a statement's reach: what is kept is out of date.
    touched: bool,
    /// The client's next exchange waits to be looked at.
    wanted: bool,
    /// It has all that it may reach.
    checked: bool,
    /// When the next are made in the background.
    due: Instant,
}

/// What the client's next message waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Awaits {
    Nothing,
    /// The end of what is in flight.
    Others,
    /// Temporary objects, perhaps.
    Objects,
}

impl Awaits {
    /// What becomes of the message meanwhile.
    pub(super) fn outcome(self) -> Result<(), Event> {
        match self {
            Self::Nothing | Self::Others => Ok(()),
            Self::Objects => Err(Event::Timer),
        }
    }
}

/// Not all at the same time.
pub(super) fn jitter(time: Duration) -> Duration {
    time + time.mul_f64(rand::random::<f64>())
}

impl Later {
    pub(super) fn new(groups: BTreeSet<usize>, after: Duration) -> Option<Self> {
        (!groups.is_empty()).then(|| Self {
            groups,
            touched: false,
            wanted: false,
            checked: false,
            due: Instant::now() + jitter(after),
        })
    }

    /// Whether what is kept is what would be there.
    pub(super) fn is_untouched(&self) -> bool {
        !self.touched
    }

    /// These groups are there; whether those were the last.
    pub(super) fn made(&mut self, groups: &BTreeSet<usize>, reached: bool) -> bool {
        self.groups.retain(|group| !groups.contains(group));
        self.touched |= reached && !groups.is_empty();
        self.groups.is_empty()
    }

    /// An exchange is answered.
    pub(super) fn used(&mut self) {
        self.checked = false;
    }
}

/// What a message of the client's needs; `parsed` are the statements prepared in this exchange.
fn needs_of<'a>(session: &Session, tag: u8, body: &'a [u8], parsed: &mut Vec<&'a [u8]>) -> Needs {
    let text = |bytes: &[u8], needs: fn(&str) -> Needs| match std::str::from_utf8(bytes) {
        Ok(sql) => needs(sql),
        Err(_) => Needs::Everything,
    };
    let prepared = |name: &[u8], needs: fn(&str) -> Needs| {
        let known = session.tracker.prepared_text(name);
        known.map_or(Needs::Everything, |sql| text(sql, needs))
    };
    let first = until_zero(body);
    let second = until_zero(body.get(first.len() + 1..).unwrap_or_default());
    match tag {
        frontend::QUERY => text(first, to_run),
        frontend::PARSE => {
            parsed.push(first);
            text(second, to_run)
        }
        frontend::BIND if parsed.contains(&second) => Needs::nothing(),
        frontend::BIND => prepared(second, to_run),
        frontend::DESCRIBE => match first.split_first() {
            Some((b'S', name)) if !parsed.contains(&name) => prepared(name, to_prepare),
            _ => Needs::nothing(),
        },
        frontend::EXECUTE | frontend::CLOSE | frontend::FLUSH | frontend::SYNC => Needs::nothing(),
        _ => Needs::Everything,
    }
}

impl Session {
    /// Whether the client's next message has to wait for what is not there yet.
    pub(super) fn awaits_objects(&mut self) -> Awaits {
        let boundary = self.tracker.at_boundary();
        let read = |server: &super::session::Server| server.link.input.is_empty();
        let alone = self.tracker.is_between()
            && self.tracker.is_quiet()
            && self.server.as_ref().is_some_and(read);
        let Some(later) = self.temporary.as_mut().and_then(|t| t.pending.as_mut()) else {
            return Awaits::Nothing;
        };
        if !boundary {
            return Awaits::Nothing;
        }
        if !alone {
            return Awaits::Others;
        }
        if later.checked {
            return Awaits::Nothing;
        }
        later.wanted = true;
        Awaits::Objects
    }

    /// What the client's next exchange needs; everything where it has not come as a whole.
    fn front_needs(&self) -> Needs {
        let mut rest = &self.client.input[..];
        let (mut needs, mut parsed) = (Needs::nothing(), Vec::new());
        loop {
            let Ok(Some(header)) = peek_header(rest) else {
                return Needs::Everything;
            };
            let Some((frame, tail)) = rest.split_at_checked(header.len) else {
                return Needs::Everything;
            };
            rest = tail;
            let body = frame.get(5..).unwrap_or_default();
            needs = needs.and(needs_of(self, header.tag, body, &mut parsed));
            let ends = matches!(header.tag, frontend::QUERY | frontend::SYNC);
            if ends || needs == Needs::Everything {
                return needs;
            }
        }
    }

    /// Groups of what is kept that these prepared statements name: it is looked up when they are
    /// prepared again. `None`: they may name anything.
    fn named_by(&self, kept: &Kept, prepared: &[(Vec<u8>, Prepared)]) -> Option<BTreeSet<usize>> {
        let mut needs = Needs::nothing();
        for (_, statement) in prepared {
            let body = statement.parse.get(5..).unwrap_or_default();
            let name = until_zero(body).len();
            let text = until_zero(body.get(name + 1..).unwrap_or_default());
            needs = needs.and(to_prepare(std::str::from_utf8(text).ok()?));
        }
        for (_, sql) in &self.state.prepared {
            needs = needs.and(to_prepare(sql));
        }
        match needs {
            Needs::Named(words) => kept.groups().named(&words),
            Needs::Everything => None,
        }
    }

    /// Whether these statements can be prepared before the temporary objects are there.
    pub(super) fn name_no_objects(&self, prepared: &[(Vec<u8>, Prepared)]) -> bool {
        match (&self.temporary, self.kept()) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(_), Some(kept)) => self
                .named_by(kept, prepared)
                .is_some_and(|named| named.is_empty()),
        }
    }

    /// Groups of what is kept that a session in this state can go on without.
    pub(super) fn can_wait(&self, prepared: &[(Vec<u8>, Prepared)]) -> BTreeSet<usize> {
        let outside = self.tracker.status() == TxnStatus::Idle;
        let named = |kept| self.named_by(kept, prepared);
        match self.kept().filter(|kept| outside && kept.may_wait()) {
            Some(kept) => match named(kept) {
                Some(named) => {
                    let groups = kept.groups();
                    let now = |g: &usize| named.contains(g) || groups.first().contains(g);
                    (0..groups.len()).filter(|group| !now(group)).collect()
                }
                None => BTreeSet::new(),
            },
            None => BTreeSet::new(),
        }
    }

    /// When the session makes something in the background.
    pub(super) fn later_at(&self) -> Option<Instant> {
        let later = self.temporary.as_ref()?.pending.as_ref()?;
        let stands = self.tracker.status() == TxnStatus::Idle
            && self.tracker.is_between()
            && self.tracker.is_quiet()
            && self.asking.is_none()
            && !self.state_due
            && self.resend.is_none()
            && !self.rebuilt;
        let quiet = |link: &Link| link.input.is_empty() && link.output.is_empty() && !link.ended;
        let there = self.server.as_ref().is_some_and(|s| quiet(&s.link));
        let open = self.gate.phase == Phase::Open;
        (stands && there && open).then_some(later.due)
    }

    /// Whether something is to be made now.
    pub(super) fn makes_now(&self) -> bool {
        let later = self.temporary.as_ref().and_then(|t| t.pending.as_ref());
        later.is_some_and(|l| l.wanted) || self.later_at().is_some_and(|at| at <= Instant::now())
    }

    /// Makes what the client's next exchange may reach, or something in the background.
    pub(super) async fn make_later(&mut self, gate: &watch::Receiver<GateState>) {
        let Some(later) = self.temporary.as_ref().and_then(|t| t.pending.as_ref()) else {
            return;
        };
        let (wanted, all) = (later.wanted, later.groups.clone());
        if wanted {
            let reached = self.reached(all).await;
            let there = self.make_objects(gate, reached, true).await;
            // If they are not there, the message is looked at anew when it may be sent.
            if let Some(later) = self.temporary.as_mut().and_then(|t| t.pending.as_mut()) {
                (later.wanted, later.checked) = (false, there);
            }
            return;
        }
        let kept = self.temporary.as_ref().and_then(|t| t.kept());
        let small = kept.is_some_and(|kept| kept.size() <= SMALL);
        let next = all.into_iter().take(if small { TOGETHER } else { 1 });
        self.make_objects(gate, next.collect(), false).await;
        if let Some(later) = self.temporary.as_mut().and_then(|t| t.pending.as_mut()) {
            later.due = Instant::now() + jitter(self.shared.make_later_after());
        }
    }

    /// Which of these groups the client's next exchange may reach.
    async fn reached(&self, all: BTreeSet<usize>) -> BTreeSet<usize> {
        let Some(kept) = self.temporary.as_ref().and_then(|t| t.kept()) else {
            return all;
        };
        let Needs::Named(words) = self.front_needs() else {
            return all;
        };
        let Some(named) = kept.groups().named(&words) else {
            return all;
        };
        let made = words_of(kept, &named);
        let topology = Arc::clone(&self.gate.topology);
        let database = &self.entry().login.database;
        let proven = reach::by_name_alone(&self.shared, &topology, database, &words, &made).await;
        tracing::trace!(session = %self.entry().id, ?words, ?named, ?proven, "what a statement reaches");
        match proven {
            Ok(true) => named.intersection(&all).copied().collect(),
            Ok(false) | Err(_) => all,
        }
    }

    /// Makes all that is not there. False when it is not to be had now.
    pub(super) async fn make_all(&mut self, gate: &watch::Receiver<GateState>) -> bool {
        let later = self.temporary.as_ref().and_then(|t| t.pending.as_ref());
        let groups = later.map(|l| l.groups.clone()).unwrap_or_default();
        self.make_objects(gate, groups, true).await
    }

    /// Makes groups of objects; for a client that waits, or else if nobody waits for any. True when
    /// they are there.
    async fn make_objects(
        &mut self,
        gate: &watch::Receiver<GateState>,
        groups: BTreeSet<usize>,
        waits: bool,
    ) -> bool {
        if groups.is_empty() {
            return true;
        }
        let shared = Arc::clone(&self.shared);
        let Some(_turn) = turn(&shared.makers, gate, waits).await else {
            return false;
        };
        let Some(server) = self.server.as_mut() else {
            return false;
        };
        let Some(mut temporary) = self.temporary.take() else {
            return false;
        };
        let began = Instant::now();
        let epoch = self.gate.topology.epoch;
        let mut watch = gate.clone();
        let gone = watch.wait_for(|g| g.topology.epoch != epoch || g.phase >= Phase::Replay);
        let (link, client) = (&mut server.link, &mut self.client.output);
        let unnamed = self.tracker.prepared().get(b"").map(|p| &*p.parse);
        let making = async {
            let kept = temporary.kept().ok_or(Failure::Gone(None))?;
            let mut asking = Asking { link, client };
            make(&mut asking, kept, &groups, Some(unnamed)).await?;
            let later = temporary.pending.as_ref();
            // The last of them: rows may have changed where somebody has reached some, objects have
            // not, because what changes them waits for all.
            let Some(later) = later.filter(|l| l.groups.is_subset(&groups)) else {
                return Ok(());
            };
            match note_state(&mut asking, kept).await {
                // Where it is read again in any case, all of it is.
                Err(Failure::Not(_) | Failure::Later(_)) if !later.is_untouched() => Ok(()),
                noted => noted,
            }
        };
        let result = tokio::select! {
            biased;
            result = making => result,
            _ = gone => Err(Failure::Gone(None)),
        };
        let result = result.map(|()| temporary.made(&groups, waits, self.tracker.sequence()));
        self.temporary = Some(temporary);
        tracing::debug!(session = %self.entry().id, ?groups, waits, took = ?began.elapsed(),
            ok = result.is_ok(), "temporary objects were made again");
        match result {
            Ok(()) => {
                self.show_protection();
                true
            }
            Err(error) => {
                self.not_made(error);
                false
            }
        }
    }

    /// What was to be made is not there, and the backend is left.
    fn not_made(&mut self, failure: Failure) {
        match failure {
            Failure::Gone(words) => {
                self.last_words = words.map(|frame| LastWords::new(&frame, &self.shared));
            }
            Failure::Not(why) | Failure::Later(why) => {
                self.give_up_temporary(&ReplayError::State(why));
            }
        }
        if let Some(temporary) = &mut self.temporary {
            temporary.pending = None;
        }
        self.server_lost();
        self.show_protection();
    }
}

/// A turn to make objects; `None` when the gate has changed, or somebody waits for one.
async fn turn<'a>(
    makers: &'a tokio::sync::Semaphore,
    gate: &watch::Receiver<GateState>,
    waits: bool,
) -> Option<SemaphorePermit<'a>> {
    if !waits {
        let free = makers.available_permits() == MAKERS;
        return makers.try_acquire().ok().filter(|_| free);
    }
    let mut watch = gate.clone();
    tokio::select! {
        biased;
        turn = makers.acquire() => turn.ok(),
        _ = watch.changed() => None,
    }
}
