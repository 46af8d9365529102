//! Temporary objects that are made again together, because they name each other.
//!
//! Pure. The statements that make objects again name all that they need; whatever shares a name is
//! one group, and groups can be made one by one in any order. The invariant: when a name is not
//! understood, all is one group.

use std::collections::{BTreeMap, BTreeSet};

use helios_session::temporary::Step;

/// One step of making objects again, as far as groups go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Text<'a> {
    /// Its statement.
    pub sql: &'a str,
    /// It has to be run before anything else of the session is.
    pub first: bool,
}

/// Which step belongs to which group, and which name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Groups {
    /// The group of each step, in the order of the steps.
    of: Vec<usize>,
    /// The names of all objects.
    all: BTreeSet<String>,
    /// The group of each of them that a statement of ours has.
    names: BTreeMap<String, usize>,
    /// Groups that cannot wait.
    first: BTreeSet<usize>,
    /// How many there are.
    count: usize,
}

impl Groups {
    /// From the steps, and the names of all objects.
    pub(super) fn new(steps: &[Text<'_>], names: &BTreeSet<String>) -> Self {
        let plain = |n: &String| n.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        let mut sets = Sets::new(steps.len());
        let mut owner: BTreeMap<&str, usize> = BTreeMap::new();
        let understood = names.iter().all(plain);
        for (at, step) in steps.iter().enumerate() {
            let used: Vec<_> = tokens(step.sql).filter(|t| names.contains(*t)).collect();
            if !understood || used.is_empty() {
                // Nothing tells what it belongs to.
                sets.join(0, at);
                sets.alone = false;
            }
            for name in used {
                match owner.get(name) {
                    Some(other) => sets.join(*other, at),
                    None => drop(owner.insert(name, at)),
                }
            }
        }
        if !sets.alone {
            (1..steps.len()).for_each(|at| sets.join(0, at));
        }
        let roots: BTreeSet<usize> = (0..steps.len()).map(|at| sets.root(at)).collect();
        let number = |root: usize| roots.range(..root).count();
        let of: Vec<usize> = (0..steps.len()).map(|at| number(sets.root(at))).collect();
        let first = steps.iter().zip(&of).filter(|(step, _)| step.first);
        let first = first.map(|(_, group)| *group).collect();
        let owned = owner.iter();
        let led = owned.map(|(name, at)| ((*name).to_owned(), of.get(*at).copied().unwrap_or(0)));
        Self {
            names: led.collect(),
            all: names.clone(),
            first,
            count: roots.len(),
            of,
        }
    }

    /// From what is kept. A sequence cannot wait: to set it counts as its use, which is undone only
    /// before the session has used any.
    pub(super) fn of_steps(steps: &[Step], names: &BTreeSet<String>) -> Self {
        let text = |step: &Step| match step {
            Step::Run(sql) => (sql.clone(), uses_sequence(sql)),
            Step::Fill { table, columns } => (format!("{table} {columns}"), false),
            Step::Set { sequence } => (sequence.clone(), true),
        };
        let texts: Vec<(String, bool)> = steps.iter().map(text).collect();
        let texts: Vec<Text<'_>> = texts
            .iter()
            .map(|(sql, first)| Text { sql, first: *first })
            .collect();
        Self::new(&texts, names)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// The group of a step.
    pub(super) fn of(&self, step: usize) -> Option<usize> {
        self.of.get(step).copied()
    }

    /// Those that cannot wait.
    pub(super) fn first(&self) -> &BTreeSet<usize> {
        &self.first
    }

    /// The groups that are named; `None` where a name of an object leads to no group.
    pub(super) fn named(&self, words: &BTreeSet<String>) -> Option<BTreeSet<usize>> {
        let used = words.intersection(&self.all);
        used.map(|word| self.names.get(word).copied()).collect()
    }
}

fn uses_sequence(sql: &str) -> bool {
    let lower = sql.to_ascii_lowercase();
    lower.contains("sequence") || lower.contains("nextval") || lower.contains("identity")
}

/// Words of a statement of ours, wherever they stand: names in literals are names too.
pub(super) fn tokens(sql: &str) -> impl Iterator<Item = &str> {
    let part = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    sql.split(part).filter(|t| !t.is_empty())
}

/// Steps that belong together.
struct Sets {
    parent: Vec<usize>,
    /// Each by itself is right.
    alone: bool,
}

impl Sets {
    fn new(count: usize) -> Self {
        Self {
            parent: (0..count).collect(),
            alone: true,
        }
    }

    fn root(&self, mut at: usize) -> usize {
        while let Some(up) = self.parent.get(at).filter(|up| **up != at) {
            at = *up;
        }
        at
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        if let Some(parent) = self.parent.get_mut(a.max(b)) {
            *parent = a.min(b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(|n| (*n).to_owned()).collect()
    }

    fn groups(steps: &[&str], list: &[&str]) -> Groups {
        let mut texts = Vec::new();
        for sql in steps {
            let first = sql.contains("setval");
            texts.push(Text { sql, first });
        }
        Groups::new(&texts, &names(list))
    }

    #[test]
    fn tables_that_name_nothing_of_each_other_are_apart() {
        let all = ["t0", "t0_pkey", "t1", "t1_pkey", "t10"];
        let g = groups(
            &[
                "CREATE TABLE pg_temp.t0 (id integer)",
                "CREATE TABLE pg_temp.t1 (id integer)",
                "CREATE TABLE pg_temp.t10 (id integer)",
                "COPY pg_temp.t1 (id) FROM STDIN",
                "ALTER TABLE pg_temp.t0 ADD CONSTRAINT t0_pkey PRIMARY KEY (id)",
                "ALTER TABLE pg_temp.t1 ADD CONSTRAINT t1_pkey PRIMARY KEY (id)",
            ],
            &all,
        );
        assert_eq!(g.len(), 3);
        assert_eq!(g.of, [0, 1, 2, 1, 0, 1]);
        let named = |words: &[&str]| g.named(&names(words));
        assert_eq!(named(&["select", "t1", "other"]), Some([1].into()));
        assert_eq!(named(&["t0_pkey", "t10"]), Some([0, 2].into()));
        assert_eq!(named(&["nothing"]), Some([].into()));
    }

    #[test]
    fn what_names_each_other_is_together() {
        let g = groups(
            &[
                "CREATE SEQUENCE pg_temp.s",
                "CREATE TABLE pg_temp.a (n bigint DEFAULT nextval('pg_temp.s'::regclass))",
                "CREATE TABLE pg_temp.b (n bigint)",
                "CREATE TABLE pg_temp.c (n bigint)",
                "CREATE VIEW pg_temp.v AS SELECT a.n FROM pg_temp.a JOIN pg_temp.b USING (n)",
                "SELECT pg_catalog.setval('pg_temp.s', 1, true)",
            ],
            &["s", "a", "b", "c", "v"],
        );
        assert_eq!(g.of, [0, 0, 0, 1, 0, 0]);
        assert_eq!(g.first(), &[0].into());
    }

    #[test]
    fn what_is_not_understood_is_one_group() {
        let two = ["CREATE TABLE pg_temp.a ()", "CREATE TABLE pg_temp.b ()"];
        assert_eq!(groups(&two, &["a", "b"]).len(), 2);
        // A name with more than letters, a step that names nothing, a name without a step.
        assert_eq!(groups(&two, &["a", "b", "odd \"name"]).len(), 1);
        let three = [two[0], two[1], "SET x = 1"];
        assert_eq!(groups(&three, &["a", "b"]).of, [0, 0, 0]);
        let g = groups(&two, &["a", "b", "_a"]);
        assert_eq!(g.named(&names(&["_a"])), None);
    }
}
