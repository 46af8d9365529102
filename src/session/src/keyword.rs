//! Hints from the first word of a statement, cheap enough for the forwarding path.
//!
//! A hint only decides when the server is asked for the truth (a transaction id, the session's
//! state). A wrong hint costs a question or makes an outcome unknown; it never makes one wrong.
//! Whatever decides what may be replayed is read with the grammar (`grammar`).

use crate::script::{self, Inside};

/// What the first word of a statement suggests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// Opens a transaction block.
    Begin,
    /// Ends one, and may commit it.
    Commit,
    /// Ends one without committing.
    Rollback,
    /// SELECT and its kind: writes only through functions.
    Read,
    /// Changes session state.
    Session,
    /// Anything else: takes a transaction id, probably.
    Write,
    /// May write, and nothing of ours may be sent behind it before it is answered: the server may
    /// be reading copy data (`COPY … FROM STDIN`).
    Copy,
    /// No statement.
    Empty,
}

/// The hint for a statement's text.
#[must_use]
pub fn hint(sql: &[u8]) -> Hint {
    let word = first_word(sql);
    let mut lower = [0_u8; 12];
    let Some(lower) = lower.get_mut(..word.len()) else {
        return Hint::Copy;
    };
    lower.copy_from_slice(word);
    lower.make_ascii_lowercase();
    match &*lower {
        b"" => Hint::Empty,
        b"begin" | b"start" => Hint::Begin,
        b"commit" | b"end" => Hint::Commit,
        b"rollback" if goes_back_to_savepoint(sql, word) => Hint::Read,
        b"rollback" | b"abort" => Hint::Rollback,
        b"select" | b"show" | b"fetch" | b"move" | b"close" | b"values" | b"table" | b"declare"
        | b"explain" | b"savepoint" | b"release" => Hint::Read,
        b"set" | b"reset" | b"discard" | b"deallocate" | b"listen" | b"unlisten" => Hint::Session,
        // PREPARE name AS … makes a statement, PREPARE TRANSACTION ends a transaction.
        b"prepare" => {
            if next_word_is(sql, word, b"transaction") {
                Hint::Commit
            } else {
                Hint::Session
            }
        }
        b"copy" => Hint::Copy,
        _ if contains_any(sql, &[b"stdin"]) => Hint::Copy,
        _ => Hint::Write,
    }
}

/// What a statement outside a transaction block is to the transaction that it runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// One statement that may write and is committed as a whole: a mark may stand in front.
    Writes,
    /// The same, and reads copy data from the client.
    Copies,
    /// CALL, or a DO that may end transactions while it runs.
    Calls,
    /// Ends no transaction; writes only through functions.
    Reads,
    /// Ends or begins transactions itself, cannot run beside another, is more than one, or is not
    /// known.
    Other,
}

/// First words of statements that are one transaction and may follow another statement in it.
const WRITING: [&[u8]; 14] = [
    b"insert",
    b"update",
    b"delete",
    b"merge",
    b"with",
    b"truncate",
    b"grant",
    b"revoke",
    b"comment",
    b"refresh",
    b"execute",
    b"security",
    b"import",
    b"reassign",
];

/// Words that tell DDL that PostgreSQL runs in no transaction block, or in several transactions.
const ALONE: [&[u8]; 5] = [
    b"database",
    b"tablespace",
    b"subscription",
    b"system",
    b"concurrently",
];

/// What a text is, outside a transaction block, if it holds one statement.
#[must_use]
pub fn unit(sql: &[u8]) -> Unit {
    let trimmed = sql.trim_ascii_end();
    let one = trimmed.strip_suffix(b";").unwrap_or(trimmed);
    if !one.contains(&b';') {
        return single_unit(one);
    }
    match script::split(one).as_deref() {
        Some([one]) => single_unit(one),
        _ => Unit::Other,
    }
}

/// What a single statement is.
pub(crate) fn single_unit(one: &[u8]) -> Unit {
    let word = first_word(one);
    let is = |w: &[u8]| word.eq_ignore_ascii_case(w);
    if WRITING.iter().any(|w| is(w)) {
        return Unit::Writes;
    }
    if is(b"call") {
        return Unit::Calls;
    }
    if is(b"do") {
        return match script::inside_block(one) {
            Inside::Nothing => Unit::Writes,
            Inside::Commits | Inside::Unknown => Unit::Calls,
        };
    }
    if is(b"copy") {
        return if contains_any(one, &[b"stdin"]) {
            Unit::Copies
        } else {
            Unit::Writes
        };
    }
    if is(b"create") || is(b"alter") || is(b"drop") {
        let searchable = one.len() <= SEARCH_LIMIT && !contains_any(one, &ALONE);
        return if searchable {
            Unit::Writes
        } else {
            Unit::Other
        };
    }
    if is(b"explain") && contains_any(one, &[b"analy"]) {
        return Unit::Writes;
    }
    match hint(one) {
        Hint::Read | Hint::Empty => Unit::Reads,
        _ => Unit::Other,
    }
}

