//! Cursors WITH HOLD: how their rows and positions are read, and what opens them again elsewhere.
//!
//! Pure. Behind its transaction such a cursor is a list of rows in its backend's memory
//! (`PersistHoldablePortal` in `src/backend/commands/portalcmds.c`) that nothing changes any more,
//! and a position. One that scrolls can be read without a trace: its position is counted, its rows
//! are fetched, and it is moved back. One that does not is used up by reading: only a backend that is
//! about to be left is asked for its rows, those that are left. The invariant: rows and position are
//! told apart from what they were by nothing but the text in `pg_cursors`.

use crate::state::{identifier, literal};

/// The query for the cursors: name, whether it is binary, whether it scrolls, and what is another
/// for another cursor of that name; ordered as [`IDENTITIES`].
///
/// Their rows are brought in a temporary table, which the user must be allowed to make.
pub const QUERY: &str = "SELECT name, is_binary::text, is_scrollable::text, \
     has_database_privilege(current_database(), 'TEMP')::text, \
     md5(concat_ws(' ', name, extract(epoch FROM creation_time))) \
     FROM pg_cursors WHERE is_holdable ORDER BY name COLLATE \"C\"";

/// An expression: the last column of [`QUERY`] of all cursors, in one text.
pub const IDENTITIES: &str = "(SELECT coalesce(string_agg(md5(concat_ws(' ', name, \
     extract(epoch FROM creation_time))), ' ' ORDER BY name COLLATE \"C\"), '') \
     FROM pg_cursors WHERE is_holdable)";

/// What a stream of binary copy data begins with, and how it ends
/// (<https://www.postgresql.org/docs/current/sql-copy.html>). The tuples in between have the form of
/// a DataRow with binary values.
pub const COPY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// See [`COPY_HEADER`].
pub const COPY_TRAILER: &[u8] = b"\xff\xff";

/// Rows fetched at a time.
pub const PIECE: u64 = 10_000;

/// A cursor, as [`QUERY`] tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    /// Its name.
    pub name: String,
    /// Its rows are sent in binary to simple queries.
    pub binary: bool,
    /// It can be read backwards.
    pub scrolls: bool,
    /// Its user may make temporary tables.
    pub may_have_table: bool,
    /// Another for another cursor of this name.
    pub identity: String,
}

/// A column of a cursor's rows, as RowDescription tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// OID of its type.
    pub kind: u32,
    /// The type's modifier.
    pub modifier: i32,
}

impl Cursor {
    /// From a row of [`QUERY`].
    #[must_use]
    pub fn from_row(row: &[Option<String>]) -> Option<Self> {
        let [
            Some(name),
            Some(binary),
            Some(scrolls),
            Some(may),
            Some(identity),
        ] = row
        else {
            return None;
        };
        Some(Self {
            name: name.clone(),
            binary: binary == "true",
            scrolls: scrolls == "true",
            may_have_table: may == "true",
            identity: identity.clone(),
        })
    }

    fn quoted(&self) -> String {
        identifier(&self.name)
    }

    /// Two statements whose tags tell the position ([`Self::position`]); the cursor is before its
    /// first row afterwards.
    #[must_use]
    pub fn rewind(&self) -> [String; 2] {
        let name = self.quoted();
        [
            format!("MOVE RELATIVE 0 IN {name}"),
            format!("MOVE BACKWARD ALL IN {name}"),
        ]
    }

    /// Where it stood: 0 before the first row, behind the last one a number that no row has.
    ///
    /// Moving back tells how many rows lay in between, and zero from the first row as from before
    /// it; the first statement tells whether it stood on a row.
    #[must_use]
    pub fn position(on_row: u64, back: u64) -> u64 {
        match (on_row, back) {
            (0, 0) => 0,
            _ => back + 1,
        }
    }

    /// Puts it where it stood.
    #[must_use]
    pub fn go_to(&self, position: u64) -> String {
        format!("MOVE ABSOLUTE {position} IN {}", self.quoted())
    }

    /// Gives its next rows, [`PIECE`] at the most.
    #[must_use]
    pub fn fetch(&self) -> String {
        format!("FETCH FORWARD {PIECE} FROM {}", self.quoted())
    }

