//! Whether a statement can only read: the names that have to be looked at in the catalogs.
//!
//! Only after its connection broke, never on the forwarding path. Every word of the text counts as
//! the name of a function, a view or a table, whatever it is there: too much is asked, never too
//! little. Pure; the catalogs are the engine's. The invariant: a text for which no names are given
//! may write.

use std::collections::BTreeSet;

use squawk_syntax::ast::AstNode;
use squawk_syntax::{SourceFile, SyntaxKind};

use crate::grammar::{Kind, statements};

/// Most words of one text that are looked up.
const MAX_WORDS: usize = 2000;

/// All words of a text that holds nothing but SELECT and its kind, as names are folded by
/// PostgreSQL; `None` when the text itself says that it may write, or cannot be read.
#[must_use]
pub fn words(sql: &str) -> Option<BTreeSet<String>> {
    let kinds = statements(sql);
    let reads = |k: &Kind| {
        matches!(
            k,
            Kind::Read | Kind::LockingRead | Kind::Harmless | Kind::Empty
        )
    };
    if !kinds.iter().all(reads) {
        return None;
    }
    let words = names(sql)?;
    // SELECT … INTO makes a table.
    (!words.contains("into")).then_some(words)
}

/// All words of a text, as names are folded by PostgreSQL; `None` when it cannot be read.
#[must_use]
pub fn names(sql: &str) -> Option<BTreeSet<String>> {
    let parse = SourceFile::parse(sql);
    let tree = parse.tree();
    let tokens = tree
        .syntax()
        .descendants_with_tokens()
        .filter_map(|e| e.into_token())
        .filter(|t| !matches!(t.kind(), SyntaxKind::WHITESPACE | SyntaxKind::COMMENT));
    let mut words = BTreeSet::new();
    for token in tokens {
        let text = token.text();
        // Unicode escapes spell names otherwise.
        if text.get(..2).is_some_and(is_unicode_escape) {
            return None;
        }
        let first = text.chars().next()?;
        if let Some(quoted) = text.strip_prefix('"').and_then(|t| t.strip_suffix('"')) {
            words.insert(quoted.replace("\"\"", "\""));
        } else if first.is_alphabetic() || first == '_' {
            words.insert(text.to_lowercase());
        }
        if words.len() > MAX_WORDS {
            return None;
        }
    }
    Some(words)
}

fn is_unicode_escape(start: &str) -> bool {
    start.eq_ignore_ascii_case("u&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_counts() {
        let words = words("SELECT a.\"B\", f(1) FROM s.t AS x WHERE 'lit' = y -- z").unwrap();
        for word in ["a", "B", "f", "s", "t", "x", "y"] {
            assert!(words.contains(word), "{word}");
        }
        assert!(!words.contains("lit") && !words.contains("z"));
    }

    #[test]
    fn what_may_write_has_none() {
        for sql in [
            "insert into t values (1)",
            "select 1 into t",
            "with x as (delete from t returning 1) select * from x",
            "select U&\"d\\0061ta\"()",
            "call p()",
            "copy t to stdout",
            "explain analyze select 1",
            "select 1; commit",
            "no sql at all (",
        ] {
            assert_eq!(words(sql), None, "{sql}");
        }
        assert!(words("select 1 for update").is_some());
    }
}
