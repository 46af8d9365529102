//! Session advisory locks: which, how often, and the SQL that counts and takes them.
//!
//! PostgreSQL lists the locks of a session and not how many times each was taken
//! (`LOCALLOCK.nLocks` in `src/backend/storage/lmgr/lock.c` is in no view). A lock that a statement
//! with one call has brought was taken once; where the statements do not tell, the server is made
//! to count ([`count_sql`]). Pure. The invariant: a lock whose count is not known is never taken
//! for one that is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::grammar;
use crate::reply::{Outcome, Reply};

/// Most locks of one session that are moved; fewer than the columns of a SELECT (1664).
pub const MAX_LOCKS: usize = 1000;

/// The key of an advisory lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Key {
    /// One bigint.
    One(i64),
    /// Two integers.
    Two(i32, i32),
}

/// An advisory lock, as a session holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Lock {
    /// What is locked.
    pub key: Key,
    /// Shared with others.
    pub shared: bool,
}

/// Locks, with how many times each was taken; `None` while that is not known.
pub type Locks = BTreeMap<Lock, Option<u32>>;

/// [`Locks`] as a list of pairs, for formats whose maps have texts as keys.
pub(crate) mod pairs {
    use serde::{Deserialize as _, Deserializer, Serializer};

    use super::{Lock, Locks};

    pub(crate) fn serialize<S: Serializer>(locks: &Locks, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(locks)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Locks, D::Error> {
        let pairs = Vec::<(Lock, Option<u32>)>::deserialize(from)?;
        Ok(pairs.into_iter().collect())
    }
}

impl Lock {
    /// From a row of `pg_locks`: `objsubid classid objid` and `mode`
    /// (`SET_LOCKTAG_INT64` and `SET_LOCKTAG_INT32` in `src/backend/utils/adt/lockfuncs.c`).
    #[must_use]
    pub fn from_row(tag: &str, mode: &str) -> Option<Self> {
        let mut parts = tag.split(' ').map(str::parse::<u32>);
        let (kind, class, object) = (parts.next()?, parts.next()?.ok()?, parts.next()?.ok()?);
        let key = match kind.ok()? {
            1 => Key::One(((u64::from(class) << 32) | u64::from(object)).cast_signed()),
            2 => Key::Two(class.cast_signed(), object.cast_signed()),
            _ => return None,
        };
        let shared = mode == "ShareLock";
        Some(Self { key, shared })
    }

    /// A call of `pg_advisory_<what>`; `each` is an integer expression of value 0 that keeps the
    /// call from being made once for many rows.
    fn call(self, what: &str, each: Option<&str>) -> String {
        let suffix = if self.shared { "_shared" } else { "" };
        let plus = each.map_or_else(String::new, |e| format!(" OPERATOR(pg_catalog.+) {e}"));
        let arguments = match self.key {
            Key::One(key) => format!("'{key}'::pg_catalog.int8{plus}"),
            Key::Two(a, b) => format!("'{a}'::pg_catalog.int4{plus}, '{b}'::pg_catalog.int4"),
        };
        format!("pg_catalog.pg_advisory_{what}{suffix}({arguments})")
    }

    /// The statement that takes it `count` times.
    #[must_use]
    pub fn take_sql(self, count: u32) -> String {
        let call = self.call("lock", None);
        format!("SELECT {call} FROM pg_catalog.generate_series(1, {count})")
    }
}

impl std::fmt::Display for Lock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.key {
            Key::One(key) => write!(f, "{key}"),
            Key::Two(a, b) => write!(f, "({a}, {b})"),
        }
    }
}

/// How many calls of advisory lock functions statements may have made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Calls {
    /// None that could be seen.
    #[default]
    None,
    /// At most one.
    One,
    /// Any number.
    Many,
}