/// Whether the first word of a text is this one, in any case.
#[must_use]
pub fn begins_with(sql: &str, word: &str) -> bool {
    first_word(sql.as_bytes()).eq_ignore_ascii_case(word.as_bytes())
}

/// Whether a text begins like COMMIT PREPARED or ROLLBACK PREPARED.
#[must_use]
pub fn ends_prepared(sql: &[u8]) -> bool {
    let word = first_word(sql);
    let ends = word.eq_ignore_ascii_case(b"commit") || word.eq_ignore_ascii_case(b"rollback");
    ends && next_word_is(sql, word, b"prepared")
}

/// Whether a text may name a parameter (`$1`): a simple query has none, and its error is another
/// one in the extended form (42P02, 08P01).
#[must_use]
pub fn names_parameter(sql: &[u8]) -> bool {
    sql.windows(2)
        .any(|w| w[0] == b'$' && w[1].is_ascii_digit())
}

/// `ROLLBACK [WORK | TRANSACTION] TO …` stays inside the transaction.
fn goes_back_to_savepoint(sql: &[u8], word: &[u8]) -> bool {
    let next = next_word(sql, word);
    let next = if next.eq_ignore_ascii_case(b"work") || next.eq_ignore_ascii_case(b"transaction") {
        next_word(sql, next)
    } else {
        next
    };
    next.eq_ignore_ascii_case(b"to")
}

fn next_word_is(sql: &[u8], word: &[u8], next: &[u8]) -> bool {
    next_word(sql, word).eq_ignore_ascii_case(next)
}

/// The word after `word`, which is a part of `sql`.
pub(crate) fn next_word<'a>(sql: &'a [u8], word: &[u8]) -> &'a [u8] {
    let offset = word.as_ptr() as usize - sql.as_ptr() as usize + word.len();
    sql.get(offset..).map_or(&[], first_word)
}

/// The first identifier, past white space, comments, opening parentheses and semicolons.
pub(crate) fn first_word(sql: &[u8]) -> &[u8] {
    let mut rest = sql;
    loop {
        match rest {
            [
                b' ' | b'\t' | b'\n' | b'\r' | 0x0B | 0x0C | b'(' | b';' | 0,
                tail @ ..,
            ] => rest = tail,
            [b'-', b'-', tail @ ..] => {
                let end = tail.iter().position(|b| *b == b'\n').unwrap_or(tail.len());
                rest = &tail[end..];
            }
            [b'/', b'*', tail @ ..] => rest = skip_block_comment(tail),
            _ => break,
        }
    }
    let len = rest
        .iter()
        .position(|b| !b.is_ascii_alphabetic())
        .unwrap_or(rest.len());
    &rest[..len]
}

/// Past a block comment's end; they nest in PostgreSQL (`src/backend/parser/scan.l`).
fn skip_block_comment(mut rest: &[u8]) -> &[u8] {
    let mut depth = 1;
    while depth > 0 {
        match rest {
            [b'*', b'/', tail @ ..] => {
                depth -= 1;
                rest = tail;
            }
            [b'/', b'*', tail @ ..] => {
                depth += 1;
                rest = tail;
            }
            [_, tail @ ..] => rest = tail,
            [] => return rest,
        }
    }
    rest
}

/// Words that, anywhere in a text, make the session's state worth asking for afterwards.
const SUSPICIOUS: [&[u8]; 5] = [b"temp", b"advisory", b"set_config", b"declare", b"listen"];

/// Longest text that is searched; a longer one counts as suspicious.
const SEARCH_LIMIT: usize = 16 * 1024;

/// Whether a statement might change session state that its command tag does not tell.
#[must_use]
pub fn touches_session(sql: &[u8]) -> bool {
    if sql.len() > SEARCH_LIMIT {
        return true;
    }
    // DECLARE … WITH HOLD, whatever stands between its words; other cursors end by themselves.
    let [temp, advisory, set_config, _, listen] = SUSPICIOUS;
    contains_any(sql, &SUSPICIOUS)
        && contains_any(sql, &[temp, advisory, set_config, b"hold", listen])
}

