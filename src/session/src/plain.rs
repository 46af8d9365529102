//! Statements that commit by themselves and whose answer the log can tell.
//!
//! A plain INSERT, UPDATE or DELETE of one table answers with a number of rows and nothing else.
//! After a crash that number can be counted in the write-ahead log, so the answer need not reach
//! the proxy before the commit begins. What is plain is read from the text alone; whether the table
//! is (no trigger, no rule, …) only the catalogs know. Pure. The invariant: in a text that is
//! plain, nothing but the one statement writes, unless a function, operator or type that it names,
//! or its table, does.

use std::collections::BTreeSet;

use crate::script::{comment, token};

/// Longest text that is looked at, in bytes.
const LIMIT: usize = 4096;

/// What the statement does to its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    /// `INSERT INTO … VALUES`.
    Insert,
    /// `UPDATE … SET`.
    Update,
    /// `DELETE FROM`.
    Delete,
}

impl Verb {
    /// The command tag for so many rows (`src/include/tcop/cmdtaglist.h`; an INSERT's has a zero
    /// where an OID used to be).
    #[must_use]
    pub fn tag(self, rows: u64) -> String {
        match self {
            Self::Insert => format!("INSERT 0 {rows}"),
            Self::Update => format!("UPDATE {rows}"),
            Self::Delete => format!("DELETE {rows}"),
        }
    }
}

/// A plain statement.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Plain {
    /// What it does.
    pub verb: Verb,
    /// The schema that it names.
    pub schema: Option<String>,
    /// Its table.
    pub table: String,
    /// All words of the text, as names are folded by PostgreSQL.
    pub words: BTreeSet<String>,
    /// How many rows the VALUES have, for an INSERT.
    pub rows: Option<u64>,
}

/// A hash. Two statements that share one by chance cost one of them its answer at a crash, as
/// nothing is told that is not found out anew then.
pub type Key = std::num::NonZeroU64;

/// Tells plain statements apart by what matters of them: two with the same key are plain or not
/// together. `None` for what is not plain. Literals make no difference, so that simple queries
/// share keys.
#[must_use]
pub fn key(sql: &[u8]) -> Option<Key> {
    let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
    scan(sql, |word| {
        hash.update(word);
        hash.update(b"\0");
    })?;
    Some(hash.digest() | 1).and_then(Key::new)
}

/// A key, for the tables of one database.
#[must_use]
pub fn in_database(key: Key, database: &str) -> Key {
    let database = xxhash_rust::xxh3::xxh3_64(database.as_bytes());
    Key::new(key.get() ^ (database << 1)).unwrap_or(key)
}

/// Reads a plain statement; `None` for what is not plain.
#[must_use]
pub fn plain(sql: &[u8]) -> Option<Plain> {
    let mut words = BTreeSet::new();
    let mut foreign = false;
    let found = scan(sql, |word| match folded(word) {
        _ if word == DOT => {}
        Some(word) => drop(words.insert(word)),
        None => foreign = true,
    })?;
    let mut name = found.name.iter().flatten();
    let (first, second) = (folded(name.next()?)?, name.next());
    let (schema, table) = match second {
        Some(second) => (Some(first), folded(second)?),
        None => (None, first),
    };
    (!foreign).then_some(Plain {
        verb: found.verb,
        schema,
        table,
        words,
        rows: found.rows,
    })
}

/// A plain statement's table, as the catalogs describe it behind the crash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its OID.
    pub oid: u32,
    /// Its file, as log records name it: tablespace, database and file node.
    pub file: String,
    /// The file of its TOAST table.
    pub toast: Option<String>,
}

/// Changes of one kind that a transaction made to one relation, by the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The relation's file; empty where a record names none.
    pub file: String,
    /// Resource manager and type of the records, without what is said of the page
    /// (`src/backend/access/rmgrdesc/heapdesc.c`).
    pub kind: String,
    /// How many records.
    pub count: u64,
}

/// What the log tells of a plain statement that has committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// It was done to so many rows.
    Rows(u64),
    /// The transaction has changed nothing: run again, it takes effect once.
    Nothing,
    /// The log does not tell.
    Unknown,
}

