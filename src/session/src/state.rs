//! Session state that is restored on another backend: settings, role, prepared statements, and
//! what is there that cannot be moved yet.
//!
//! Prepared statements of the protocol are followed message by message; everything else is what the
//! backend itself told ([`Snapshot`]), never what a statement's text looked like.

use std::collections::BTreeMap;
use std::sync::Arc;

use helios_api::protection::Unprotected;
use serde::{Deserialize, Serialize};

use crate::grammar;
use crate::kept::COLUMN_BYTES;
use crate::keyword::{Hint, Unit};
use crate::locks::{Lock, Locks, MAX_LOCKS};

/// A statement prepared with a Parse message.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The Parse message, as it came.
    pub parse: Arc<[u8]>,
    /// Hint from its text.
    pub hint: Hint,
    /// What it is outside a transaction block.
    pub unit: Unit,
    /// Its key, where it is a plain statement ([`crate::plain`]).
    pub plain: Option<crate::plain::Key>,
    /// Its text might change session state.
    pub touches: bool,
    /// Made in the transaction that is open.
    pub made_inside: bool,
    /// Hash of its RowDescription, once the client has seen it.
    pub columns: Option<u128>,
    /// The RowDescription itself, if it is small.
    pub description: Option<Arc<[u8]>>,
}

/// Prepared statements of the protocol, and what they were when the open transaction began.
#[derive(Debug, Default)]
pub struct PreparedStatements {
    now: BTreeMap<Vec<u8>, Prepared>,
    /// Closed or replaced inside the open transaction.
    gone: Vec<(Vec<u8>, Prepared)>,
}

impl PreparedStatements {
    /// The statement of this name.
    #[must_use]
    pub fn get(&self, name: &[u8]) -> Option<&Prepared> {
        self.now.get(name)
    }

    /// Notes a ParseComplete.
    pub fn insert(&mut self, name: Vec<u8>, statement: Prepared) {
        if let Some(old) = self.now.insert(name.clone(), statement)
            && !old.made_inside
        {
            self.gone.push((name, old));
        }
    }

    /// Notes a CloseComplete (or the end of the unnamed statement by a simple query).
    pub fn remove(&mut self, name: &[u8]) {
        if let Some(old) = self.now.remove(name)
            && !old.made_inside
        {
            self.gone.push((name.to_vec(), old));
        }
    }

    /// Notes the columns that the client was told, by a RowDescription frame.
    pub fn described(&mut self, name: &[u8], frame: &[u8]) {
        if let Some(statement) = self.now.get_mut(name) {
            statement.columns = Some(crate::reply::row_description_hash(frame));
            statement.description = (frame.len() <= COLUMN_BYTES).then(|| Arc::from(frame));
        }
    }

    /// The session is outside a transaction: what is now is what counts.
    pub fn settle(&mut self) {
        self.gone.clear();
        for statement in self.now.values_mut() {
            statement.made_inside = false;
        }
    }

    /// Whether nothing has changed since the last [`Self::settle`].
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.gone.is_empty()
    }

    /// Keeps only the named ones for which `exists` holds (after DEALLOCATE or DISCARD).
    pub fn reconcile(&mut self, exists: impl Fn(&[u8]) -> bool) {
        self.now.retain(|name, _| name.is_empty() || exists(name));
    }

    /// The statements as of the beginning of the open transaction (or now, outside one).
    pub fn at_begin(&self) -> impl Iterator<Item = (&[u8], &Prepared)> {
        let kept = self.now.iter().filter(|(_, p)| !p.made_inside);
        let gone = self.gone.iter().map(|(name, p)| (name, p));
        kept.chain(gone).map(|(name, p)| (name.as_slice(), p))
    }

    /// The statements as they are now: a transaction that is aborted takes none of them back.
    pub fn now(&self) -> impl Iterator<Item = (&[u8], &Prepared)> {
        self.now.iter().map(|(name, p)| (name.as_slice(), p))
    }

    /// Number of statements now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.now.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.now.is_empty()
    }

    /// Bytes of their messages.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let described = |p: &Prepared| p.description.as_ref().map_or(0, |d| d.len());
        let all = self.now.values();
        all.map(|p| p.parse.len() + described(p)).sum()
    }
}

/// What a backend told of its session's state outside a transaction.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Settings whose source is the session, in units of `pg_settings.setting`.
    pub settings: BTreeMap<String, String>,
    /// `current_setting('role')`, `None` for "none".
    pub role: Option<String>,
    /// `session_user`, when it is not the one that logged in.
    pub session_authorization: Option<String>,
    /// PREPARE statements: name and text.
    pub prepared: Vec<(String, String)>,
    /// Names of the protocol's prepared statements.
    pub protocol_prepared: Vec<String>,
    /// Session advisory locks.
    #[serde(with = "crate::locks::pairs")]
    pub locks: Locks,
    /// The server was made to count them.
    pub counted: bool,
    /// Channels that are listened to.
    pub channels: Vec<String>,
    /// State that cannot be moved yet: the reason, and which.
    pub immovable: Vec<(Unprotected, String)>,
}

