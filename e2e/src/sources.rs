//! Measures the project's own sources: lines of a file without its tests, lines of a function.
//!
//! Reads Rust as text that `cargo fmt` has laid out: an item ends at the closing brace that stands
//! as far in as its first line. No parser is needed for that, and the layout is checked in CI.

use std::path::{Path, PathBuf};

use crate::Result;

/// Something longer than it may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TooLong {
    /// Path from the project's root, with the function's name when it is one.
    pub what: String,
    /// Its lines.
    pub lines: usize,
}

/// All Rust sources below a directory, tests' own files left out.
///
/// # Errors
///
/// Whatever the file system says.
pub fn rust_files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if path.is_dir() {
            if !matches!(name, "target" | "tests" | "node_modules") {
                found.extend(rust_files(&path)?);
            }
        } else if name.ends_with(".rs") && name != "tests.rs" && !name.ends_with("_tests.rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The text without its items under `#[cfg(test)]`.
#[must_use]
pub fn without_tests(text: &str) -> String {
    let mut kept = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept.push_str(line);
            kept.push('\n');
            continue;
        }
        skip_item(&mut lines);
    }
    kept
}

/// Passes over an item: a line that ends in `;`, or a block up to its closing brace.
fn skip_item<'a>(lines: &mut impl Iterator<Item = &'a str>) {
    let mut close = None;
    for line in lines {
        match &close {
            Some(brace) if line == brace => return,
            Some(_) => {}
            None if line.trim_start().starts_with("#[") => {}
            None if line.ends_with(';') || line.ends_with('}') => return,
            None if line.ends_with('{') => close = Some(format!("{}}}", indent(line))),
            None => {}
        }
    }
}

/// Functions with the number of their lines, signature and closing brace included.
#[must_use]
pub fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else {
            continue;
        };
        let close = format!("{}}}", indent(line));
        let one_line = line.ends_with('}') || line.ends_with(';');
        let length = lines
            .get(at..)
            .and_then(|rest| rest.iter().position(|line| *line == close));
        if let (false, Some(length)) = (one_line, length) {
            found.push((name, length + 1));
        }
    }
    found
}

fn function_name(line: &str) -> Option<String> {
    let mut words = line.trim_start();
    for modifier in [
        "pub(crate) ",
        "pub(super) ",
        "pub ",
        "const ",
        "async ",
        "unsafe ",
    ] {
        words = words.strip_prefix(modifier).unwrap_or(words);
    }
    let rest = words.strip_prefix("fn ")?;
    Some(
        rest.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect(),
    )
}

fn indent(line: &str) -> &str {
    line.get(..line.len() - line.trim_start().len())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
use a;

pub async fn one(
    a: u8,
) {
    if a {
    }
}

#[cfg(test)]
mod tests {
    fn two() {
    }
}

impl X {
    fn three(&self) {
        x();
    }

    fn four(&self) {}
}

#[cfg(test)]
mod more_tests;
";

    #[test]
    fn counts_what_it_says() {
        let text = without_tests(TEXT);
        assert_eq!(
            functions(&text),
            [("one".to_owned(), 6), ("three".to_owned(), 3)]
        );
        assert_eq!(text.lines().last(), Some(""));
        assert!(!text.contains("two") && !text.contains("more_tests"));
    }
}
