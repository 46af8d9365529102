//! Texts that hold several statements, and texts that may end transactions while they run.
//!
//! What a mark in front of such a request can speak for is decided here, when it is sent. Texts are
//! taken apart as PostgreSQL's scanner does it (`src/backend/parser/scan.l`). The invariant: a text
//! that is not understood for certain has no mark in front.

use crate::keyword::{Hint, Unit, contains_any, first_word, hint, next_word, single_unit};

/// Longest text that is taken apart, in bytes.
const LIMIT: usize = 256 * 1024;

/// How much of a request its mark speaks for: the mark is in the first transaction of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Speaks {
    /// All of it: it is one transaction.
    #[default]
    All,
    /// The first of its transactions. When that one has not committed, nothing behind it ran.
    First,
    /// It calls what may end transactions while it runs; what, once that was looked up.
    Calls(Option<Inside>),
}

/// What a procedure or a DO block does to transactions while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Inside {
    /// It ends none.
    Nothing,
    /// It may commit, and does not roll back: nothing lasts before its first COMMIT.
    Commits,
    /// Nobody knows.
    Unknown,
}

/// Several statements in one simple query that a mark may stand in front of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Script {
    /// How many there are.
    pub statements: usize,
    /// What the mark speaks for.
    pub speaks: Speaks,
    /// One of them changes the session's state, by its first word.
    pub session: bool,
}

/// The statements of a text, without those that are empty; `None` where that is not certain.
#[must_use]
pub fn split(sql: &[u8]) -> Option<Vec<&[u8]>> {
    // Bodies of SQL functions have semicolons outside of quotes (BEGIN ATOMIC … END).
    if sql.len() > LIMIT || contains_any(sql, &[b"atomic"]) {
        return None;
    }
    let mut statements = Vec::new();
    let (mut begin, mut at, mut depth, mut filled) = (0, 0, 0_u32, false);
    while let Some(byte) = sql.get(at) {
        let rest = &sql[at..];
        let len = match byte {
            b';' if depth == 0 => {
                if filled {
                    statements.push(&sql[begin..at]);
                }
                (begin, filled) = (at + 1, false);
                1
            }
            b' ' | b'\t' | b'\n' | b'\r' | 0x0B | 0x0C => 1,
            b'-' if rest.starts_with(b"--") => {
                let end = rest.iter().position(|b| matches!(b, b'\n' | b'\r'));
                end.unwrap_or(rest.len())
            }
            b'/' if rest.starts_with(b"/*") => comment(rest)?,
            _ => {
                filled = true;
                depth = match byte {
                    b'(' => depth + 1,
                    b')' => depth.checked_sub(1)?,
                    _ => depth,
                };
                token(rest)?
            }
        };
        at += len;
    }
    if filled {
        statements.push(&sql[begin..]);
    }
    (depth == 0).then_some(statements)
}

