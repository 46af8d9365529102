//! What statements are, read with a PostgreSQL grammar; never on the forwarding path.
//!
//! The parser is squawk's, written after `gram.y` and checked by its authors against PostgreSQL's
//! regression suite. What it cannot parse is [`Kind::Opaque`]: nothing is assumed of it.

use squawk_syntax::ast::{self, AstNode};
use squawk_syntax::{SourceFile, SyntaxKind};

use crate::state::Change;

/// What a statement may do to the transaction that it runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing at all.
    Empty,
    /// Opens a transaction block.
    Begin,
    /// COMMIT, END, PREPARE TRANSACTION.
    Commit,
    /// ROLLBACK of the whole transaction.
    Rollback,
    /// ROLLBACK AND CHAIN.
    Chain,
    /// COMMIT AND CHAIN.
    CommitAndChain,
    /// COMMIT PREPARED, ROLLBACK PREPARED: end another transaction, and run in none.
    EndPrepared,
    /// VACUUM and its kind: change nothing that anybody can read; once more does no harm.
    Repeatable,
    /// Session state and looking only: outside a transaction it writes nothing that lasts.
    Harmless,
    /// SELECT, or fetching from a cursor, without a locking clause.
    Read,
    /// A SELECT with a locking clause, at any depth.
    LockingRead,
    /// INSERT, UPDATE, DELETE, MERGE, COPY: all or nothing, also by itself.
    Write,
    /// COPY … FROM STDIN: the same, and not done before the client has ended its data.
    CopyIn,
    /// Everything else that cannot end a transaction from inside one (DDL, savepoints …).
    Other,
    /// May commit by itself or cannot be read: nothing is known.
    Opaque,
    /// A text that cannot be read, and may hold several statements, a COMMIT among them.
    Unread,
}

/// The statements of a query string; `[Opaque]` when it cannot be parsed, or `[Unread]`.
#[must_use]
pub fn statements(sql: &str) -> Vec<Kind> {
    let parse = SourceFile::parse(sql);
    if !parse.errors().is_empty() {
        let text = sql.trim_end();
        let several = text.strip_suffix(';').unwrap_or(text).contains(';');
        return vec![if several { Kind::Unread } else { Kind::Opaque }];
    }
    let kinds: Vec<Kind> = parse
        .tree()
        .syntax()
        .children()
        .map(|node| kind(&node))
        .collect();
    if kinds.is_empty() {
        vec![Kind::Empty]
    } else {
        kinds
    }
}

/// Names of custom settings (`a.b`) that a text may set, by SET or by `set_config('a.b', …)`.
///
/// PostgreSQL lists them in no view; the backend is asked for each. A name too many does no harm.
#[must_use]
pub fn custom_settings(sql: &str) -> Vec<String> {
    let parse = SourceFile::parse(sql);
    let tree = parse.tree();
    let tokens: Vec<_> = tree
        .syntax()
        .descendants_with_tokens()
        .filter_map(|e| e.into_token())
        .filter(|t| !matches!(t.kind(), SyntaxKind::WHITESPACE | SyntaxKind::COMMENT))
        .collect();
    let text = |at: usize| tokens.get(at).map_or("", |t| t.text());
    let mut names = Vec::new();
    for at in 0..tokens.len() {
        let word = text(at);
        if word.eq_ignore_ascii_case("set") {
            let scope = ["session", "local"]
                .iter()
                .any(|s| text(at + 1).eq_ignore_ascii_case(s));
            let first = at + 1 + usize::from(scope);
            if text(first + 1) == "." {
                names.push(format!("{}.{}", bare(text(first)), bare(text(first + 2))));
            }
        } else if word.eq_ignore_ascii_case("set_config") && text(at + 1) == "(" {
            let name = text(at + 2).trim_matches('\'');
            if name.contains('.') {
                names.push(name.to_ascii_lowercase());
            }
        }
    }
    names
}

/// Whether a text may call `set_config` with a name that is bound to it.
#[must_use]
pub fn binds_setting(sql: &str) -> bool {
    let word = b"set_config";
    sql.contains('$')
        && sql
            .as_bytes()
            .windows(word.len())
            .any(|w| w.eq_ignore_ascii_case(word))
}

