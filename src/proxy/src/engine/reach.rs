//! Whether statements reach relations by the names in their text alone, proven from the catalogs.
//!
//! Asked while temporary objects of a session are not there yet: a function, trigger or view could
//! use one that the text does not name. Every word of the text is looked up, and those of views. The
//! invariant: what is not known to stay with the names in the text is not proven; and what was
//! proven counts for a second, because others change the catalogs.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use helios_api::Epoch;
use helios_api::control::Topology;
use helios_session::needs::{Needs, to_prepare};

use super::link::Link;
use super::reads::{self, array};
use super::registry::lock;
use super::replay::{ReplayError, simple};
use super::shared::Shared;

/// How long what was found out counts.
const VALID: Duration = Duration::from_secs(1);

/// Most answers that are remembered.
const MOST: usize = 1000;

/// How deep views may stand on views.
const MAX_DEPTH: usize = 8;

/// Functions of PostgreSQL's own that are volatile and still find nothing by name.
const VOLATILE: &str = "'{random,clock_timestamp,timeofday,gen_random_uuid}'::name[]";

/// Types whose values are names of things, or lead to them.
const LEADING: &str = "ARRAY['regclass','regproc','regprocedure','regoper','regoperator','regtype',\
'regrole','regnamespace','regcollation','regconfig','regdictionary','refcursor']::regtype[]";

type Words = BTreeSet<String>;

/// Whose database in which epoch, and the words.
type Key = (Epoch, String, Words, Words);

/// What was found out.
#[derive(Debug, Default)]
pub(super) struct Known(Mutex<HashMap<Key, (bool, Instant)>>);

impl Known {
    fn get(&self, key: &Key) -> Option<bool> {
        let known = lock(&self.0);
        let (proven, at) = known.get(key)?;
        (at.elapsed() < VALID).then_some(*proven)
    }

    fn insert(&self, key: Key, proven: bool, at: Instant) {
        let mut known = lock(&self.0);
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(key, (proven, at));
    }
}

/// Whether a statement of these words reaches nothing but what they name, in `database`; `made` are
/// the words of what makes the objects again that it names.
///
/// # Errors
/// The connection's.
pub(super) async fn by_name_alone(
    shared: &Arc<Shared>,
    topology: &Topology,
    database: &str,
    words: &Words,
    made: &Words,
) -> Result<bool, ReplayError> {
    let key = (
        topology.epoch,
        database.to_owned(),
        words.clone(),
        made.clone(),
    );
    if let Some(proven) = shared.reach.get(&key) {
        return Ok(proven);
    }
    let mut slot = shared.proofs.lock().await;
    // Somebody else has asked meanwhile.
    if let Some(proven) = shared.reach.get(&key) {
        return Ok(proven);
    }
    let at = Instant::now();
    let mut proofs = reads::take(&mut slot, shared, topology, database).await?;
    let proven = prove(&mut proofs.link, words, made).await?;
    *slot = Some(proofs);
    drop(slot);
    shared.reach.insert(key, proven, at);
    Ok(proven)
}

