//! The rows of the schema `helios_proxy`: `helios_session::tables` puts them into statements, this
//! says which.
//!
//! The invariant: a client gets rows of its own role's sessions, and those of others only when its
//! role may read all statistics (`pg_read_all_stats`, as for `pg_stat_activity`); rows are brought
//! once to a message, and never again when it is sent again.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use helios_api::control::MoveReason;
use helios_session::state::literal;
use helios_session::tables::{self, Message, Table};
use helios_session::tracker::until_zero;
use helios_wire::frontend;

use super::history::Migration;
use super::link::Link;
use super::registry::lock;
use super::replay::simple;
use super::session::Session;
use super::shared::Shared;
use crate::backend;

/// For how long it is known what a role may see.
const RIGHTS: Duration = Duration::from_secs(10);

/// Roles whose rights are known at a time; beyond that all are asked for again.
const MAX_ROLES: usize = 1000;

/// What a session has to do with the schema.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// A statement that wants rows has been prepared in this session.
    prepared: bool,
    /// The frame in front of the client's input has its rows.
    brought: bool,
    /// What the role may see is being asked for, since then.
    asked: Option<Instant>,
}

impl Rows {
    /// Whether a statement that wants rows has been prepared; `None` in the middle of something.
    pub(super) fn carried(&self) -> Option<bool> {
        let Self {
            prepared,
            brought,
            asked,
        } = self;
        (!brought && asked.is_none()).then_some(*prepared)
    }

    /// As they were carried.
    pub(super) fn taken_over(prepared: bool) -> Self {
        Self {
            prepared,
            ..Self::default()
        }
    }
}

impl Session {
    /// Puts rows into the frame of `len` bytes in front of the client's input, where it wants some;
    /// gives its length then. `None`: it has to wait, what the role may see is not known yet. A
    /// frame that is too large to be held whole gets none.
    pub(super) fn bring_rows(&mut self, tag: u8, len: usize, whole: bool) -> Option<usize> {
        if !whole {
            return Some(len);
        }
        let frame = &self.client.input[..len];
        let wants = match tag {
            frontend::QUERY | frontend::PARSE => tables::mentions(frame),
            frontend::BIND => self.rows.prepared && !self.wanted(frame).is_empty(),
            _ => false,
        };
        // What is sent again has its rows.
        if !wants || self.rows.brought || self.resend_left > 0 {
            return Some(len);
        }
        let all = self.may_see_all()?;
        let of = (!all).then_some(self.entry().who.user.as_str());
        let frame = &self.client.input[..len];
        let rows = |table| json(&self.shared, table, of);
        let in_text = |table| literal(&rows(table));
        let rewritten = match tag {
            frontend::BIND => {
                let values: Vec<String> = self.wanted(frame).iter().map(|t| rows(*t)).collect();
                tables::bind(frame, &values)
            }
            frontend::PARSE => tables::rewrite(Message::Parse, frame, in_text),
            _ => tables::rewrite(Message::Query, frame, in_text),
        };
        self.rows.brought = true;
        let Some(rewritten) = rewritten else {
            return Some(len);
        };
        self.rows.prepared |= tag == frontend::PARSE;
        let since = self.client.input.split_off(len);
        self.client.input.clear();
        self.client.input.extend_from_slice(&rewritten);
        self.client.input.extend_from_slice(&since);
        Some(rewritten.len())
    }

    /// The frame in front has been taken.
    pub(super) fn rows_taken(&mut self) {
        if self.resend_left == 0 {
            self.rows.brought = false;
        }
    }

    fn wanted(&self, bind: &[u8]) -> &'static [Table] {
        let body = bind.get(5..).unwrap_or_default();
        let portal = until_zero(body).len() + 1;
        let name = until_zero(body.get(portal..).unwrap_or_default());
        self.tracker.prepared_text(name).map_or(&[], tables::wanted)
    }

    /// A description of parameters, where some of them are ours.
    pub(super) fn described(&self, frame: &[u8]) -> Option<Vec<u8>> {
        if !self.rows.prepared {
            return None;
        }
        let text = self.tracker.prepared_text(self.tracker.describing()?)?;
        let ours = tables::wanted(text).len();
        (ours > 0).then(|| tables::described(frame, ours)).flatten()
    }

    /// Whether the role may see other roles' sessions; `None` while that is being asked for.
    fn may_see_all(&mut self) -> Option<bool> {
        let user = &self.entry().who.user;
        let known = lock(&self.shared.rights).get(user).copied();
        if let Some((all, _)) = known.filter(|(_, at)| at.elapsed() < RIGHTS) {
            self.rows.asked = None;
            return Some(all);
        }
        if self.rows.asked.is_none_or(|at| at.elapsed() > RIGHTS) {
            self.rows.asked = Some(Instant::now());
            let (shared, entry) = (Arc::clone(&self.shared), Arc::clone(self.entry()));
            tokio::spawn(async move {
                let limit = shared.options.connect_timeout;
                let asked = tokio::time::timeout(limit, ask(&shared, &entry.who.user)).await;
                // Who cannot be asked for sees what is its own.
                let all = asked.ok().flatten().unwrap_or(false);
                let mut rights = lock(&shared.rights);
                if rights.len() >= MAX_ROLES {
                    rights.clear();
                }
                rights.insert(entry.who.user.clone(), (all, Instant::now()));
                drop(rights);
                entry.bell.ring();
            });
        }
        None
    }
}