/// The argument of the only call of `nextval` in a text, when it is a plain literal.
#[must_use]
pub fn nextval_literal(sql: &str) -> Option<String> {
    let parse = SourceFile::parse(sql);
    let tree = parse.tree();
    let mut tokens = tree
        .syntax()
        .descendants_with_tokens()
        .filter_map(|e| e.into_token())
        .filter(|t| !matches!(t.kind(), SyntaxKind::WHITESPACE | SyntaxKind::COMMENT));
    let mut found = None;
    while let Some(token) = tokens.next() {
        if !bare(token.text()).eq("nextval") {
            continue;
        }
        if found.is_some() || tokens.next()?.text() != "(" {
            return None;
        }
        let argument = tokens.next()?;
        let literal = argument.text().strip_prefix('\'')?.strip_suffix('\'')?;
        // Nothing but a cast may follow: the argument is not computed.
        if !matches!(tokens.next()?.text(), ")" | "::" | ":") {
            return None;
        }
        found = Some(literal.replace("''", "'"));
    }
    found
}

/// Whether a text is one SELECT, without a FROM at any depth.
#[must_use]
pub fn selects_without_from(sql: &str) -> bool {
    let parse = SourceFile::parse(sql);
    let tree = parse.tree();
    let from = |e: squawk_syntax::SyntaxElement| {
        e.as_token()
            .is_some_and(|t| t.kind() == SyntaxKind::FROM_KW)
    };
    single(sql) == Kind::Read && !tree.syntax().descendants_with_tokens().any(from)
}

/// The PREPARE of `name` alone, from the text of the query that it came in: PostgreSQL shows the
/// whole query for each statement that was prepared in it. `None` where it cannot be found.
#[must_use]
pub fn prepare_of(sql: &str, name: &str) -> Option<String> {
    let parse = SourceFile::parse(sql);
    let nodes: Vec<_> = parse.tree().syntax().children().collect();
    let prepares = nodes
        .iter()
        .rev()
        .filter_map(|n| ast::Prepare::cast(n.clone()));
    let mut of_name = prepares.filter(|p| {
        let given = p.name().map(|n| n.syntax().text().to_string());
        given.is_some_and(|given| bare(given.trim()) == name)
    });
    of_name.next().map(|p| p.syntax().text().to_string())
}

/// What a text prepares and gives up by name, in order.
#[must_use]
pub fn changes(sql: &str) -> Vec<Change> {
    let parse = SourceFile::parse(sql);
    let changed = |node: squawk_syntax::SyntaxNode| match node.kind() {
        SyntaxKind::DEALLOCATE => {
            let tokens = node
                .descendants_with_tokens()
                .filter_map(|e| e.into_token());
            let words = tokens.filter(|t| {
                let kind = t.kind();
                !matches!(kind, SyntaxKind::WHITESPACE | SyntaxKind::COMMENT) && t.text() != ";"
            });
            let last = words.last()?;
            Some(match last.text().eq_ignore_ascii_case("all") {
                true => Change::AllDeallocated,
                false => Change::Deallocated(bare(last.text())),
            })
        }
        _ => {
            let prepare = ast::Prepare::cast(node)?;
            let name = prepare.name()?.syntax().text().to_string();
            let text = prepare.syntax().text().to_string();
            Some(Change::Prepared(bare(name.trim()), text))
        }
    };
    parse
        .tree()
        .syntax()
        .children()
        .filter_map(changed)
        .collect()
}

/// The identifier of the last PREPARE TRANSACTION in a text, when it is a plain literal.
#[must_use]
pub fn prepared_transaction(sql: &str) -> Option<String> {
    let parse = SourceFile::parse(sql);
    let nodes: Vec<_> = parse.tree().syntax().children().collect();
    let prepare = nodes
        .iter()
        .rfind(|n| n.kind() == SyntaxKind::PREPARE_TRANSACTION)?;
    first_literal(prepare)
}

/// The identifier of the prepared transaction that a text, a single statement, ends, and whether it
/// is to be committed.
#[must_use]
pub fn ended_prepared(sql: &str) -> Option<(String, bool)> {
    let parse = SourceFile::parse(sql);
    let mut nodes = parse.tree().syntax().children();
    let node = nodes.find(|n| n.kind() != SyntaxKind::EMPTY_STMT)?;
    let commits = match node.kind() {
        SyntaxKind::COMMIT_PREPARED => true,
        SyntaxKind::ROLLBACK_PREPARED => false,
        _ => return None,
    };
    first_literal(&node).map(|gid| (gid, commits))
}

/// The first string in a statement, when it is a plain one.
fn first_literal(node: &squawk_syntax::SyntaxNode) -> Option<String> {
    let mut tokens = node
        .descendants_with_tokens()
        .filter_map(|e| e.into_token());
    let literal = tokens.find(|t| t.text().starts_with('\''))?;
    let quoted = literal.text().strip_prefix('\'')?.strip_suffix('\'')?;
    Some(quoted.replace("''", "'"))
}

pub(crate) fn bare(identifier: &str) -> String {
    match identifier
        .strip_prefix('"')
        .and_then(|i| i.strip_suffix('"'))
    {
        Some(quoted) => quoted.replace("\"\"", "\""),
        None => identifier.to_ascii_lowercase(),
    }
}

