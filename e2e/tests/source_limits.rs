//! Files stay under 500 lines without their tests, functions under 70. The lists of what is longer
//! may only shrink, and an entry that is no longer needed has to go.

use std::path::Path;

use helios_e2e::Result;
use helios_e2e::sources::{TooLong, functions, rust_files, without_tests};

const FILE_LINES: usize = 500;
const FUNCTION_LINES: usize = 70;

/// Known exceptions with the lines they have now.
const LONG_FILES: &[(&str, usize)] = &[];
const LONG_FUNCTIONS: &[(&str, usize)] = &[];

#[test]
fn files_and_functions_stay_short() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()?;
    let (mut files, mut long_functions) = (Vec::new(), Vec::new());
    for path in rust_files(&root.join("src"))?
        .into_iter()
        .chain(rust_files(&root.join("e2e"))?)
    {
        let text = without_tests(&std::fs::read_to_string(&path)?);
        let name = path.strip_prefix(&root)?.display().to_string();
        for (function, lines) in functions(&text) {
            if lines > FUNCTION_LINES {
                long_functions.push(TooLong {
                    what: format!("{name}: {function}"),
                    lines,
                });
            }
        }
        let lines = text.lines().count();
        if lines > FILE_LINES {
            files.push(TooLong { what: name, lines });
        }
    }
    let mut problems = compare(&files, LONG_FILES);
    problems.extend(compare(&long_functions, LONG_FUNCTIONS));
    if problems.is_empty() {
        return Ok(());
    }
    Err(problems.join("\n").into())
}

fn compare(found: &[TooLong], known: &[(&str, usize)]) -> Vec<String> {
    let mut problems = Vec::new();
    for TooLong { what, lines } in found {
        match known.iter().find(|(name, _)| name == what) {
            None => problems.push(format!("too long: {what} has {lines} lines")),
            Some((_, was)) if lines > was => {
                problems.push(format!("grew: {what} has {lines} lines, had {was}"));
            }
            Some(_) => {}
        }
    }
    for (name, _) in known {
        if !found.iter().any(|long| long.what == *name) {
            problems.push(format!(
                "not too long any more, take it off the list: {name}"
            ));
        }
    }
    problems
}