    /// A temporary table for its rows, which the end of the transaction drops; `types` are those of
    /// its columns, as they are written in SQL.
    #[must_use]
    pub fn table(number: usize, types: &[String]) -> String {
        let columns = types.iter().enumerate();
        let columns: Vec<String> = columns.map(|(at, kind)| format!("c{at} {kind}")).collect();
        format!(
            "CREATE TEMP TABLE {} ({}) ON COMMIT DROP",
            table_name(number),
            columns.join(", ")
        )
    }

    /// Takes the rows.
    #[must_use]
    pub fn copy_in(number: usize) -> String {
        format!("COPY {} FROM STDIN (FORMAT binary)", table_name(number))
    }

    /// Opens it over that table. Its rows are held when the transaction is committed, before the
    /// table is dropped (`CommitTransaction` in `src/backend/access/transam/xact.c`).
    #[must_use]
    pub fn declare(&self, number: usize, columns: &[Column]) -> String {
        let named = columns.iter().enumerate();
        let list: Vec<String> = named
            .map(|(at, c)| format!("c{at} AS {}", identifier(&c.name)))
            .collect();
        format!(
            "DECLARE {}{}{} SCROLL CURSOR WITH HOLD FOR SELECT {} FROM {}",
            self.quoted(),
            if self.binary { " BINARY" } else { "" },
            if self.scrolls { "" } else { " NO" },
            list.join(", "),
            table_name(number)
        )
    }
}

fn table_name(number: usize) -> String {
    format!("pg_temp._helios_cursor_{number}")
}

/// The query for types as they are written in SQL, a row each in this order; no row for those that
/// no table can have.
#[must_use]
pub fn types_query(columns: &[Column]) -> String {
    let rows: Vec<String> = columns
        .iter()
        .enumerate()
        .map(|(at, c)| {
            format!(
                "({at}, {}::oid, {})",
                literal(&c.kind.to_string()),
                c.modifier
            )
        })
        .collect();
    format!(
        "SELECT format_type(t.oid, c.modifier) FROM (VALUES {}) AS c(at, kind, modifier) \
         JOIN pg_type t ON t.oid = c.kind WHERE t.typtype <> 'p' ORDER BY at",
        rows.join(", ")
    )
}

/// The number of a command tag: of the rows that `MOVE 3` or `FETCH 3` went over.
#[must_use]
pub fn counted(tag: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(tag).ok()?;
    text.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor(binary: bool) -> Cursor {
        Cursor {
            name: "my \"c".to_owned(),
            binary,
            scrolls: true,
            may_have_table: true,
            identity: String::new(),
        }
    }

    #[test]
    fn positions_are_told_by_two_counts() {
        // Three rows: before the first, on each, behind the last.
        let told = [(0, 0), (1, 0), (1, 1), (1, 2), (0, 3)];
        let positions: Vec<u64> = told
            .iter()
            .map(|(on_row, back)| Cursor::position(*on_row, *back))
            .collect();
        assert_eq!(positions, [0, 1, 2, 3, 4]);
        // None at all.
        assert_eq!(Cursor::position(0, 0), 0);
    }

    #[test]
    fn statements_quote_names() {
        let column = |name: &str| Column {
            name: name.to_owned(),
            kind: 23,
            modifier: -1,
        };
        assert_eq!(
            cursor(true).declare(2, &[column("a"), column("?column?")]),
            "DECLARE \"my \"\"c\" BINARY SCROLL CURSOR WITH HOLD FOR SELECT c0 AS \"a\", \
             c1 AS \"?column?\" FROM pg_temp._helios_cursor_2"
        );
        assert_eq!(
            Cursor::table(0, &["integer".to_owned(), "app.t".to_owned()]),
            "CREATE TEMP TABLE pg_temp._helios_cursor_0 (c0 integer, c1 app.t) ON COMMIT DROP"
        );
        assert_eq!(cursor(false).go_to(4), "MOVE ABSOLUTE 4 IN \"my \"\"c\"");
    }

    #[test]
    fn tags_count() {
        assert_eq!(counted(b"MOVE 17"), Some(17));
        assert_eq!(counted(b"FETCH 0"), Some(0));
        assert_eq!(counted(b"BEGIN"), None);
    }
}
