//! Whether statements that commit by themselves cannot have written, proven from the catalogs.
//!
//! Asked only after a connection broke with such a statement in flight: one that cannot have
//! written runs again without evidence (design rule 5). Every word of the text is looked up; the
//! words of views are looked into as well. The invariant: what is not known to be harmless is not
//! proven.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use helios_api::control::Topology;
use helios_api::{Endpoint, Epoch};
use helios_session::keyword;
use helios_session::reads::{names, words};
use helios_session::script::{Inside, inside_block};
use helios_session::state::literal;

use super::counting::Tables;
use super::link::Link;
use super::replay::{ReplayError, simple};
use super::shared::Shared;
use crate::backend::{self, Login};

/// How deep views may stand on views.
const MAX_DEPTH: usize = 16;

/// Volatile functions of PostgreSQL's own that write nothing, and change nothing but what ends with
/// their backend.
const HARMLESS: &str = "'{random,random_normal,clock_timestamp,timeofday,gen_random_uuid,uuidv4,\
uuidv7,pg_sleep,pg_sleep_for,pg_sleep_until,pg_stat_get_activity,pg_lock_status,\
pg_prepared_statement,pg_cursor,pg_prepared_xact,pg_is_in_recovery,pg_current_wal_lsn,\
pg_current_wal_insert_lsn,pg_current_wal_flush_lsn,pg_current_xact_id_if_assigned,\
pg_xact_status,pg_relation_size,pg_total_relation_size,pg_table_size,pg_indexes_size,\
pg_database_size,pg_tablespace_size,pg_size_pretty,pg_blocking_pids,pg_backend_pid,\
pg_show_all_settings,pg_show_all_file_settings,pg_stat_get_wal_receiver,\
pg_stat_get_wal_senders,set_config,pg_listening_channels,pg_advisory_lock,\
pg_advisory_lock_shared,pg_try_advisory_lock,pg_try_advisory_lock_shared,pg_advisory_xact_lock,\
pg_advisory_xact_lock_shared,pg_try_advisory_xact_lock,pg_try_advisory_xact_lock_shared,\
pg_advisory_unlock,pg_advisory_unlock_shared,pg_advisory_unlock_all}'::pg_catalog.name[]";

/// Whether a function `p` cannot write: PostgreSQL's own that are not volatile, or are listed;
/// functions in C that are declared so. A function in another language may call anything.
fn harmless() -> String {
    format!(
        "(p.prokind <> 'a' OR p.oid < 16384) AND p.prokind <> 'p' \
         AND (SELECT l.lanname IN ('internal', 'c') OR (p.oid < 16384 AND l.lanname = 'sql') \
              FROM pg_catalog.pg_language AS l WHERE l.oid = p.prolang) \
         AND p.proname !~ '_to_xml' \
         AND (p.provolatile <> 'v' \
              OR (p.oid < 16384 AND p.proname = ANY ({HARMLESS})))"
    )
}

/// What was found out in one database, for one epoch.
#[derive(Debug)]
pub(super) struct Proofs {
    epoch: Epoch,
    endpoint: Endpoint,
    database: String,
    pub(super) link: Link,
    known: BTreeMap<Vec<String>, bool>,
    /// What tables plain statements have.
    pub(super) tables: Tables,
}

/// Whether none of these statements, which ran in `database`, can have written.
///
/// # Errors
/// The connection's; it may be tried again.
pub(super) async fn only_read(
    shared: &Arc<Shared>,
    topology: &Topology,
    database: &str,
    texts: Vec<String>,
) -> Result<bool, ReplayError> {
    let mut slot = shared.proofs.lock().await;
    let mut proofs = take(&mut slot, shared, topology, database).await?;
    let proven = match proofs.known.get(&texts) {
        Some(known) => *known,
        None => {
            let proven = prove(&mut proofs.link, &texts).await?;
            proofs.known.insert(texts, proven);
            proven
        }
    };
    *slot = Some(proofs);
    Ok(proven)
}

/// The connection to ask on. It is taken out while it is used: a question that is broken off leaves
/// no half-read answer.
pub(super) async fn take(
    slot: &mut Option<Proofs>,
    shared: &Shared,
    topology: &Topology,
    database: &str,
) -> Result<Proofs, ReplayError> {
    let fits = |p: &Proofs| {
        p.epoch == topology.epoch
            && p.endpoint == topology.primary.endpoint
            && p.database == database
    };
    match slot.take().filter(fits) {
        Some(proofs) => Ok(proofs),
        None => open(shared, topology, database).await,
    }
}