/// Counts the rows of a plain statement: each has one record of its own (`heap_insert`,
/// `heap_update` and `heap_delete` in `src/backend/access/heap/heapam.c`). `changes` are all that its
/// transaction left in the log, from its mark to its commit; `redefined`: the table was changed
/// since.
#[must_use]
pub fn count(plain: &Plain, table: Option<&Table>, redefined: bool, changes: &[Change]) -> Counted {
    let has = |kind: &str| changes.iter().any(|c| c.kind == kind);
    let whole = has("LogicalMessage MESSAGE") && has("Transaction COMMIT");
    // What is not logged (an unlogged table) would not be seen: the table is known first.
    let Some(table) = table.filter(|_| whole && !redefined) else {
        return Counted::Unknown;
    };
    let lasting = || changes.iter().filter(|c| !leaves_nothing(&c.kind));
    if lasting().next().is_none() {
        return Counted::Nothing;
    }
    let mut rows = 0;
    for change in lasting().filter(|c| c.kind.starts_with("Heap")) {
        let toast = table.toast.as_ref() == Some(&change.file);
        match (plain.verb, change.kind.as_str()) {
            (_, "Heap INSERT" | "Heap DELETE") if toast => {}
            _ if change.file != table.file => return Counted::Unknown,
            (Verb::Insert, "Heap INSERT")
            | (Verb::Update, "Heap UPDATE" | "Heap HOT_UPDATE")
            | (Verb::Delete, "Heap DELETE") => rows += change.count,
            _ => return Counted::Unknown,
        }
    }
    match plain.rows {
        _ if rows == 0 => Counted::Unknown,
        Some(values) if values != rows => Counted::Unknown,
        _ => Counted::Rows(rows),
    }
}

/// Records that change no row and no value: marks and commits, locks of rows, care for pages.
fn leaves_nothing(kind: &str) -> bool {
    let (manager, kind) = kind.split_once(' ').unwrap_or((kind, ""));
    match manager {
        "Transaction" | "LogicalMessage" | "XLOG" | "MultiXact" | "Standby" => true,
        "Heap" => kind == "LOCK",
        "Heap2" => kind != "MULTI_INSERT" && kind != "NEW_CID" && kind != "REWRITE",
        _ => false,
    }
}

/// What a name means; `None` where that depends on the encoding.
fn folded(word: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(word).ok()?;
    if let Some(quoted) = text.strip_prefix('"').and_then(|t| t.strip_suffix('"')) {
        return (!quoted.is_empty()).then(|| quoted.to_owned());
    }
    text.is_ascii().then(|| text.to_ascii_lowercase())
}

/// What a scan finds.
struct Found<'a> {
    verb: Verb,
    name: [Option<&'a [u8]>; 2],
    rows: Option<u64>,
}

/// Words that make a statement more than plain: rows are returned, taken from elsewhere, or done
/// something else with; `current` begins CURRENT OF.
const MORE: [&[u8]; 12] = [
    b"returning",
    b"on",
    b"with",
    b"select",
    b"from",
    b"using",
    b"table",
    b"current",
    b"portion",
    b"only",
    b"overriding",
    b"stdin",
];

/// Stands between the words of a qualified name.
const DOT: &[u8] = b".";

/// Reads a text from its first to its last token, and hands on every word behind the verb's own.
fn scan<'a>(sql: &'a [u8], mut word: impl FnMut(&'a [u8])) -> Option<Found<'a>> {
    if sql.len() > LIMIT {
        return None;
    }
    let mut tokens = Tokens { rest: sql };
    let verb = verb(&mut tokens, &mut word)?;
    let mut name = [Some(tokens.next()??), None];
    let mut next = tokens.next();
    if next.flatten() == Some(DOT) {
        name[1] = Some(tokens.next()??);
        next = tokens.next();
    }
    for (at, name) in name.iter().flatten().enumerate() {
        if !is_word(name) || is_more(name) {
            return None;
        }
        if at > 0 {
            word(DOT);
        }
        word(name);
    }
    let rows = rest(next.into_iter().chain(tokens), word)?;
    let whole = match verb {
        Verb::Insert => rows.is_some_and(|rows| rows > 0),
        Verb::Update | Verb::Delete => rows.is_none(),
    };
    whole.then_some(Found { verb, name, rows })
}

/// Reads up to the table's name.
fn verb<'a>(tokens: &mut Tokens<'a>, word: &mut impl FnMut(&'a [u8])) -> Option<Verb> {
    let first = tokens.next()??;
    word(first);
    let is = |w: &[u8]| first.eq_ignore_ascii_case(w);
    let (verb, introduced) = match () {
        () if is(b"insert") => (Verb::Insert, &b"into"[..]),
        () if is(b"delete") => (Verb::Delete, &b"from"[..]),
        () if is(b"update") => return Some(Verb::Update),
        () => return None,
    };
    let next = tokens.next()??;
    next.eq_ignore_ascii_case(introduced).then_some(verb)
}

/// Reads what follows the table's name; the number of rows behind VALUES, where that is there.
fn rest<'a>(
    tokens: impl Iterator<Item = Option<&'a [u8]>>,
    mut word: impl FnMut(&'a [u8]),
) -> Option<Option<u64>> {
    let (mut depth, mut values, mut ended) = (0_u32, None, false);
    for this in tokens {
        let this = this?;
        // Behind a semicolon there is nothing.
        if ended {
            return None;
        }
        match this {
            b";" => ended = true,
            b"(" => {
                if let Some(rows) = values.as_mut().filter(|_| depth == 0) {
                    *rows += 1;
                }
                depth += 1;
            }
            b")" => depth = depth.checked_sub(1)?,
            this if is_word(this) => {
                let begins = depth == 0 && this.eq_ignore_ascii_case(b"values");
                if is_more(this) || (begins && values.replace(0_u64).is_some()) {
                    return None;
                }
                word(this);
            }
            _ => {}
        }
    }
    (depth == 0).then_some(values)
}

fn is_more(token: &[u8]) -> bool {
    MORE.iter().any(|more| token.eq_ignore_ascii_case(more))
}

fn is_word(token: &[u8]) -> bool {
    let first = token.first().copied().unwrap_or_default();
    first == b'"' || first == b'_' || first.is_ascii_alphabetic() || !first.is_ascii()
}

/// The tokens of a text; an inner `None` where one is not understood for certain.
struct Tokens<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Tokens<'a> {
    type Item = Option<&'a [u8]>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let rest = self.rest;
            let len = match rest.first()? {
                b' ' | b'\t' | b'\n' | b'\r' | 0x0B | 0x0C => Some(1),
                b'-' if rest.starts_with(b"--") => {
                    let end = rest.iter().position(|b| matches!(b, b'\n' | b'\r'));
                    Some(end.unwrap_or(rest.len()))
                }
                b'/' if rest.starts_with(b"/*") => comment(rest),
                _ => {
                    let len = parameter(rest).or_else(|| token(rest));
                    let token = len.and_then(|len| rest.split_at_checked(len));
                    let Some((token, rest)) = token.filter(|(t, r)| is_whole(t, r)) else {
                        self.rest = &[];
                        return Some(None);
                    };
                    self.rest = rest;
                    return Some(Some(token));
                }
            };
            let Some((_, behind)) = len.and_then(|len| rest.split_at_checked(len)) else {
                self.rest = &[];
                return Some(None);
            };
            self.rest = behind;
        }
    }
}

