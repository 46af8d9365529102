//! What backends that are opened ahead of a planned move are warmed up with: the statements that
//! their user's sessions run in their database.
//!
//! A backend that has never seen a table reads its description from the catalogs, and that of its
//! columns' types, indexes and operators, which is most of what its first statements cost. Right
//! after a promotion all sessions do so at once, while their clients wait. The invariant: nothing is
//! executed but EXPLAIN without ANALYZE, no trace is left in the session, and nobody gets to see
//! another user's statement (`pg_stat_activity` shows a backend's last one to its user).

use std::collections::HashMap;
use std::sync::Arc;

use helios_session::rehearsal::{Rehearsal, rehearsal};
use helios_wire::backend;
use helios_wire::message::{BuildError, front};

use super::evidence;
use super::link::Link;
use super::replay::{ReplayError, ended, is_fatal, next_frame, simple};
use super::shared::Shared;
use crate::backend::Login;

/// Each statement is followed by as many.
const SYNCS: usize = 2;

/// As many statements of a user in a database as a backend is warmed up with.
const MOST: usize = 8;

/// The last statement of every session but our own, where all of it is shown
/// (`track_activity_query_size`; a character of up to four bytes may have been left out).
const STATEMENTS: &str = "SELECT a.datname, a.usename, a.query FROM pg_catalog.pg_stat_activity AS a \
     WHERE a.backend_type OPERATOR(pg_catalog.=) 'client backend' AND a.datname IS NOT NULL \
     AND a.usename OPERATOR(pg_catalog.<>) CURRENT_USER \
     AND pg_catalog.octet_length(a.query) OPERATOR(pg_catalog.+) 4 OPERATOR(pg_catalog.<) \
     pg_catalog.pg_size_bytes(pg_catalog.current_setting('track_activity_query_size'))";

/// Database and user.
type Place = (String, String);

/// What to rehearse, by database and user.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rehearsals(Arc<HashMap<Place, Vec<Rehearsal>>>);

impl Rehearsals {
    /// Asks the primary what its sessions run. Nothing, when it does not answer: it is a matter of
    /// milliseconds of somebody's wait.
    pub(crate) async fn collect(shared: &Shared) -> Self {
        let topology = shared.gate.now().topology;
        let asking = async {
            let mut link = evidence::connect(shared, &topology).await?;
            simple(&mut link, STATEMENTS).await
        };
        match tokio::time::timeout(shared.options.connect_timeout, asking).await {
            Ok(Ok(rows)) => Self::of(rows),
            Ok(Err(error)) => {
                tracing::debug!(%error, "backends are not warmed up");
                Self::default()
            }
            Err(_) => Self::default(),
        }
    }

    fn of(rows: Vec<Vec<Option<String>>>) -> Self {
        let mut seen: HashMap<Place, Vec<(Rehearsal, usize)>> = HashMap::new();
        for row in rows {
            let Ok([Some(database), Some(user), Some(text)]) = <[_; 3]>::try_from(row) else {
                continue;
            };
            let Some(found) = rehearsal(&text) else {
                continue;
            };
            let known = seen.entry((database, user)).or_default();
            match known.iter_mut().find(|(r, _)| r.shape == found.shape) {
                Some((_, count)) => *count += 1,
                None => known.push((found, 1)),
            }
        }
        let most_used = |mut known: Vec<(Rehearsal, usize)>| {
            known.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
            known.truncate(MOST);
            known.into_iter().map(|(r, _)| r).collect()
        };
        let by_place = seen.into_iter().map(|(p, known)| (p, most_used(known)));
        Self(Arc::new(by_place.collect()))
    }

    /// Warms up a backend for this login. What the server refuses is left out.
    ///
    /// # Errors
    /// The connection's.
    pub(super) async fn run(&self, link: &mut Link, login: &Login) -> Result<(), ReplayError> {
        let place = (login.database.clone(), login.user.clone());
        let Some(known) = self.0.get(&place) else {
            return Ok(());
        };
        let mut cycles = 0;
        for rehearsal in known {
            let before = link.output.len();
            match put(link, rehearsal) {
                Ok(()) => cycles += SYNCS,
                Err(_) => link.output.truncate(before),
            }
        }
        link.flush().await?;
        while cycles > 0 {
            let (tag, frame) = next_frame(link).await?;
            if is_fatal(tag, &frame) {
                return Err(ended());
            }
            cycles -= usize::from(tag == backend::READY_FOR_QUERY);
        }
        Ok(())
    }
}

/// One statement in a transaction of its own, through the unnamed statement, which is gone behind
/// it.
fn put(link: &mut Link, rehearsal: &Rehearsal) -> Result<(), BuildError> {
    let out = &mut link.output;
    front::parse(out, b"", rehearsal.sql.as_bytes(), &[])?;
    if rehearsal.runs {
        let nulls = vec![None; usize::from(rehearsal.parameters)];
        front::bind(out, b"", b"", &[], &nulls, &[])?;
        front::execute(out, b"", 0)?;
    }
    front::sync(out);
    // Behind the Sync: in front of it, it would be skipped where the plan is refused.
    front::close(out, front::Target::Statement, b"")?;
    front::sync(out);
    Ok(())
}
