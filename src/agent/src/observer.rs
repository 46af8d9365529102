//! Watches one run of the postmaster over SQL and reports what the instance is.
//!
//! Holds two connections from the moment the server accepts them: one for its own questions, one
//! for commands, so that neither waits for the other and a promotion needs no login.

use std::sync::Arc;
use std::time::Duration;

use helios_api::agent::{InstanceState, StandbyPosition};
use helios_api::{Endpoint, Timeline};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::AgentConfig;
use crate::hub::{Hub, Run};
use crate::lease::Lease;
use crate::postmaster::trim_log;
use crate::promote;
use crate::sql::{self, Row, SqlError};

/// How often the instance is asked when nothing happens.
const INTERVAL: Duration = Duration::from_millis(200);
/// How often a connection is tried while the server starts.
const CONNECT_INTERVAL: Duration = Duration::from_millis(10);
/// Silence after which the instance is called unresponsive, the pause between questions included.
const SILENCE: Duration = Duration::from_millis(950);
/// Silence after which the connection is given up for a new one.
const GIVE_UP: Duration = Duration::from_secs(10);
/// `statement_timeout` of the connections.
const STATEMENT_LIMIT: Duration = Duration::from_secs(5);
/// A running server's log is set aside past this size.
const LOG_LIMIT: u64 = 64 << 20;

/// Role, timeline and positions in one row, the standbys in the rows after it. Planned once: this
/// is asked five times a second, and in the middle of every move.
const PREPARE: &str = "\
set synchronous_commit = local;
prepare standing as
select pg_is_in_recovery(),
       case when pg_is_in_recovery() then
         (select greatest(c.timeline_id, r.min_recovery_end_timeline,
                          (select received_tli from pg_stat_get_wal_receiver()))
          from pg_control_checkpoint() c, pg_control_recovery() r)
       else ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int end,
       case when pg_is_in_recovery() then
         greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())
       else pg_current_wal_flush_lsn() end,
       pg_last_wal_replay_lsn(),
       (select (extract(epoch from clock_timestamp() - last_msg_receipt_time) * 1000)::bigint
        from pg_stat_get_wal_receiver() where status = 'streaming');
prepare standbys as
select application_name, flush_lsn, sync_state in ('sync', 'quorum')
from pg_stat_replication where state = 'streaming' and flush_lsn is not null
order by application_name";

/// A record of its own, flushed here and waited for by nobody.
const PROOF: &str = "select pg_logical_emit_message(true, 'helios.lease', '')";
/// How long it may take; what comes later is not waited for.
const PROOF_LIMIT: Duration = Duration::from_secs(1);

const QUESTION: &str = "execute standing; execute standbys";

/// Watches one run.
#[derive(Debug)]
pub(crate) struct Observer {
    pub(crate) config: Arc<AgentConfig>,
    pub(crate) hub: Hub,
    pub(crate) lease: Lease,
    pub(crate) run: Run,
    pub(crate) client: watch::Sender<Option<Arc<Client>>>,
    pub(crate) poke: Arc<Notify>,
}

impl Observer {
    /// Watches until it is dropped.
    pub(crate) async fn watch(self) {
        // Before its first answer a server is starting, not silent.
        let mut silence = None;
        loop {
            let (probe, command) = self.connect(&mut silence).await;
            let command_closed = Arc::clone(&command);
            self.client.send_replace(Some(command));
            let silence = silence.get_or_insert_with(Silence::new);
            self.ask(&probe, &command_closed, silence).await;
            self.client.send_replace(None);
        }
    }

    /// Tries until both connections are there.
    async fn connect(&self, silence: &mut Option<Silence>) -> (Arc<Client>, Arc<Client>) {
        let endpoint = self.config.unix_endpoint();
        loop {
            let login = |prepare| self.login(&endpoint, prepare);
            let both = async {
                futures_util::try_join!(Box::pin(login(PREPARE)), Box::pin(login(promote::PREPARE)))
            };
            tokio::pin!(both);
            let error = loop {
                tokio::select! {
                    biased;
                    result = &mut both => match result {
                        Ok(both) => return both,
                        Err(error) => break error,
                    },
                    () = tokio::time::sleep(INTERVAL) => self.report_silence(silence.as_mut()),
                }
            };
            self.report_refusal(&error, silence.as_mut());
            tokio::time::sleep(CONNECT_INTERVAL).await;
        }
    }

    async fn login(&self, at: &Endpoint, prepare: &str) -> Result<Arc<Client>, SqlError> {
        let client = sql::connect(at, &self.config.superuser, STATEMENT_LIMIT).await?;
        sql::rows(&client, prepare, STATEMENT_LIMIT).await?;
        Ok(client)
    }