/// Length of a parameter: `$1`.
fn parameter(rest: &[u8]) -> Option<usize> {
    let digits = rest.strip_prefix(b"$")?;
    let len = digits.iter().take_while(|b| b.is_ascii_digit()).count();
    (len > 0).then_some(len + 1)
}

/// Whether a token ends where it seems to: not a name with a doubled quote in it, nor one that is
/// spelled by Unicode escapes.
fn is_whole(token: &[u8], behind: &[u8]) -> bool {
    let doubled = token.starts_with(b"\"") && behind.starts_with(b"\"");
    let escaped = token.eq_ignore_ascii_case(b"u") && behind.starts_with(b"&");
    !doubled && !escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(sql: &str) -> Option<Plain> {
        let plain = plain(sql.as_bytes());
        assert_eq!(plain.is_some(), key(sql.as_bytes()).is_some(), "{sql}");
        plain
    }

    #[test]
    fn plain_statements_and_their_tables() {
        for (sql, verb, schema, table, rows) in [
            ("insert into t values (1)", Verb::Insert, None, "t", Some(1)),
            (
                "INSERT INTO \"T x\" (a, b) VALUES ($1, (2)), (3, 'on '' ; returning');",
                Verb::Insert,
                None,
                "T x",
                Some(2),
            ),
            (
                "update S.T set a = a + 1 where b = $1",
                Verb::Update,
                Some("s"),
                "t",
                None,
            ),
            (
                "/* x */ delete from t -- all\n ; ",
                Verb::Delete,
                None,
                "t",
                None,
            ),
            (
                "insert into \"s\".t as x default values",
                Verb::Insert,
                None,
                "",
                None,
            ),
        ] {
            let Some(plain) = read(sql) else {
                assert_eq!(table, "", "{sql}");
                continue;
            };
            assert_eq!(plain.verb, verb, "{sql}");
            assert_eq!(plain.schema.as_deref(), schema, "{sql}");
            assert_eq!(plain.table, table, "{sql}");
            assert_eq!(plain.rows, rows, "{sql}");
        }
    }

    #[test]
    fn what_is_more_than_plain() {
        for sql in [
            "",
            "select 1",
            "insert into t select 1",
            "insert into t values (1) returning a",
            "insert into t values (1) on conflict do nothing",
            "insert into t values ((select f()))",
            "insert into t values (1); delete from t",
            "insert into t values (1);;",
            "insert into t (values) values (1)) values (2)",
            "insert into t table u",
            "update only t set a = 1",
            "update t set a = 1 from u",
            "update t set a = 1 where current of c",
            "delete from t using u",
            "with x as (delete from t) select 1",
            "update t set a = e'\\''",
            "update U&\"t\" set a = 1",
            "update \"a\"\"b\" set a = 1",
            "update t set a = 'open",
            "delete from t where a in (1",
            "merge into t using u on true when matched then delete",
        ] {
            assert_eq!(read(sql), None, "{sql}");
        }
    }

    #[test]
    fn literals_make_no_difference_and_words_do() {
        let key = |sql: &str| key(sql.as_bytes()).unwrap();
        let one = key("insert into t values (1, 'a')");
        assert_eq!(one, key("insert into  t values (2, 'b') -- c"));
        assert_ne!(one, key("insert into u values (1, 'a')"));
        assert_ne!(one, key("insert into t values (1, f('a'))"));
        assert_ne!(one, key("insert into t.u values (1, 'a')"));
        assert_ne!(key("update a.b set c = 1"), key("update a b set c = 1"));
    }

    #[test]
    fn words_are_folded_as_postgresql_does() {
        let plain = read("update T set A = \"F\"(1) where x::TEXT = 'y'").unwrap();
        let words: Vec<&str> = plain.words.iter().map(String::as_str).collect();
        assert_eq!(
            words,
            ["F", "a", "set", "t", "text", "update", "where", "x"]
        );
    }

    fn change(kind: &str, file: &str, count: u64) -> Change {
        let (file, kind) = (file.to_owned(), kind.to_owned());
        Change { file, kind, count }
    }

    #[test]
    fn rows_are_counted_where_nothing_else_was_done() {
        use Counted::{Nothing, Rows, Unknown};
        let table = Table {
            oid: 1,
            file: "t".into(),
            toast: Some("toast".into()),
        };
        let insert = "insert into t values (1), (2)";
        let (update, delete) = ("update t set a = 1", "delete from t");
        type Case<'a> = (&'a str, &'a [(&'a str, &'a str, u64)], Counted);
        let cases: &[Case<'_>] = &[
            (
                insert,
                &[("Heap INSERT", "t", 2), ("Btree INSERT_LEAF", "i", 2)],
                Rows(2),
            ),
            (
                insert,
                &[("Heap INSERT", "t", 2), ("Heap INSERT", "toast", 9)],
                Rows(2),
            ),
            (
                insert,
                &[("Heap INSERT", "t", 2), ("Sequence LOG", "s", 1)],
                Rows(2),
            ),
            (insert, &[("Heap INSERT", "t", 3)], Unknown),
            (
                insert,
                &[("Heap INSERT", "t", 2), ("Heap INSERT", "u", 1)],
                Unknown,
            ),
            (
                insert,
                &[("Heap INSERT", "t", 2), ("Heap DELETE", "t", 1)],
                Unknown,
            ),
            (insert, &[("Heap2 MULTI_INSERT", "t", 2)], Unknown),
            (insert, &[("Sequence LOG", "s", 1)], Unknown),
            (
                update,
                &[("Heap UPDATE", "t", 2), ("Heap HOT_UPDATE", "t", 3)],
                Rows(5),
            ),
            (
                update,
                &[("Heap LOCK", "t", 1), ("Heap HOT_UPDATE", "t", 1)],
                Rows(1),
            ),
            (
                update,
                &[("Heap2 PRUNE", "t", 1), ("Heap LOCK", "t", 1)],
                Nothing,
            ),
            (update, &[], Nothing),
            (
                delete,
                &[("Heap DELETE", "t", 4), ("Heap DELETE", "toast", 4)],
                Rows(4),
            ),
            (delete, &[("Heap DELETE", "u", 4)], Unknown),
        ];
        for (sql, changes, want) in cases {
            let plain = read(sql).unwrap();
            let changes = changes.iter().map(|(k, f, n)| change(k, f, *n));
            let ends = ["LogicalMessage MESSAGE", "Transaction COMMIT"].map(|k| change(k, "", 1));
            let whole: Vec<Change> = changes.clone().chain(ends.clone()).collect();
            let counted = |table, redefined, all: &[Change]| count(&plain, table, redefined, all);
            assert_eq!(
                counted(Some(&table), false, &whole),
                *want,
                "{sql} {whole:?}"
            );
            assert_eq!(counted(Some(&table), true, &whole), Unknown, "redefined");
            assert_eq!(counted(None, false, &whole), Unknown, "not such a table");
            for end in ends {
                let part: Vec<Change> = whole.iter().filter(|c| **c != end).cloned().collect();
                assert_eq!(
                    counted(Some(&table), false, &part),
                    Unknown,
                    "not all was read"
                );
            }
        }
    }

    #[test]
    fn tags() {
        assert_eq!(Verb::Insert.tag(2), "INSERT 0 2");
        assert_eq!(Verb::Update.tag(0), "UPDATE 0");
        assert_eq!(Verb::Delete.tag(3), "DELETE 3");
    }
}
