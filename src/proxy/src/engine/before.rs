//! What is left of a session's last backend, and of the server that it ran on.
//!
//! Asks the new server, on the session's backend or on a connection of the proxy's own. The
//! invariant: what the old backend did is not resolved or run again while it may still do more.

use std::time::Duration;

use helios_api::control::Topology;

use super::gate::Phase;
use super::monitor::STARTED;
use super::rebuild::Attempt;
use super::registry::lock;
use super::replay;
use super::session::{Server, Session};
use crate::backend;

impl Session {
    /// The session is not to go on with a server that was started after its last backend was.
    pub(super) async fn check_restart(&mut self, server: &mut Server) -> Result<(), Attempt> {
        if self.has_restarted(server).await? {
            self.begin_migration();
            return Err(Attempt::End(self.disconnect()));
        }
        Ok(())
    }

    /// A server that was started again, found while the gate is open: whoever goes on there now takes
    /// locks that others, which come behind the gate, held before, and waits for theirs. All are about
    /// to be told of it; then this attempt is void.
    /// Further attempts do not wait once more.
    pub(super) async fn await_the_others(&mut self, server: &mut Server) -> Result<(), Attempt> {
        let patience = self.shared.options.restart_patience;
        if self.gate.phase != Phase::Open || patience.is_zero() || self.awaited {
            return Ok(());
        }
        if self.has_restarted(server).await? {
            tokio::time::sleep(patience).await;
            self.awaited = true;
        }
        Ok(())
    }

    /// Whether the server has started later than the session's last backend.
    pub(super) async fn has_restarted(&self, server: &mut Server) -> Result<bool, Attempt> {
        let since = lock(&self.entry().identity).since;
        let sql = "SELECT pg_catalog.trunc(extract(epoch FROM pg_catalog.clock_timestamp() \
             OPERATOR(pg_catalog.-) pg_catalog.pg_postmaster_start_time()) \
             OPERATOR(pg_catalog.*) 1000000)";
        let rows = replay::simple(&mut server.link, sql).await;
        let rows = rows.map_err(|e| Attempt::Retry(e.to_string()))?;
        let age = rows.first().and_then(|row| row.first()).cloned().flatten();
        let age: u64 = age.and_then(|text| text.parse().ok()).unwrap_or(u64::MAX);
        Ok(age < self.shared.now_micros().saturating_sub(since))
    }

    /// The connection broke, and its server is the primary: the old backend may live. It is
    /// terminated and waited for, before anything of it is resolved or run again (design rule 4).
    pub(super) async fn end_old_backend(&mut self, topology: &Topology) -> Result<(), Attempt> {
        let Some(pid) = self.old.as_ref().map(|old| old.pid) else {
            return Ok(());
        };
        let shared = std::sync::Arc::clone(&self.shared);
        let limit = shared.options.connect_timeout;
        let at = &topology.primary.endpoint;
        let conn = backend::connect(at, &shared.tls, &shared.service, limit)
            .await
            .map_err(|e| Attempt::Retry(e.to_string()))?;
        let mut service = Server::new(conn, topology.epoch);
        let user = helios_session::state::literal(&self.entry().login.user);
        let mut sql = format!(
            "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
             WHERE pid = {pid} AND usename = {user}"
        );
        // Another one with the same process id is none of ours.
        let identity = lock(&self.entry().identity).clone();
        if identity.pid == pid
            && let Some(started) = identity.started
        {
            let started = helios_session::state::literal(&started);
            sql.push_str(&format!(" AND {STARTED} = {started}"));
        }
        for _ in 0..500 {
            let rows = replay::simple(&mut service.link, &sql)
                .await
                .map_err(|e| Attempt::Retry(e.to_string()))?;
            if rows.is_empty() {
                self.old = None;
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(Attempt::Retry("the old backend does not end".into()))
    }
}