impl Calls {
    /// What an answered exchange may have called, by its texts.
    #[must_use]
    pub fn of(texts: &[String], reply: &Reply) -> Self {
        let mentions = |text: &str| occurrences(text) > 0;
        if !texts.iter().any(|t| mentions(t)) {
            return Self::None;
        }
        match reply.commands.as_slice() {
            // Parsed or described, not run.
            [] => Self::None,
            [one] if texts.iter().all(|t| calls_once(t)) => match &one.outcome {
                Outcome::Complete(tag) if tag.as_bytes() == b"SELECT 1" => Self::One,
                _ => Self::Many,
            },
            _ => Self::Many,
        }
    }

    /// These and others.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::None, one) | (one, Self::None) => one,
            _ => Self::Many,
        }
    }
}

/// How often a text names an advisory lock of the session.
fn occurrences(text: &str) -> usize {
    let lower = text.to_ascii_lowercase();
    let named = lower.matches("advisory").count();
    named - lower.matches("advisory_xact_").count()
}

/// Whether a text is one SELECT without FROM that names one such function: a single row of it is
/// a single call.
fn calls_once(text: &str) -> bool {
    occurrences(text) == 1 && grammar::selects_without_from(text)
}

/// Carries counts over to what the server now tells of the session's locks. False where they
/// remain unknown and have to be counted.
#[must_use]
pub fn carry_counts(before: &Locks, now: &mut Locks, calls: Calls) -> bool {
    let gone = before.keys().filter(|l| !now.contains_key(l)).count();
    let new = now.keys().filter(|l| !before.contains_key(l)).count();
    if calls == Calls::Many || (calls == Calls::One && gone + new != 1) {
        return now.is_empty();
    }
    for (lock, count) in now.iter_mut() {
        *count = match before.get(lock) {
            Some(count) => *count,
            None if calls == Calls::One => Some(1),
            None => None,
        };
    }
    now.values().all(Option::is_some)
}

/// The statements that count locks without ever giving one up to others: behind a guard of the
/// transaction each is released as often as it is held, and taken again so often. To be run in one
/// transaction; the last gives rows `c`, number of the lock in its order, count.
///
/// Releasing one time too many is what tells the end, and PostgreSQL logs a warning of it.
#[must_use]
pub fn count_sql(locks: &Locks) -> [String; 3] {
    // A time-out in the middle would leave locks behind that nobody holds any more.
    let quiet = "SELECT pg_catalog.set_config('statement_timeout', '0', true), \
                 pg_catalog.set_config('client_min_messages', 'error', true)";
    let guards: Vec<_> = locks.keys().map(|l| l.call("xact_lock", None)).collect();
    let counts = locks.keys().enumerate().map(|(at, lock)| {
        let (unlock, again) = (
            lock.call("unlock", None),
            lock.call("lock", Some("(0 OPERATOR(pg_catalog.*) g)")),
        );
        format!(
            "SELECT 'c', '{at}', (WITH RECURSIVE c (n) AS (SELECT 0 UNION ALL \
             SELECT n OPERATOR(pg_catalog.+) 1 FROM c WHERE {unlock}), \
             m (n) AS MATERIALIZED (SELECT pg_catalog.max(n) FROM c) \
             SELECT (SELECT pg_catalog.count(*) FROM pg_catalog.generate_series(1, m.n) g, \
             LATERAL {again})::pg_catalog.text FROM m)"
        )
    });
    [
        quiet.to_owned(),
        format!("SELECT {}", guards.join(", ")),
        counts.collect::<Vec<_>>().join(" UNION ALL "),
    ]
}