async fn prove(link: &mut Link, words: &Words, made: &Words) -> Result<bool, ReplayError> {
    let mut seen = BTreeSet::new();
    let mut new = words.clone();
    for depth in 0..MAX_DEPTH {
        if !simple(link, &leads_on(&new, made)).await?.is_empty() {
            return Ok(false);
        }
        let mut views = views_named(&new);
        if depth == 0 {
            views = format!("{views} UNION {}", views_named(made));
        }
        let views = simple(link, &views).await?;
        seen.append(&mut new);
        for row in views {
            let Some(Some(definition)) = row.first() else {
                return Ok(false);
            };
            match to_prepare(definition) {
                Needs::Named(more) => new.extend(more),
                Needs::Everything => return Ok(false),
            }
        }
        new.retain(|word| !seen.contains(word));
        if new.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Anything of these names that may reach more than a text says, and operators, casts and index
/// support of the database's own that may.
fn leads_on(words: &Words, made: &Words) -> String {
    let (names, made) = (array(words), array(made));
    let foreign = "(p.oid >= 16384 AND NOT (p.provolatile <> 'v' AND p.prolang IN \
         (SELECT oid FROM pg_language WHERE lanname IN ('internal', 'c'))))";
    format!(
        "SELECT 1 FROM pg_proc AS p WHERE p.proname::text = ANY ({names}) AND \
           (p.oid >= 16384 OR p.prokind = 'p' \
            OR p.prolang NOT IN (SELECT oid FROM pg_language WHERE lanname IN ('internal', 'sql')) \
            OR (p.provolatile = 'v' AND p.proname <> ALL ({VOLATILE})) \
            OR p.prorettype = ANY ({LEADING}) OR p.proargtypes::oid[] && {LEADING}::oid[] \
            OR p.proname ~ '(_to_xml|^format_type$|description$|^row_security|^ts_stat|^ts_rewrite)') \
         UNION ALL SELECT 1 FROM pg_proc AS p WHERE p.proname::text = ANY ({made}) AND {foreign} \
         UNION ALL SELECT 1 FROM pg_type AS y WHERE y.oid >= 16384 AND y.typtype IN ('d', 'r', 'm') \
           AND y.typname::text = ANY ({names} || {made}) \
         UNION ALL SELECT 1 FROM pg_class AS c WHERE c.relname::text = ANY ({names} || {made}) \
           AND c.relpersistence <> 't' AND c.oid >= 16384 AND ({}) \
         UNION ALL SELECT 1 FROM pg_operator AS o JOIN pg_proc AS p ON p.oid = o.oprcode \
           WHERE o.oid >= 16384 AND {foreign} \
         UNION ALL SELECT 1 FROM pg_cast AS k JOIN pg_proc AS p ON p.oid = k.castfunc \
           WHERE k.oid >= 16384 AND {foreign} \
         UNION ALL SELECT 1 FROM pg_amproc AS a JOIN pg_proc AS p ON p.oid = a.amproc \
           WHERE a.oid >= 16384 AND {foreign} \
         LIMIT 1",
        table_leads_on()
    )
}

/// Definitions of views; those in `pg_temp` are among what is made again.
fn views_named(words: &Words) -> String {
    format!(
        "SELECT pg_get_viewdef(c.oid) FROM pg_class AS c WHERE c.relkind = 'v' \
         AND c.relpersistence <> 't' AND c.relname::text = ANY ({})",
        array(words)
    )
}

/// Whether reading or changing the relation `c` may run anything of anybody's, or reach others.
fn table_leads_on() -> String {
    format!(
        "c.relkind NOT IN ('r', 'm', 'i', 'S', 'v', 'c', 't') \
         OR c.relrowsecurity OR c.relhassubclass OR c.relispartition \
         OR (c.relkind = 'r' AND c.relhasrules) \
         OR EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgrelid = c.oid AND NOT (t.tgisinternal \
           AND t.tgfoid < 16384)) \
         OR EXISTS (SELECT FROM pg_constraint AS f WHERE c.oid = f.confrelid AND f.contype = 'f' \
           AND NOT (f.confdeltype IN ('a', 'r') AND f.confupdtype IN ('a', 'r'))) \
         OR EXISTS (SELECT FROM pg_attribute AS a JOIN pg_type AS y ON y.oid = a.atttypid \
           WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
           AND (y.oid = ANY ({LEADING}::oid[]) OR (y.oid >= 16384 AND y.typtype NOT IN ('b', 'e')))) \
         OR EXISTS (SELECT FROM pg_attrdef AS e WHERE e.adrelid = c.oid \
           AND pg_get_expr(e.adbin, e.adrelid) ~ '(_to_xml|pg_temp)') \
         OR EXISTS (SELECT FROM pg_depend AS k WHERE k.refclassid = 'pg_proc'::regclass AND \
           (k.classid = 'pg_attrdef'::regclass AND k.objid IN \
              (SELECT oid FROM pg_attrdef WHERE adrelid = c.oid) \
            OR k.classid = 'pg_constraint'::regclass AND k.objid IN \
              (SELECT oid FROM pg_constraint WHERE conrelid = c.oid) \
            OR k.classid = 'pg_class'::regclass AND k.objid IN \
              (SELECT indexrelid FROM pg_index WHERE indrelid = c.oid)))"
    )
}