/// Whether a text holds one of the words (in lower case), in any case.
pub(crate) fn contains_any(sql: &[u8], words: &[&[u8]]) -> bool {
    let mut first = [false; 256];
    for word in words {
        first[usize::from(word[0])] = true;
        first[usize::from(word[0].to_ascii_uppercase())] = true;
    }
    sql.iter().enumerate().any(|(at, byte)| {
        first[usize::from(*byte)]
            && words.iter().any(|word| {
                sql.get(at..at + word.len())
                    .is_some_and(|s| s.eq_ignore_ascii_case(word))
            })
    })
}

/// Whether a text may end prepared statements.
#[must_use]
pub fn drops_statements(sql: &[u8]) -> bool {
    sql.len() > SEARCH_LIMIT || contains_any(sql, &[b"discard", b"deallocate"])
}

/// Whether a command tag says that the session's state changed.
#[must_use]
pub fn tag_touches_session(tag: &[u8]) -> bool {
    match tag {
        b"SET" | b"RESET" | b"PREPARE" | b"LISTEN" | b"UNLISTEN" => true,
        _ => tag.starts_with(b"DISCARD") || tag.starts_with(b"DEALLOCATE"),
    }
}

/// Whether a command tag says that something may be gone that a session held: a temporary object,
/// a WITH HOLD cursor.
#[must_use]
pub fn tag_lets_go(tag: &[u8]) -> bool {
    tag.starts_with(b"DROP") || tag.starts_with(b"CLOSE CURSOR")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints() {
        for (sql, want) in [
            ("BEGIN", Hint::Begin),
            ("  start transaction", Hint::Begin),
            ("/* a /* b */ */ -- c\n commit", Hint::Commit),
            ("END;", Hint::Commit),
            ("prepare transaction 'x'", Hint::Commit),
            ("prepare x as select 1", Hint::Session),
            ("rollback", Hint::Rollback),
            ("rollback to s", Hint::Read),
            ("rollback work to savepoint s", Hint::Read),
            ("(select 1)", Hint::Read),
            ("with x as (insert into t values (1)) select 1", Hint::Write),
            ("update t set a = 1", Hint::Write),
            ("", Hint::Empty),
            ("-- nothing", Hint::Empty),
            ("set x = 1", Hint::Session),
            ("averyveryverylongword", Hint::Copy),
            ("copy t from stdin", Hint::Copy),
            ("insert into t values (1); copy t from STDIN", Hint::Copy),
        ] {
            assert_eq!(hint(sql.as_bytes()), want, "{sql}");
        }
    }

    #[test]
    fn parameters() {
        assert!(names_parameter(b"insert into t values ($1)"));
        assert!(!names_parameter(b"insert into t values ($$x$$, '$')"));
    }

    #[test]
    fn units() {
        for (sql, want) in [
            ("insert into t values (1)", Unit::Writes),
            ("INSERT INTO t VALUES (1) ; ", Unit::Writes),
            ("insert into t values (1); commit", Unit::Other),
            ("insert into t values (';')", Unit::Writes),
            ("insert into t values (';'); commit", Unit::Other),
            (
                "create function f() returns int as $$ select 1; $$ language sql",
                Unit::Writes,
            ),
            (
                "/* x */ with a as (delete from t returning 1) table a",
                Unit::Writes,
            ),
            ("create table t ()", Unit::Writes),
            ("create index concurrently i on t (a)", Unit::Other),
            ("CREATE DATABASE d", Unit::Other),
            ("alter system set x = 1", Unit::Other),
            ("explain analyze delete from t", Unit::Writes),
            ("explain delete from t", Unit::Reads),
            ("select 1", Unit::Reads),
            ("call p()", Unit::Calls),
            ("do $$ begin end $$", Unit::Writes),
            ("do $$ begin commit; end $$", Unit::Calls),
            ("vacuum", Unit::Other),
            ("begin", Unit::Other),
            ("commit prepared 'x'", Unit::Other),
            ("copy t from stdin", Unit::Copies),
            ("copy t to stdout", Unit::Writes),
            ("lock table t", Unit::Other),
        ] {
            assert_eq!(unit(sql.as_bytes()), want, "{sql}");
        }
    }

    #[test]
    fn suspicion_is_found_anywhere_in_any_case() {
        for yes in [
            "select pg_Advisory_lock(1)",
            "create TEMP table x()",
            "select set_config('a','b',false)",
            "declare c cursor with hold for select 1",
            "DECLARE c SCROLL CURSOR WITH\n\tHOLD FOR SELECT 1",
        ] {
            assert!(touches_session(yes.as_bytes()), "{yes}");
        }
        for no in [
            "select abalance from pgbench_accounts where aid = $1",
            "select threshold from household",
            "declare c cursor for select 1",
        ] {
            assert!(!touches_session(no.as_bytes()), "{no}");
        }
    }
}
