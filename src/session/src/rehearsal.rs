//! Statements that a backend is warmed up with, before a session goes on with it.
//!
//! Pure. The invariant: what is rehearsed changes nothing and calls no function that a user has
//! made.

use squawk_syntax::ast::AstNode;
use squawk_syntax::{SourceFile, SyntaxKind};

use crate::grammar::{Kind, single};

/// Longer statements are not rehearsed, in bytes.
const LIMIT: usize = 8192;

/// A statement, and how much of it may be rehearsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rehearsal {
    /// What has the server look up what the statement names: the statement itself, only parsed, or
    /// EXPLAIN of it, which plans it too.
    pub sql: String,
    /// Its parameters, each of which may be null.
    pub parameters: u16,
    /// It is EXPLAIN, and may be executed.
    pub runs: bool,
    /// The statement without its constants: what it has in common with others like it.
    pub shape: String,
}

/// How `sql` is rehearsed; `None` for what is not exactly one query or change of rows.
///
/// A statement that calls a function by its name is not planned: the planner may execute it.
#[must_use]
pub fn rehearsal(sql: &str) -> Option<Rehearsal> {
    if sql.len() > LIMIT || !matches!(single(sql), Kind::Read | Kind::LockingRead | Kind::Write) {
        return None;
    }
    let parse = SourceFile::parse(sql);
    let tree = parse.tree();
    let mut nodes = tree.syntax().children();
    let node = nodes.find(|n| n.kind() != SyntaxKind::EMPTY_STMT)?;
    if !is_planned(node.kind()) {
        return None;
    }
    let mut shape = String::new();
    let mut parameters = 0;
    for token in node
        .descendants_with_tokens()
        .filter_map(|e| e.into_token())
    {
        let text = token.text();
        match token.kind() {
            SyntaxKind::WHITESPACE | SyntaxKind::COMMENT | SyntaxKind::SEMICOLON => continue,
            SyntaxKind::POSITIONAL_PARAM => {
                let number = text.strip_prefix('$')?.parse::<u16>().ok()?;
                parameters = parameters.max(number);
                shape.push('?');
            }
            _ if is_constant(text) => shape.push('?'),
            _ => shape.push_str(text),
        }
        shape.push(' ');
    }
    let calls = node
        .descendants()
        .any(|n| n.kind() == SyntaxKind::CALL_EXPR);
    let text = node.text().to_string();
    let text = text.strip_suffix(';').unwrap_or(&text);
    Some(Rehearsal {
        sql: match calls {
            true => text.to_owned(),
            false => format!("EXPLAIN {text}"),
        },
        parameters,
        runs: !calls,
        shape,
    })
}

fn is_planned(kind: SyntaxKind) -> bool {
    use SyntaxKind as S;
    matches!(
        kind,
        S::SELECT | S::COMPOUND_SELECT | S::INSERT | S::UPDATE | S::DELETE | S::MERGE
    )
}

fn is_constant(text: &str) -> bool {
    text.starts_with(|c: char| c == '\'' || c.is_ascii_digit()) || text.contains('\'')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(sql: &str) -> Option<(String, u16, bool)> {
        rehearsal(sql).map(|r| (r.sql, r.parameters, r.runs))
    }

    #[test]
    fn queries_and_changes_are_planned() {
        for sql in [
            "SELECT balance FROM accounts WHERE id = 5 FOR UPDATE",
            "INSERT INTO ledger (client, n) VALUES (1, 'x')",
            "update accounts set balance = balance + 1 where id = 7 returning balance",
            "WITH old AS (SELECT 1) SELECT * FROM old",
        ] {
            assert_eq!(of(sql), Some((format!("EXPLAIN {sql}"), 0, true)), "{sql}");
        }
    }

    #[test]
    fn what_calls_a_function_is_only_parsed() {
        for sql in [
            "SELECT pay(1)",
            "UPDATE accounts SET balance = app.fee(balance)",
            "SELECT count(*) FROM accounts",
        ] {
            assert_eq!(of(sql), Some((sql.to_owned(), 0, false)), "{sql}");
        }
    }

    #[test]
    fn parameters_are_counted() {
        let sql = "UPDATE accounts SET balance = $2 WHERE id = $1;";
        let explained = "EXPLAIN UPDATE accounts SET balance = $2 WHERE id = $1";
        assert_eq!(of(sql), Some((explained.to_owned(), 2, true)));
    }

    #[test]
    fn everything_else_is_left_alone() {
        for sql in [
            "",
            "COMMIT",
            "SELECT 1; SELECT 2",
            "CREATE TABLE t (a int)",
            "COPY t FROM STDIN",
            "FETCH 5 FROM c",
            "SELECT not really (",
            "EXPLAIN ANALYZE DELETE FROM t",
            "SET search_path = a",
            "CALL p()",
        ] {
            assert_eq!(of(sql), None, "{sql}");
        }
    }

    #[test]
    fn constants_do_not_make_another_shape() {
        let shape = |sql| rehearsal(sql).map(|r| r.shape);
        assert_eq!(
            shape("SELECT * FROM t WHERE a = 1 AND b = 'x'"),
            shape("SELECT * FROM t  WHERE a = 23 AND b = E'y\\'z';")
        );
        assert_ne!(shape("SELECT a FROM t1"), shape("SELECT a FROM t2"));
    }
}