/// The statements that take all locks again on a fresh backend, waiting for none of them longer
/// than `limit_ms`. To be run as they are, one by one.
#[must_use]
pub fn take_again_sql(locks: &Locks, limit_ms: u32) -> Vec<String> {
    let begin = format!(
        "BEGIN; SELECT pg_catalog.set_config('lock_timeout', '{limit_ms}', true), \
         pg_catalog.set_config('statement_timeout', '0', true)"
    );
    let take = locks.iter().map(|(l, n)| l.take_sql(n.unwrap_or(1)));
    let all = std::iter::once(begin).chain(take);
    all.chain(std::iter::once("COMMIT".to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reply::Tag;

    fn lock(n: i64) -> Lock {
        Lock {
            key: Key::One(n),
            shared: false,
        }
    }

    fn locks(all: &[(i64, Option<u32>)]) -> Locks {
        all.iter().map(|(n, c)| (lock(*n), *c)).collect()
    }

    #[test]
    fn keys_of_both_forms() {
        let key = |tag, mode| Lock::from_row(tag, mode).map(|l| (l.key, l.shared));
        let max = "1 4294967295 4294967295";
        assert_eq!(key(max, "ExclusiveLock"), Some((Key::One(-1), false)));
        assert_eq!(
            key("1 1 2", "ShareLock"),
            Some((Key::One((1 << 32) + 2), true))
        );
        assert_eq!(
            key("2 4294967294 7", "ShareLock"),
            Some((Key::Two(-2, 7), true))
        );
        assert_eq!(key("3 1 1", "ShareLock"), None);
    }

    #[test]
    fn calls() {
        let done = |tag: &[u8]| {
            let mut reply = Reply::default();
            reply.commands.push(crate::reply::CommandResult {
                outcome: Outcome::Complete(Tag::new(tag)),
                rows: 1,
                rows_hash: 0,
            });
            reply
        };
        let of = |text: &str, tag: &[u8]| Calls::of(&[text.to_owned()], &done(tag));
        let one = b"SELECT 1";
        assert_eq!(of("select pg_advisory_lock(1)", one), Calls::One);
        assert_eq!(
            of("select pg_try_advisory_lock(hashtext('x')) as got", one),
            Calls::One
        );
        assert_eq!(of("select 1", one), Calls::None);
        assert_eq!(of("select pg_advisory_xact_lock(1)", one), Calls::None);
        for (text, tag) in [
            ("select count(pg_advisory_lock(n)) from t", one.as_slice()),
            ("select pg_advisory_lock(1), pg_advisory_lock(1)", one),
            (
                "select pg_advisory_lock(1), generate_series(1, 3)",
                b"SELECT 3",
            ),
            ("do $$ begin perform pg_advisory_lock(1); end $$", b"DO"),
        ] {
            assert_eq!(of(text, tag), Calls::Many, "{text}");
        }
        let parsed = Calls::of(&["select pg_advisory_lock(1)".into()], &Reply::default());
        assert_eq!(parsed, Calls::None);
        assert_eq!(Calls::One.and(Calls::One), Calls::Many);
        assert_eq!(Calls::One.and(Calls::None), Calls::One);
    }

    #[test]
    fn counts_are_carried_over_only_where_they_are_certain() {
        let one = locks(&[(1, Some(2))]);
        let cases = [
            // nothing was called
            (&[(1, None)][..], Calls::None, Some(&[(1, Some(2))][..])),
            // one new, one gone
            (
                &[(1, None), (2, None)],
                Calls::One,
                Some(&[(1, Some(2)), (2, Some(1))]),
            ),
            (&[], Calls::One, Some(&[])),
            (&[], Calls::Many, Some(&[])),
            // one more time, or once less, or nothing
            (&[(1, None)], Calls::One, None),
            (&[(1, None)], Calls::Many, None),
            (&[(1, None), (2, None), (3, None)], Calls::One, None),
            // by something that no text told of
            (&[(1, None), (2, None)], Calls::None, None),
        ];
        for (now, calls, want) in cases {
            let mut now = locks(now);
            let known = carry_counts(&one, &mut now, calls);
            assert_eq!(known, want.is_some(), "{now:?} {calls:?}");
            if let Some(want) = want {
                assert_eq!(now, locks(want));
            }
        }
    }
}