/// Whether the role may read all statistics.
async fn ask(shared: &Shared, user: &str) -> Option<bool> {
    let at = shared.gate.now().topology.primary.endpoint.clone();
    let limit = shared.options.connect_timeout;
    let conn = backend::connect(&at, &shared.tls, &shared.service, limit).await;
    let conn = conn.ok()?;
    let mut link = Link::new(conn.stream, conn.buf);
    let sql = format!(
        "SELECT 1 FROM pg_catalog.pg_roles AS r WHERE r.rolname OPERATOR(pg_catalog.=) {} \
         AND pg_catalog.pg_has_role(r.oid, 'pg_read_all_stats', 'USAGE')",
        literal(user)
    );
    let rows = simple(&mut link, &sql).await.ok()?;
    Some(!rows.is_empty())
}

/// A table's rows as a JSON array of arrays, of one role's sessions where one is given.
fn json(shared: &Shared, table: Table, of: Option<&str>) -> String {
    let mut out = Array::default();
    match table {
        Table::SessionMigrations => {
            for m in shared.history.rows(of) {
                out.row(|out| migration(out, &m));
            }
        }
        Table::Protection => {
            for r in shared.protection(of).rows {
                out.row(|out| {
                    out.text(Some(&r.database)).text(Some(&r.user));
                    out.text(Some(&r.application));
                    out.plain(r.reason.is_none());
                    out.text(r.reason.map(|r| r.name()));
                    out.plain(r.transactions).plain(r.statements);
                    out.plain(r.transaction_seconds).plain(r.idle_seconds);
                });
            }
        }
    }
    out.0.push(']');
    out.0
}

fn migration(out: &mut Array, m: &Migration) {
    let since = m.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (kind, reason) = match m.reason {
        MoveReason::Switchover => ("planned", "switchover"),
        MoveReason::Failover => ("crash", "failover"),
        MoveReason::ConnectionLoss => ("crash", "connection_loss"),
    };
    out.plain(m.session).text(Some(&timestamp(since)));
    out.text(Some(&m.who.database)).text(Some(&m.who.user));
    out.text(Some(&m.who.application));
    out.text(Some(kind)).text(Some(reason));
    out.text(Some(m.outcome.name()));
    let took = m.took.map(|t| format!("{:.6} seconds", t.as_secs_f64()));
    out.text(took.as_deref());
    out.plain(m.state_bytes).plain(m.replayed).plain(m.epoch);
    let error = m.error.as_ref();
    out.text(
        error
            .map(|(code, _)| code.as_str())
            .filter(|c| !c.is_empty()),
    );
    out.text(error.map(|(_, text)| text.as_str()));
}

/// In a form that timestamptz reads whatever the session's settings are.
fn timestamp(since: Duration) -> String {
    // Days to civil date, after Howard Hinnant's chrono-compatible algorithms (public domain).
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let date = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let micros = since.subsec_micros();
    format!("{year:04}-{month:02}-{date:02} {hour:02}:{minute:02}:{second:02}.{micros:06}+00")
}

/// JSON in ASCII, which every client encoding carries.
struct Array(String);

impl Default for Array {
    fn default() -> Self {
        Self("[".into())
    }
}

impl Array {
    fn row(&mut self, values: impl FnOnce(&mut Self)) {
        self.comma();
        self.0.push('[');
        values(self);
        self.0.push(']');
    }

    fn comma(&mut self) {
        if !self.0.ends_with('[') {
            self.0.push(',');
        }
    }

    fn plain(&mut self, value: impl std::fmt::Display) -> &mut Self {
        self.comma();
        let _ = write!(self.0, "{value}");
        self
    }

    fn text(&mut self, value: Option<&str>) -> &mut Self {
        self.comma();
        let Some(text) = value else {
            self.0.push_str("null");
            return self;
        };
        self.0.push('"');
        for unit in text.encode_utf16() {
            match u8::try_from(unit).map(char::from) {
                Ok(c @ (' ' | '!' | '#'..='&' | '('..='[' | ']'..='~')) => self.0.push(c),
                _ => {
                    let _ = write!(self.0, "\\u{unit:04x}");
                }
            }
        }
        self.0.push('"');
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_those_of_the_calendar() {
        let at = |secs, micros: u32| timestamp(Duration::new(secs, micros * 1000));
        assert_eq!(at(0, 0), "1970-01-01 00:00:00.000000+00");
        assert_eq!(at(951_782_399, 5), "2000-02-28 23:59:59.000005+00");
        assert_eq!(at(951_782_400, 0), "2000-02-29 00:00:00.000000+00");
        assert_eq!(at(1_795_291_751, 120_000), "2026-11-21 20:09:11.120000+00");
        assert_eq!(at(4_102_444_799, 0), "2099-12-31 23:59:59.000000+00");
    }

    #[test]
    fn texts_are_ascii_without_quotes() {
        let mut out = Array::default();
        out.row(|out| {
            out.plain(1)
                .text(None)
                .text(Some("a'\"\\b\n\u{e4}\u{1f600}"));
        });
        let want = r#"[[1,null,"a\u0027\u0022\u005cb\u000a\u00e4\ud83d\ude00"]"#;
        assert_eq!(out.0, want);
    }
}