/// A change of the statements that are prepared by name, as SQL makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// PREPARE: name, and the statement whole.
    Prepared(String, String),
    /// DEALLOCATE of a name, of either kind of statement.
    Deallocated(String),
    /// DEALLOCATE ALL.
    AllDeallocated,
}

/// The temporary domain that marks of calls are set by on servers from version 18 on
/// ([`crate::tracker`]); no part of the session's state.
pub const DOMAIN: &str = "_helios_mark";

/// The question whose rows [`Snapshot::add_row`] takes: kind, name, value, all text.
///
/// Names and operators are qualified, because the session's own `search_path` is in force.
pub const SNAPSHOT_QUERY: &str = "\
SELECT 'g', name, setting FROM pg_catalog.pg_settings WHERE source OPERATOR(pg_catalog.=) 'session' \
AND name OPERATOR(pg_catalog.<>) ALL \
(ARRAY['transaction_isolation','transaction_read_only','transaction_deferrable']) \
UNION ALL SELECT 'r', 'role', pg_catalog.current_setting('role') \
UNION ALL SELECT 'u', 'session_authorization', SESSION_USER::pg_catalog.text \
UNION ALL SELECT CASE WHEN from_sql THEN 'p' ELSE 'q' END, name, statement \
FROM pg_catalog.pg_prepared_statements \
UNION ALL SELECT 'x', 'cursor WITH HOLD', name FROM pg_catalog.pg_cursors WHERE is_holdable \
UNION ALL SELECT 'l', c, '' FROM pg_catalog.pg_listening_channels() c \
UNION ALL SELECT 'a', pg_catalog.concat_ws(' ', objsubid, classid, objid), mode \
FROM pg_catalog.pg_locks \
WHERE locktype OPERATOR(pg_catalog.=) 'advisory' AND granted \
AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() \
UNION ALL (SELECT 'x', 'temporary object', pg_catalog.pg_describe_object(classid, objid, 0) \
FROM pg_catalog.pg_depend WHERE refclassid OPERATOR(pg_catalog.=) \
'pg_catalog.pg_namespace'::pg_catalog.regclass \
AND refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema() \
AND NOT EXISTS (SELECT FROM pg_catalog.pg_type t WHERE t.oid OPERATOR(pg_catalog.=) objid \
AND classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_type'::pg_catalog.regclass \
AND typname OPERATOR(pg_catalog.=) '_helios_mark') LIMIT 1)";

/// [`SNAPSHOT_QUERY`], with the custom settings that the session may have set.
#[must_use]
pub fn snapshot_query<'a>(custom: impl Iterator<Item = &'a str>) -> String {
    let mut sql = SNAPSHOT_QUERY.to_owned();
    for name in custom {
        let name = literal(name);
        sql.push_str(" UNION ALL SELECT 'g', ");
        sql.push_str(&format!("{name}, pg_catalog.current_setting({name}, true)"));
    }
    sql
}

impl Snapshot {
    /// Takes one row of [`SNAPSHOT_QUERY`]; `login` is the role that logged in.
    pub fn add_row(&mut self, kind: &str, name: &str, value: &str, login: &str) {
        match kind {
            "g" => {
                self.settings.insert(name.to_owned(), value.to_owned());
            }
            "r" if value != "none" => self.role = Some(value.to_owned()),
            "u" if value != login => self.session_authorization = Some(value.to_owned()),
            "p" => self.prepared.push((name.to_owned(), value.to_owned())),
            "q" => self.protocol_prepared.push(name.to_owned()),
            "l" => self.channels.push(name.to_owned()),
            "a" if self.locks.len() >= MAX_LOCKS => {
                let which = format!("more than {MAX_LOCKS} session advisory locks");
                self.immovable.push((Unprotected::AdvisoryLock, which));
            }
            "a" => {
                if let Some(lock) = Lock::from_row(name, value) {
                    self.locks.insert(lock, None);
                } else {
                    let which = "an unknown kind of advisory lock".into();
                    self.immovable.push((Unprotected::AdvisoryLock, which));
                }
            }
            "c" => {
                let at = name.parse::<usize>().ok();
                if let Some(count) = at.and_then(|at| self.locks.values_mut().nth(at)) {
                    *count = value.parse().ok();
                }
            }
            "x" => {
                let reason = immovable(name);
                let which = format!("{} \"{value}\"", reason.text());
                self.immovable.push((reason, which));
            }
            _ => {}
        }
    }