/// The statement, when a text holds exactly one.
#[must_use]
pub fn single(sql: &str) -> Kind {
    let mut kinds = statements(sql);
    kinds.retain(|k| *k != Kind::Empty);
    match kinds.as_slice() {
        [] => Kind::Empty,
        [one] => *one,
        _ => Kind::Opaque,
    }
}

fn kind(node: &squawk_syntax::SyntaxNode) -> Kind {
    use SyntaxKind as S;
    let has = |word: S| {
        node.descendants_with_tokens()
            .any(|e| e.as_token().is_some_and(|t| t.kind() == word))
    };
    match node.kind() {
        S::EMPTY_STMT => Kind::Empty,
        S::BEGIN => Kind::Begin,
        S::COMMIT_TRANSACTION if has(S::CHAIN_KW) && !has(S::NO_KW) => Kind::CommitAndChain,
        S::ROLLBACK_TRANSACTION if has(S::CHAIN_KW) && !has(S::NO_KW) => Kind::Chain,
        S::COMMIT_PREPARED | S::ROLLBACK_PREPARED => Kind::EndPrepared,
        S::VACUUM | S::ANALYZE | S::CLUSTER | S::REINDEX | S::CHECKPOINT => Kind::Repeatable,
        S::COMMIT_TRANSACTION | S::PREPARE_TRANSACTION => Kind::Commit,
        S::ROLLBACK_TRANSACTION => Kind::Rollback,
        S::SET
        | S::SHOW
        | S::RESET
        | S::SET_TRANSACTION
        | S::SET_ROLE
        | S::RESET_ROLE
        | S::SET_SESSION_AUTH
        | S::RESET_SESSION_AUTH
        | S::DISCARD
        | S::DEALLOCATE
        | S::PREPARE
        | S::LISTEN
        | S::UNLISTEN => Kind::Harmless,
        S::SELECT | S::COMPOUND_SELECT | S::PAREN_SELECT | S::VALUES | S::TABLE | S::DECLARE => {
            read_kind(node)
        }
        S::FETCH | S::MOVE | S::CLOSE => Kind::Read,
        S::INSERT | S::UPDATE | S::DELETE | S::MERGE => Kind::Write,
        S::COPY if has(S::PROGRAM_KW) => Kind::Opaque,
        S::COPY if has(S::STDIN_KW) => Kind::CopyIn,
        S::COPY => Kind::Write,
        S::CALL
        | S::DO
        | S::CREATE_DATABASE
        | S::DROP_DATABASE
        | S::CREATE_INDEX
        | S::DROP_INDEX
        | S::ALTER_SYSTEM
        | S::ALTER_DATABASE
        | S::CREATE_TABLESPACE
        | S::DROP_TABLESPACE
        | S::CREATE_SUBSCRIPTION
        | S::DROP_SUBSCRIPTION
        | S::ALTER_SUBSCRIPTION
        | S::ALTER_TABLE
        | S::EXECUTE
        | S::EXPLAIN
        | S::REPACK => Kind::Opaque,
        _ => Kind::Other,
    }
}

fn read_kind(node: &squawk_syntax::SyntaxNode) -> Kind {
    let mut kind = Kind::Read;
    for inner in node.descendants() {
        match inner.kind() {
            // A writing CTE makes the whole statement a write.
            SyntaxKind::INSERT | SyntaxKind::UPDATE | SyntaxKind::DELETE | SyntaxKind::MERGE => {
                return Kind::Write;
            }
            SyntaxKind::LOCKING_CLAUSE => kind = Kind::LockingRead,
            _ => {}
        }
    }
    kind
}

