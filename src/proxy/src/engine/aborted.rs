//! Transactions of which nothing is run again: those that cannot be, and those that have failed.
//!
//! Touches the new backend, and the session that it is for. The invariant: the backend ends in a
//! failed block where the client's transaction was one, and the client is told of a failure once.

use std::collections::BTreeSet;

use helios_session::TxnStatus;
use helios_session::state::{Change, Prepared, Snapshot};
use helios_wire::message::back;

use super::answers::retryable;
use super::failing;
use super::rebuild::{Attempt, retry};
use super::replay::{self, ReplayError};
use super::session::{End, Server, Session};

impl Session {
    /// Whether the transaction has failed, as its client knows, and can only be rolled back: its
    /// locks are gone, so what it did must not be done again. Others hold them by now, and would be
    /// waited for.
    ///
    /// Where commits may have been lost, what it has read is compared all the same.
    pub(super) fn has_failed_for_good(&self) -> bool {
        let lossy = self.gate.topology.may_have_lost(self.epoch);
        !lossy && self.tracker.has_failed_for_good()
    }

    /// Says what is certain of a request whose server died between an error and its ReadyForQuery: it
    /// has failed, and what follows in it does not run. The server passes on the error first, gives up
    /// the transaction's locks, and is ready then (`PostgresMain` in `src/backend/tcop/postgres.c`),
    /// so others may hold these locks by now.
    pub(super) fn end_what_failed(&mut self) {
        let is_rerun = self.skip.is_some() || self.rerun.told || self.instead.is_some();
        let status = self.tracker.lacks_only_ready().filter(|_| !is_rerun);
        let Some(status) = status else {
            return;
        };
        let Some(server) = &mut self.server else {
            return;
        };
        // Bytes that are left are a part of a message: of this one, or of a notice in front of it.
        server.link.input.clear();
        back::ready_for_query(&mut server.link.input, status.byte());
        tracing::debug!(session = %self.entry().id, "failed, and not told that it is ready");
        if self.pump_server().is_err() {
            tracing::debug!(session = %self.entry().id, "what has failed cannot be ended");
        }
    }

    /// Puts the new backend where the client's transaction stands: into a failed block.
    pub(super) async fn fail_again(&mut self, mut server: Server) -> Result<(), Attempt> {
        let (state, prepared) = match self.restore_behind_abort(&mut server).await {
            Ok(restored) => restored,
            Err(e) if e.is_transient() => return Err(retry(e)),
            Err(e) => {
                self.give_up_locks(&e);
                self.forced = Some(e.to_string());
                return Err(retry(e));
            }
        };
        let mut next = self.tracker.successor(&prepared);
        let options = &self.shared.options;
        let failed = failing::begin_and_fail(&mut server.link, &self.tracker, &mut next, options);
        failed.await.map_err(retry)?;
        self.remember_in_flight()?;
        self.state = state;
        self.install(server, next);
        Ok(())
    }

    /// Restores what an abort leaves: the state as of BEGIN, and prepared statements as they are
    /// now, for PostgreSQL does not take those back. One that was made inside the transaction may
    /// need what is lost with it; that one is lost too. So may any, where temporary objects are lost.
    /// Returns the state, and those statements of
    /// the protocol, that are there.
    async fn restore_behind_abort(
        &self,
        server: &mut Server,
    ) -> Result<(Snapshot, Vec<(Vec<u8>, Prepared)>), ReplayError> {
        let now = self.tracker.prepared().now();
        let now = now.map(|(name, p)| (name.to_vec(), p.clone()));
        let (mut inside, mut there): (Vec<_>, Vec<_>) = now.partition(|(_, p)| p.made_inside);
        let mut state = self.state.clone();
        let mut made: Vec<(String, String)> = Vec::new();
        for change in self.tracker.changes() {
            state.give_up(&change);
            match change {
                Change::Prepared(name, text) => made.push((name, text)),
                Change::Deallocated(name) => made.retain(|(n, _)| *n != name),
                Change::AllDeallocated => made.clear(),
            }
        }
        if self.temporary_unkept().is_some() {
            made.splice(..0, std::mem::take(&mut state.prepared));
            inside.append(&mut there);
        }
        let nothing_later = BTreeSet::new();
        let makers = &self.shared.makers;
        let temporary = self.kept().map(|kept| (kept, &nothing_later, makers));
        let usable = self.temporary.is_none();
        let (link, restored) = (&mut server.link, (server.restored.as_deref(), usable));
        replay::restore(link, restored, &state, temporary, &there).await?;
        for one in made {
            let alone = Snapshot {
                prepared: vec![one.clone()],
                ..Snapshot::default()
            };
            if is_there(replay::restore(&mut server.link, (None, false), &alone, None, &[]).await)?
            {
                state.prepared.push(one);
            }
        }
        // The unnamed one last, as there.
        inside.sort_by_key(|(name, _)| name.is_empty());
        let nothing = Snapshot::default();
        for one in inside {
            let alone = std::slice::from_ref(&one);
            if is_there(
                replay::restore(&mut server.link, (None, false), &nothing, None, alone).await,
            )? {
                there.push(one);
            }
        }
        Ok((state, there))
    }

    /// The transaction (or state) is lost; the client is told as soon as it can be.
    pub(super) async fn abort(&mut self, mut server: Server, reason: &str) -> Result<(), Attempt> {
        let unkept = self.temporary_unkept();
        let fields = match &unkept {
            Some(why) if why != reason => retryable(&format!("{reason}; {why}")),
            _ => retryable(reason),
        };
        let (state, prepared) = match self.restore_behind_abort(&mut server).await {
            Ok(restored) => restored,
            Err(e) if self.give_up_locks(&e) => {
                self.forced = Some(format!("{reason}; {e}"));
                return Err(retry(e));
            }
            Err(e) if e.is_transient() => {
                self.forced = Some(reason.to_owned());
                return Err(retry(e));
            }
            // The rest may be had without its temporary objects.
            Err(e) if self.give_up_temporary(&e) => {
                self.forced = Some(reason.to_owned());
                return Err(retry(e));
            }
            Err(_) => return Err(Attempt::End(End::Fatal(fields))),
        };
        let mut next = self.tracker.successor(&prepared);
        if self.tracker.status() == TxnStatus::Idle {
            self.failed(&fields, "not protected");
            if self.tracker.is_between() {
                self.refuse = Some(fields);
            } else {
                self.answer_in_flight(&fields)?;
            }
        } else {
            failing::fail_transaction(&mut server.link)
                .await
                .map_err(retry)?;
            next.abandon(TxnStatus::Failed);
            self.remember_in_flight()?;
            self.give_up_transaction(fields);
        }
        self.state = state;
        self.state.immovable.clear();
        if unkept.is_some() {
            self.temporary = None;
        }
        self.install(server, next);
        self.show_protection();
        Ok(())
    }
}

/// Whether a statement could be prepared again.
fn is_there(restored: Result<(), ReplayError>) -> Result<bool, ReplayError> {
    match restored {
        Err(e) if e.is_transient() => Err(e),
        Err(e) => {
            tracing::debug!(error = %e, "a prepared statement is lost");
            Ok(false)
        }
        Ok(()) => Ok(true),
    }
}