/// Length of what stands at the beginning and is neither space nor comment.
pub(crate) fn token(rest: &[u8]) -> Option<usize> {
    match rest.first()? {
        quote @ (b'\'' | b'"') => {
            let inner = rest[1..].iter().position(|b| b == quote)?;
            // Whether a backslash escapes depends on a setting.
            (!rest[..inner + 1].contains(&b'\\')).then_some(inner + 2)
        }
        b'$' => dollar(rest),
        b if is_name(*b) => {
            let end = rest.iter().position(|b| !is_name(*b)).unwrap_or(rest.len());
            // Part of a name, or the beginning of a quote?
            (rest.get(end) != Some(&b'$')).then_some(end)
        }
        b'\\' => None,
        _ => Some(1),
    }
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

/// Length of a dollar-quoted string.
fn dollar(rest: &[u8]) -> Option<usize> {
    let tag = rest[1..].iter().position(|b| !is_name(*b))? + 2;
    let quote = rest.get(..tag).filter(|q| q.ends_with(b"$"))?;
    if quote[1].is_ascii_digit() {
        return None;
    }
    let body = &rest[tag..];
    let end = body.windows(tag).position(|w| w == quote)?;
    Some(tag + end + tag)
}

/// Length of a block comment; they nest.
pub(crate) fn comment(rest: &[u8]) -> Option<usize> {
    let (mut at, mut depth) = (2, 1);
    while depth > 0 {
        match rest.get(at..at + 2)? {
            b"*/" => (at, depth) = (at + 2, depth - 1),
            b"/*" => (at, depth) = (at + 2, depth + 1),
            _ => at += 1,
        }
    }
    Some(at)
}

/// What PostgreSQL refuses behind the snapshot that the mark takes, and what has evidence of
/// another kind.
const NOT_BEHIND_A_MARK: [&[u8]; 6] = [
    b"isolation",
    b"snapshot",
    b"deferrable",
    b"transaction_",
    b"write",
    b"chain",
];

/// Several statements in one simple query, outside a transaction block, that may write; `None` for
/// those that have no mark in front: what only reads, leaves a transaction block open, rolls back
/// and goes on, or would behave otherwise behind a mark.
#[must_use]
pub fn script(sql: &[u8]) -> Option<Script> {
    let statements = split(sql).filter(|s| s.len() > 1)?;
    let last = statements.len() - 1;
    let (mut open, mut writes, mut session) = (false, false, false);
    let mut speaks = Speaks::All;
    for (at, statement) in statements.iter().enumerate() {
        match hint(statement) {
            Hint::Begin => open = true,
            Hint::Commit | Hint::Rollback if !ends_this(statement) => return None,
            Hint::Rollback if at < last => return None,
            Hint::Rollback => open = false,
            Hint::Commit => {
                open = false;
                if at < last {
                    speaks = Speaks::First;
                }
            }
            Hint::Session => session = true,
            Hint::Write | Hint::Copy => writes = true,
            Hint::Read | Hint::Empty => writes |= single_unit(statement) == Unit::Writes,
        }
    }
    if open || !writes || contains_any(sql, &NOT_BEHIND_A_MARK) {
        return None;
    }
    Some(Script {
        statements: statements.len(),
        speaks,
        session,
    })
}

/// COMMIT or ROLLBACK of the transaction that it runs in; not of a prepared one, and not PREPARE
/// TRANSACTION.
fn ends_this(statement: &[u8]) -> bool {
    let word = first_word(statement);
    !word.eq_ignore_ascii_case(b"prepare")
        && !next_word(statement, word).eq_ignore_ascii_case(b"prepared")
}

/// Words in a DO block or procedure in PL/pgSQL that end transactions, or may call what does. There
/// is no other way in that language: in EXECUTE and in functions PostgreSQL refuses it ("invalid
/// transaction termination", `src/pl/plpgsql/src/pl_exec.c`, `src/backend/executor/spi.c`).
const MAY_ROLL_BACK: [&[u8]; 4] = [b"rollback", b"call", b"\\", b"uescape"];

/// What a DO statement does to transactions while it runs.
#[must_use]
pub fn inside_block(sql: &[u8]) -> Inside {
    let word = first_word(sql);
    let is_do = |w: &[u8]| w.eq_ignore_ascii_case(b"do");
    let after = next_word(sql, word);
    let named = after.eq_ignore_ascii_case(b"language");
    let plain = named && next_word(sql, after).eq_ignore_ascii_case(b"plpgsql");
    let body = if plain {
        let at = after.as_ptr() as usize - sql.as_ptr() as usize + after.len();
        sql.get(at..).unwrap_or_default()
    } else {
        sql
    };
    let searchable = is_do(word) && sql.len() <= LIMIT;
    if !searchable
        || contains_any(body, &[b"language"])
        || contains_any(body, &MAY_ROLL_BACK)
        || has_block_inside(body, plain)
    {
        return Inside::Unknown;
    }
    match contains_any(body, &[b"commit"]) {
        true => Inside::Commits,
        false => Inside::Nothing,
    }
}

/// Whether the word DO is there once more than it has to be, but for ON CONFLICT DO.
fn has_block_inside(body: &[u8], begun: bool) -> bool {
    let mut count = 0;
    let mut at = 0;
    while let Some(rest) = body.get(at..).filter(|r| !r.is_empty()) {
        let len = rest.iter().position(|b| !is_name(*b)).unwrap_or(rest.len());
        let (word, behind) = rest.split_at(len);
        if word.eq_ignore_ascii_case(b"do") && !goes_on(behind.trim_ascii_start()) {
            count += 1;
        }
        at += len + 1;
    }
    count > usize::from(!begun)
}

/// DO NOTHING, DO UPDATE.
fn goes_on(text: &[u8]) -> bool {
    let begins = |word: &[u8]| {
        let start = text.get(..word.len());
        start.is_some_and(|s| s.eq_ignore_ascii_case(word))
    };
    begins(b"nothing") || begins(b"update")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(sql: &str) -> Option<Vec<String>> {
        let all = split(sql.as_bytes())?.into_iter();
        Some(
            all.map(|s| String::from_utf8_lossy(s).trim().to_owned())
                .collect(),
        )
    }

    #[test]
    fn statements_are_told_apart() {
        for (sql, want) in [
            ("a; b", vec!["a", "b"]),
            (" ; a ;; /* ; */ -- ;\n", vec!["a"]),
            ("a ';' 'it''s;'; b", vec!["a ';' 'it''s;'", "b"]),
            ("a \";\"\"\"; b", vec!["a \";\"\"\"", "b"]),
            ("do $$ x; y; $$; b", vec!["do $$ x; y; $$", "b"]),
            (
                "do $a$ $$;$$ ; $b$ $a$;b",
                vec!["do $a$ $$;$$ ; $b$ $a$", "b"],
            ),
            ("r do (a; b); c", vec!["r do (a; b)", "c"]),
            ("a /* /* ; */ ; */; b", vec!["a /* /* ; */ ; */", "b"]),
            ("a -- 'x\n; b", vec!["a -- 'x", "b"]),
        ] {
            let want = want.iter().map(|s| (*s).to_owned()).collect();
            assert_eq!(texts(sql), Some(want), "{sql}");
        }
        for sql in [
            "a 'open; b",
            "a '\\'; b'; c",
            "a $x$ ; $$",
            "a /* ; b",
            "a (; b",
            "a ); b",
            "a$b$;c$b$; d",
            "a 1$$;$$; b",
            "begin atomic x; y; end; b",
        ] {
            assert_eq!(texts(sql), None, "{sql}");
        }
    }

    #[test]
    fn scripts() {
        let all = |statements, session| {
            Some(Script {
                statements,
                speaks: Speaks::All,
                session,
            })
        };
        let first = |statements| {
            Some(Script {
                statements,
                speaks: Speaks::First,
                session: false,
            })
        };
        for (sql, want) in [
            (
                "insert into t values (1); insert into t values (2);",
                all(2, false),
            ),
            ("select 1; insert into t values (2)", all(2, false)),
            ("set a.b = 1; insert into t values (2)", all(2, true)),
            ("begin; insert into t values (1); commit", all(3, false)),
            (
                "insert into t values (1); begin; select 1; end",
                all(4, false),
            ),
            (
                "begin; savepoint a; delete from t; rollback to a; commit",
                all(5, false),
            ),
            ("begin; delete from t; rollback", all(3, false)),
            ("insert into t values (1); copy t from stdin", all(2, false)),
            ("explain analyze delete from t; select 1", all(2, false)),
            ("do $$begin commit; end$$; select 1", all(2, false)),
            ("delete from t; commit; delete from u", first(3)),
            ("commit; delete from u", first(2)),
            (
                "begin; delete from t; commit; delete from u; rollback",
                first(5),
            ),
            ("delete from t", None),
            ("select 1; select 2", None),
            ("set a.b = 1; show a.b", None),
            ("begin; insert into t values (1)", None),
            ("delete from t; rollback; delete from u", None),
            (
                "begin isolation level serializable; delete from t; commit",
                None,
            ),
            ("set transaction read write; delete from t", None),
            (
                "delete from t; commit and chain; delete from u; commit",
                None,
            ),
            ("begin; delete from t; prepare transaction 'x'", None),
            ("delete from t; commit prepared 'x'", None),
            ("delete from t where a = '\\'; select 1", None),
        ] {
            assert_eq!(script(sql.as_bytes()), want, "{sql}");
        }
    }

    #[test]
    fn blocks() {
        for (sql, want) in [
            (
                "do $$begin insert into t values (1); end$$",
                Inside::Nothing,
            ),
            ("DO LANGUAGE plpgsql 'begin end'", Inside::Nothing),
            (
                "do $$begin insert into t values (1) on conflict do nothing; end$$",
                Inside::Nothing,
            ),
            ("do $$begin commit; end$$", Inside::Commits),
            ("do $$begin COMMIT; rollback; end$$", Inside::Unknown),
            ("do $$begin call p(); end$$", Inside::Unknown),
            ("do $$begin do 'begin end'; end$$", Inside::Unknown),
            (
                "do $$begin do $update$begin end$update$; end$$",
                Inside::Unknown,
            ),
            ("do language plperl $$ 1 $$", Inside::Unknown),
            ("do $$ 1 $$ language plperl", Inside::Unknown),
            ("do language plpgsql $$ 1 $$ language x", Inside::Unknown),
            ("do E'begin comm\\151t; end'", Inside::Unknown),
            ("call p()", Inside::Unknown),
        ] {
            assert_eq!(inside_block(sql.as_bytes()), want, "{sql}");
        }
    }
}