impl Kind {
    /// Whether a statement that is run inside a transaction block cannot end it. CALL and DO
    /// cannot commit there ("invalid transaction termination", `src/pl/plpgsql/src/pl_exec.c`),
    /// and VACUUM and its kind are refused.
    #[must_use]
    pub fn stays_inside(self) -> bool {
        !matches!(
            self,
            Self::Commit | Self::Rollback | Self::Chain | Self::CommitAndChain | Self::Unread
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn custom_names() {
        let sql = "set a.b = 1; SET LOCAL c.D to 'x'; select set_config('e.f', 'v', false); \
                   set work_mem = 1; set session \"G\".h = 2";
        assert_eq!(custom_settings(sql), ["a.b", "c.d", "e.f", "G.h"]);
    }

    #[test]
    fn the_sequence_that_a_text_names() {
        let name = |sql| nextval_literal(sql);
        assert_eq!(name("select nextval('s')").as_deref(), Some("s"));
        assert_eq!(
            name("SELECT pg_catalog.NEXTVAL ( 'a.\"S''x\"'::regclass ) as v").as_deref(),
            Some("a.\"S'x\"")
        );
        assert_eq!(name("select nextval($1)"), None);
        assert_eq!(name("select nextval('a' || 'b')"), None);
        assert_eq!(name("select nextval('a'), nextval('b')"), None);
        assert_eq!(name("select nextval(E'a')"), None);
        assert_eq!(name("select 1"), None);
    }

    #[test]
    fn the_transaction_that_is_prepared() {
        let gid = |sql| prepared_transaction(sql);
        assert_eq!(
            gid("PREPARE TRANSACTION 'it''s'; ").as_deref(),
            Some("it's")
        );
        assert_eq!(
            gid("insert into t values ('x'); prepare transaction 'b'").as_deref(),
            Some("b")
        );
        assert_eq!(gid("commit prepared 'x'"), None);
        let ended = |sql| ended_prepared(sql);
        assert_eq!(ended("commit prepared 'a''b';"), Some(("a'b".into(), true)));
        assert_eq!(ended("ROLLBACK PREPARED 'x'"), Some(("x".into(), false)));
        assert_eq!(ended("rollback prepared E'x'"), None);
        assert_eq!(ended("commit"), None);
        assert_eq!(gid("prepare p as select 'x'"), None);
    }

    #[test]
    fn one_prepare_of_several() {
        let sql = "prepare a (int) as select $1; PREPARE \"B\" AS table t; select 1";
        let found = |name| prepare_of(sql, name).map(|s| s.trim_end_matches(';').to_owned());
        assert_eq!(found("a").as_deref(), Some("prepare a (int) as select $1"));
        assert_eq!(found("B").as_deref(), Some("PREPARE \"B\" AS table t"));
        assert_eq!(found("b"), None);
    }

    #[test]
    fn what_is_prepared_and_given_up() {
        let sql = "deallocate a; DEALLOCATE PREPARE \"B\"; prepare c as select 1; select 2; \
                   deallocate prepare all; prepare transaction 'x'";
        let gone = |name: &str| Change::Deallocated(name.into());
        let found = changes(sql);
        assert_eq!(found[..2], [gone("a"), gone("B")]);
        assert!(matches!(&found[2], Change::Prepared(name, _) if name == "c"));
        assert_eq!(found[3..], [Change::AllDeallocated]);
    }

    #[test]
    fn kinds() {
        for (sql, want) in [
            ("begin", Kind::Begin),
            (
                "start transaction isolation level serializable, read only",
                Kind::Begin,
            ),
            ("commit", Kind::Commit),
            ("end", Kind::Commit),
            ("commit and chain", Kind::CommitAndChain),
            ("end work and chain", Kind::CommitAndChain),
            ("rollback and chain", Kind::Chain),
            ("vacuum full t", Kind::Repeatable),
            ("analyze", Kind::Repeatable),
            ("reindex table concurrently t", Kind::Repeatable),
            ("create index concurrently i on t (a)", Kind::Opaque),
            ("alter system set a = 1", Kind::Opaque),
            ("commit and no chain", Kind::Commit),
            ("commit prepared 'x'", Kind::EndPrepared),
            ("rollback prepared 'x'", Kind::EndPrepared),
            ("prepare transaction 'x'", Kind::Commit),
            ("rollback", Kind::Rollback),
            ("abort", Kind::Rollback),
            ("rollback to savepoint s", Kind::Other),
            ("savepoint s", Kind::Other),
            ("set search_path = a", Kind::Harmless),
            ("select 1", Kind::Read),
            (
                "select * from t where a = $1 for update skip locked",
                Kind::LockingRead,
            ),
            (
                "select * from (select * from t for share) x",
                Kind::LockingRead,
            ),
            (
                "with x as (delete from t returning *) select * from x",
                Kind::Write,
            ),
            (
                "with x as (select 1) insert into t select * from x",
                Kind::Write,
            ),
            ("insert into t values (';')", Kind::Write),
            ("copy t from stdin", Kind::CopyIn),
            ("copy t to stdout", Kind::Write),
            ("call p()", Kind::Opaque),
            ("do $$ begin commit; end $$", Kind::Opaque),
            ("create temp table t (a int)", Kind::Other),
            ("", Kind::Empty),
            (";", Kind::Empty),
            ("-- only a comment", Kind::Empty),
            ("selec 1", Kind::Opaque),
            ("select 1; commit", Kind::Opaque),
            ("select 1;", Kind::Read),
            ("select ';commit;'", Kind::Read),
            ("select $a$;commit;$a$", Kind::Read),
        ] {
            assert_eq!(single(sql), want, "{sql}");
        }
        assert_eq!(statements("begin; select 1"), [Kind::Begin, Kind::Read]);
    }
}