/// What these CALL and DO statements, which ran in `database`, do to transactions while they run. A
/// procedure that has settings of its own, or the rights of its owner, may end none
/// (`ExecuteCallStmt` in `src/backend/commands/functioncmds.c`), nor may one in SQL.
///
/// # Errors
/// The connection's; it may be tried again.
pub(super) async fn inside(
    shared: &Arc<Shared>,
    topology: &Topology,
    database: &str,
    texts: &[String],
) -> Result<Inside, ReplayError> {
    let mut worst = match texts {
        [] => Inside::Unknown,
        _ => Inside::Nothing,
    };
    for text in texts {
        if keyword::begins_with(text, "do") {
            worst = worst.max(inside_block(text.as_bytes()));
            continue;
        }
        let Some(words) = names(text) else {
            return Ok(Inside::Unknown);
        };
        let words: Vec<String> = words.iter().map(|w| literal(w)).collect();
        let sql = format!(
            "SELECT max(CASE WHEN p.prosecdef OR p.proconfig IS NOT NULL OR l.lanname = 'sql' THEN 0 \
             WHEN l.lanname <> 'plpgsql' OR p.prosrc ~* '(rollback|call|\\mdo\\M)' THEN 2 \
             WHEN p.prosrc ~* 'commit' THEN 1 ELSE 0 END)::text \
             FROM pg_proc AS p JOIN pg_language AS l ON l.oid = p.prolang \
             WHERE p.prokind = 'p' AND p.proname = ANY (ARRAY[{}]::name[])",
            words.join(",")
        );
        let mut slot = shared.proofs.lock().await;
        let mut proofs = take(&mut slot, shared, topology, database).await?;
        let rows = simple(&mut proofs.link, &sql).await?;
        *slot = Some(proofs);
        let found = rows.first().and_then(|r| r.first()).cloned().flatten();
        worst = worst.max(match found.as_deref() {
            Some("0") => Inside::Nothing,
            Some("1") => Inside::Commits,
            _ => Inside::Unknown,
        });
    }
    Ok(worst)
}

async fn open(shared: &Shared, topology: &Topology, database: &str) -> Result<Proofs, ReplayError> {
    let endpoint = topology.primary.endpoint.clone();
    let login = Login {
        database: database.to_owned(),
        ..shared.service.clone()
    };
    let limit = shared.options.connect_timeout;
    let conn = backend::connect(&endpoint, &shared.tls, &login, limit)
        .await
        .map_err(|e| ReplayError::Connection(std::io::Error::other(e.to_string())))?;
    let mut link = Link::new(conn.stream, conn.buf);
    simple(&mut link, "SET search_path = pg_catalog").await?;
    Ok(Proofs {
        epoch: topology.epoch,
        endpoint,
        database: database.to_owned(),
        link,
        known: BTreeMap::new(),
        tables: Tables::default(),
    })
}

async fn prove(link: &mut Link, texts: &[String]) -> Result<bool, ReplayError> {
    let mut seen = BTreeSet::new();
    let mut views = BTreeSet::new();
    let mut texts = texts.to_vec();
    for _ in 0..MAX_DEPTH {
        let mut new = BTreeSet::new();
        for text in &texts {
            let Some(words) = words(text) else {
                return Ok(false);
            };
            new.extend(words.into_iter().filter(|w| !seen.contains(w)));
        }
        if new.is_empty() {
            return Ok(true);
        }
        if !simple(link, &suspicious(&new)).await?.is_empty() {
            return Ok(false);
        }
        seen.extend(new.iter().cloned());
        texts = Vec::new();
        for row in simple(link, &views_named(&new)).await? {
            if let [Some(oid), Some(definition)] = row.as_slice()
                && views.insert(oid.clone())
            {
                texts.push(definition.clone());
            }
        }
        if texts.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Words as an array.
pub(super) fn array(words: &BTreeSet<String>) -> String {
    let quoted = words
        .iter()
        .map(|w| format!("\"{}\"", w.replace('\\', "\\\\").replace('"', "\\\"")));
    let joined = quoted.collect::<Vec<_>>().join(",");
    format!("{}::pg_catalog.text[]", literal(&format!("{{{joined}}}")))
}

/// Anything of these names, or any operator, cast or index support of the database's own, that may
/// write: functions, tables with row security, foreign tables.
pub(super) fn suspicious(words: &BTreeSet<String>) -> String {
    let (names, harmless) = (array(words), harmless());
    format!(
        "SELECT 1 FROM pg_catalog.pg_proc AS p \
           WHERE p.proname::text = ANY ({names}) AND NOT ({harmless}) \
         UNION ALL SELECT 1 FROM pg_catalog.pg_class AS c \
           WHERE c.relname::text = ANY ({names}) \
           AND (c.relkind = 'f' OR c.relrowsecurity OR (c.relkind IN ('r', 'p') \
                AND c.relhassubclass AND EXISTS (SELECT FROM pg_catalog.pg_foreign_table))) \
         UNION ALL SELECT 1 FROM pg_catalog.pg_operator AS o \
           JOIN pg_catalog.pg_proc AS p ON p.oid = o.oprcode \
           WHERE o.oid >= 16384 AND NOT ({harmless}) \
         UNION ALL SELECT 1 FROM pg_catalog.pg_cast AS k \
           JOIN pg_catalog.pg_proc AS p ON p.oid = k.castfunc \
           WHERE k.oid >= 16384 AND NOT ({harmless}) \
         UNION ALL SELECT 1 FROM pg_catalog.pg_amproc AS a \
           JOIN pg_catalog.pg_proc AS p ON p.oid = a.amproc \
           WHERE a.oid >= 16384 AND NOT ({harmless}) \
         LIMIT 1"
    )
}

fn views_named(words: &BTreeSet<String>) -> String {
    format!(
        "SELECT c.oid::text, pg_catalog.pg_get_viewdef(c.oid) FROM pg_catalog.pg_class AS c \
         WHERE c.relkind = 'v' AND c.relname::text = ANY ({})",
        array(words)
    )
}