    fn report_refusal(&self, error: &SqlError, silence: Option<&mut Silence>) {
        let starting = matches!(error, SqlError::Server(e)
            if e.code() == Some(&tokio_postgres::error::SqlState::CANNOT_CONNECT_NOW));
        if starting {
            let step = "recovery".to_owned();
            self.hub.observe(self.run, InstanceState::Starting { step });
        } else {
            self.report_silence(silence);
        }
    }

    fn report_silence(&self, silence: Option<&mut Silence>) {
        let Some(silence) = silence else { return };
        let lasted = silence.lasts();
        if lasted > SILENCE {
            let for_ms = u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX);
            self.hub
                .observe(self.run, InstanceState::Unresponsive { for_ms });
        }
    }

    /// Asks until a connection is lost.
    async fn ask(&self, probe: &Client, command: &Client, silence: &mut Silence) {
        while !probe.is_closed() && !command.is_closed() {
            match self.ask_once(probe, silence).await {
                Ok(state) => {
                    *silence = Silence::new();
                    let primary = self.confirm(&state);
                    self.hub.observe(self.run, state);
                    if primary {
                        self.prove(probe).await;
                    }
                }
                Err(SqlError::Timeout(_)) => return,
                // A promotion between two functions of one question: ask again.
                Err(error) => tracing::debug!(%error, "question to the instance failed"),
            }
            trim_log(&self.config, LOG_LIMIT);
            let _ = tokio::time::timeout(INTERVAL, self.poke.notified()).await;
        }
    }

    /// Takes note of which standbys have received what; whether the server is a primary.
    fn confirm(&self, state: &InstanceState) -> bool {
        let InstanceState::Primary { standbys, .. } = state else {
            return false;
        };
        for standby in standbys {
            if let Ok(name) = standby.name.parse() {
                self.lease.flushed(&name, standby.flushed);
            }
        }
        true
    }

    /// Writes a record whose arrival at a standby shows that both see each other. Only while
    /// nobody renews the lease.
    async fn prove(&self, probe: &Client) {
        let Some(since) = self.lease.wants_proof() else {
            return;
        };
        match sql::one(probe, PROOF, PROOF_LIMIT).await {
            Ok(row) => match sql::column(&row, 0) {
                Ok(at) => self.lease.written(at, since),
                Err(error) => tracing::warn!(%error, "record for the lease has no position"),
            },
            Err(error) => tracing::warn!(%error, "record for the lease was not written"),
        }
    }

    /// One question; reports silence while the answer is due.
    async fn ask_once(
        &self,
        probe: &Client,
        silence: &mut Silence,
    ) -> Result<InstanceState, SqlError> {
        let asked = Instant::now();
        let answer = probe.simple_query(QUESTION);
        tokio::pin!(answer);
        loop {
            tokio::select! {
                biased;
                messages = &mut answer => {
                    let rows: Vec<Row> = messages?.iter().filter_map(sql::row).collect();
                    return state(&rows);
                }
                () = tokio::time::sleep(INTERVAL) => {}
            }
            if asked.elapsed() > GIVE_UP {
                return Err(SqlError::Timeout(GIVE_UP));
            }
            self.report_silence(Some(silence));
        }
    }
}

/// How long a server has not answered, in time during which this process was awake: when the whole
/// machine stood still, nobody was silent.
#[derive(Debug)]
struct Silence {
    counted: Duration,
    looked: Instant,
}

impl Silence {
    fn new() -> Self {
        Self {
            counted: Duration::ZERO,
            looked: Instant::now(),
        }
    }

    /// Looked at every [`INTERVAL`]; a longer gap is our own.
    fn lasts(&mut self) -> Duration {
        let now = Instant::now();
        self.counted += now.duration_since(self.looked).min(2 * INTERVAL);
        self.looked = now;
        self.counted
    }
}

/// Reads the answer.
fn state(rows: &[Row]) -> Result<InstanceState, SqlError> {
    let (first, others) = rows
        .split_first()
        .ok_or_else(|| SqlError::Answer("no row".to_owned()))?;
    let timeline = Timeline(sql::column(first, 1)?);
    if sql::column::<String>(first, 0)? == "t" {
        return Ok(InstanceState::Standby {
            timeline,
            received: sql::optional(first, 2)?.unwrap_or_default(),
            replayed: sql::optional(first, 3)?.unwrap_or_default(),
            heard_ms: sql::optional::<i64>(first, 4)?.map(|ms| u64::try_from(ms).unwrap_or(0)),
        });
    }
    let standbys = others
        .iter()
        .map(|row| {
            Ok(StandbyPosition {
                name: sql::column(row, 0)?,
                flushed: sql::column(row, 1)?,
                synchronous: sql::column::<String>(row, 2)? == "t",
            })
        })
        .collect::<Result<_, SqlError>>()?;
    Ok(InstanceState::Primary {
        timeline,
        position: sql::column(first, 2)?,
        standbys,
    })
}