    /// The statements that bring a fresh backend to this state, in the order of design rule 5.3:
    /// settings, role, SQL-level prepared statements. Channels follow ([`Self::listen_sql`]).
    #[must_use]
    pub fn restore_sql(&self) -> Vec<String> {
        let mut sql = Vec::new();
        if let Some(user) = &self.session_authorization {
            sql.push(format!("SET SESSION AUTHORIZATION {}", literal(user)));
        }
        if !self.settings.is_empty() {
            let calls: Vec<String> = self
                .settings
                .iter()
                .map(|(n, v)| {
                    format!(
                        "pg_catalog.set_config({}, {}, false)",
                        literal(n),
                        literal(v)
                    )
                })
                .collect();
            sql.push(format!("SELECT {}", calls.join(", ")));
        }
        if let Some(role) = &self.role {
            sql.push(format!("SET ROLE {}", literal(role)));
        }
        let alone = |(name, text): &(String, String)| {
            grammar::prepare_of(text, name).unwrap_or_else(|| text.clone())
        };
        sql.extend(self.prepared.iter().map(alone));
        sql
    }

    /// The statements that register its channels, behind all others: none of it can be had on a
    /// standby.
    #[must_use]
    pub fn listen_sql(&self) -> Vec<String> {
        let listen = |channel: &String| format!("LISTEN {}", identifier(channel));
        self.channels.iter().map(listen).collect()
    }

    /// Gives up what a change gives up of the statements that PREPARE made.
    pub fn give_up(&mut self, change: &Change) {
        match change {
            Change::Prepared(name, _) | Change::Deallocated(name) => {
                self.prepared.retain(|(n, _)| n != name);
            }
            Change::AllDeallocated => self.prepared.clear(),
        }
    }

    /// Whether others can tell that the session has no backend: somebody else could take its locks,
    /// or notify it in vain.
    #[must_use]
    pub fn is_felt_by_others(&self) -> bool {
        !self.locks.is_empty() || !self.channels.is_empty()
    }
}

/// The reason behind the second column of [`SNAPSHOT_QUERY`] where the first is `x`.
fn immovable(name: &str) -> Unprotected {
    match name {
        "cursor WITH HOLD" => Unprotected::CursorWithHold,
        _ => Unprotected::TemporaryObject,
    }
}

/// A quoted identifier.
#[must_use]
pub fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A string literal that means the same whatever `standard_conforming_strings` is.
#[must_use]
pub fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') {
        format!(" E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(inside: bool) -> Prepared {
        Prepared {
            parse: Arc::from(&b"P"[..]),
            hint: Hint::Read,
            unit: Unit::Reads,
            touches: false,
            plain: None,
            made_inside: inside,
            columns: None,
            description: None,
        }
    }

    fn names(statements: &PreparedStatements) -> Vec<Vec<u8>> {
        let mut names: Vec<_> = statements.at_begin().map(|(n, _)| n.to_vec()).collect();
        names.sort();
        names
    }

    #[test]
    fn statements_as_of_begin_survive_what_the_transaction_does() {
        let mut s = PreparedStatements::default();
        s.insert(b"a".to_vec(), prepared(false));
        s.insert(b"b".to_vec(), prepared(false));
        s.settle();
        s.remove(b"a");
        s.insert(b"a".to_vec(), prepared(true));
        s.insert(b"c".to_vec(), prepared(true));
        s.remove(b"b");
        assert_eq!(names(&s), [b"a".to_vec(), b"b".to_vec()]);
        s.settle();
        assert_eq!(names(&s), [b"a".to_vec(), b"c".to_vec()]);
    }

    #[test]
    fn restore_order_is_settings_role_statements() {
        let mut s = Snapshot::default();
        s.add_row("p", "q", "PREPARE q AS SELECT 1", "app");
        s.add_row("r", "role", "boss", "app");
        s.add_row("u", "session_authorization", "app", "app");
        s.add_row("g", "search_path", "a, \"B\"", "app");
        s.add_row("g", "my.x", "it's \\", "app");
        s.add_row("l", "New \"s", "", "app");
        assert_eq!(
            s.restore_sql(),
            [
                "SELECT pg_catalog.set_config('my.x',  E'it''s \\\\', false), \
                 pg_catalog.set_config('search_path', 'a, \"B\"', false)",
                "SET ROLE 'boss'",
                "PREPARE q AS SELECT 1",
            ]
        );
        assert_eq!(s.listen_sql(), ["LISTEN \"New \"\"s\""]);
    }
}
