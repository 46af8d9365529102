//! Walks a parsed file, remembers which keys were asked for, and collects what is wrong.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Problem;
use super::keys::not_yet;

/// What is wrong so far.
#[derive(Debug)]
pub(super) struct Problems<'a> {
    text: &'a str,
    found: Vec<Problem>,
}

impl<'a> Problems<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self {
            text,
            found: Vec::new(),
        }
    }

    /// Notes a problem at a byte of the file.
    pub(super) fn add(&mut self, at: usize, message: impl Into<String>) {
        let before = self.text.as_bytes().get(..at).unwrap_or_default();
        self.found.push(Problem {
            line: before.iter().filter(|&&b| b == b'\n').count() + 1,
            message: message.into(),
        });
    }

    pub(super) fn finish<T>(mut self, value: T) -> Result<T, Vec<Problem>> {
        if self.found.is_empty() {
            return Ok(value);
        }
        self.found.sort_by_key(|problem| problem.line);
        Err(self.found)
    }
}

/// One section of the file, absent or present.
pub(super) struct Section<'a, 'p, 't> {
    name: &'static str,
    /// How messages call it.
    shown: &'static str,
    at: usize,
    table: Option<&'a DeTable<'a>>,
    asked: Vec<&'static str>,
    problems: &'p mut Problems<'t>,
}

impl<'a, 'p, 't> Section<'a, 'p, 't> {
    /// The section `[name]` of the file.
    pub(super) fn of(
        file: &'a DeTable<'a>,
        name: &'static str,
        problems: &'p mut Problems<'t>,
    ) -> Self {
        let value = file.get(name);
        let at = value.map_or(0, |v| v.span().start);
        let table = value.and_then(|v| v.get_ref().as_table());
        if value.is_some() && table.is_none() {
            problems.add(at, format!("\"{name}\" must be a section: [{name}]"));
        }
        Self::new(name, at, table, problems)
    }

    /// A section whose table is known.
    pub(super) fn new(
        name: &'static str,
        at: usize,
        table: Option<&'a DeTable<'a>>,
        problems: &'p mut Problems<'t>,
    ) -> Self {
        let shown = match name {
            "backends.instances" => "[[backends.instances]]",
            name => name,
        };
        Self {
            name,
            shown,
            at,
            table,
            asked: Vec::new(),
            problems,
        }
    }

    /// Sets `target` when the key is there.
    pub(super) fn set<T>(
        &mut self,
        key: &'static str,
        target: &mut T,
        parse: impl Fn(&DeValue<'_>) -> Result<T, String>,
    ) -> &mut Self {
        if let Some(value) = self.get(key, parse) {
            *target = value;
        }
        self
    }

    /// Sets `target` to `Some` when the key is there.
    pub(super) fn set_some<T>(
        &mut self,
        key: &'static str,
        target: &mut Option<T>,
        parse: impl Fn(&DeValue<'_>) -> Result<T, String>,
    ) -> &mut Self {
        if let Some(value) = self.get(key, parse) {
            *target = Some(value);
        }
        self
    }

    /// The key's value, when it is there and good.
    pub(super) fn get<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&DeValue<'_>) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.raw(key)?;
        match parse(value.get_ref()) {
            Ok(value) => Some(value),
            Err(why) => {
                let message = format!("invalid value for \"{key}\" in {}: {why}", self.title());
                self.problems.add(value.span().start, message);
                None
            }
        }
    }

    /// The key's value as it stands, which the caller must judge.
    pub(super) fn raw(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.asked.push(key);
        self.table?.get(key)
    }

    /// Notes a problem that concerns several keys, at the first of them that is there.
    pub(super) fn problem(&mut self, keys: &[&str], message: impl Into<String>) {
        let place = keys.iter().find_map(|key| self.table?.get(*key));
        let at = place.map_or(self.at, |value| value.span().start);
        self.problems.add(at, message);
    }

    /// A second name of a key: used when the first is absent, a problem when both are there.
    pub(super) fn alias(&mut self, key: &'static str, alias: &'static str) -> &'static str {
        self.asked.extend([key, alias]);
        let Some(table) = self.table else { return key };
        match (table.get(key), table.get(alias)) {
            (Some(_), Some(second)) => {
                let message =
                    format!("\"{alias}\" is another name of \"{key}\", which is given too");
                self.problems.add(second.span().start, message);
                key
            }
            (None, Some(_)) => alias,
            _ => key,
        }
    }

    /// Refuses every key that was not asked for.
    pub(super) fn finish(self) {
        let title = self.title();
        for (key, _) in self.table.into_iter().flatten() {
            let (name, at) = (key.get_ref().as_ref(), key.span().start);
            if self.asked.contains(&name) {
                continue;
            }
            if not_yet(self.name).contains(&name) {
                let message = format!("\"{name}\" in {title} is not supported by this version");
                self.problems.add(at, message);
                continue;
            }
            let known = self.asked.iter().chain(not_yet(self.name)).copied();
            let hint = did_you_mean(name, known);
            self.problems
                .add(at, format!("unknown key \"{name}\" in {title}{hint}"));
        }
    }

    fn title(&self) -> String {
        if self.shown.starts_with('[') {
            self.shown.to_owned()
        } else {
            format!("[{}]", self.shown)
        }
    }
}

/// `, did you mean "..."?` when a known name is near enough.
pub(super) fn did_you_mean<'k>(name: &str, known: impl Iterator<Item = &'k str>) -> String {
    let nearest = known
        .map(|key| (strsim::jaro_winkler(name, key), key))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((likeness, key)) if likeness >= 0.75 => format!(", did you mean \"{key}\"?"),
        _ => String::new(),
    }
}
