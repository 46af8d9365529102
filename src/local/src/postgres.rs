//! Finding PostgreSQL's programs, and what their versions are.

use std::path::{Path, PathBuf};

use crate::error::LocalError;

/// Oldest and newest major version that is supported.
pub const SUPPORTED: std::ops::RangeInclusive<u32> = 15..=18;
/// Where Debian puts each version.
const DEBIAN: &str = "/usr/lib/postgresql";

/// A folder of PostgreSQL's programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BinDir {
    /// The folder.
    pub path: PathBuf,
    /// Major version.
    pub major: u32,
}

/// Finds the programs: `given`, else `PG_BINDIR`, else `PATH`, else Debian's newest supported one.
///
/// # Errors
/// [`LocalError::NoPostgres`] and [`LocalError::UnsupportedPostgres`]; a folder that was named is
/// never passed over for another one.
pub fn find_bin_dir(given: Option<&Path>) -> Result<BinDir, LocalError> {
    let named = given
        .map(Path::to_owned)
        .or_else(|| std::env::var_os("PG_BINDIR").map(PathBuf::from));
    if let Some(dir) = named {
        return match version(&dir) {
            None => Err(LocalError::NoPostgres {
                looked: format!("\"{}\", which was named", dir.display()),
            }),
            Some(text) => supported(&dir, &text),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = std::env::split_paths(&path).chain(debian());
    let mut unsupported = None;
    for dir in candidates.filter(|dir| dir.is_absolute() && complete(dir)) {
        let Some(text) = version(&dir) else { continue };
        match supported(&dir, &text) {
            Ok(found) => return Ok(found),
            Err(error) => unsupported = unsupported.or(Some(error)),
        }
    }
    Err(unsupported.unwrap_or_else(|| LocalError::NoPostgres {
        looked: format!("PG_BINDIR, PATH and \"{DEBIAN}/*/bin\""),
    }))
}

/// Whether everything that is run lives there; `PATH` often has only the clients.
fn complete(dir: &Path) -> bool {
    [
        "postgres",
        "initdb",
        "pg_ctl",
        "pg_basebackup",
        "pg_rewind",
        "pg_controldata",
    ]
    .iter()
    .all(|program| dir.join(program).exists())
}

/// Debian's folders, newest version first.
fn debian() -> Vec<PathBuf> {
    let mut versions: Vec<u32> = std::fs::read_dir(DEBIAN)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    versions.sort_unstable_by(|a, b| b.cmp(a));
    versions
        .into_iter()
        .map(|version| Path::new(DEBIAN).join(version.to_string()).join("bin"))
        .collect()
}

/// `15.18` and the like; `None`: no `postgres` there that runs.
fn version(dir: &Path) -> Option<String> {
    let output = std::process::Command::new(dir.join("postgres"))
        .arg("--version")
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().nth(2).map(str::to_owned)
}

fn supported(dir: &Path, version: &str) -> Result<BinDir, LocalError> {
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    match digits.parse() {
        Ok(major) if SUPPORTED.contains(&major) => Ok(BinDir {
            path: dir.to_owned(),
            major,
        }),
        _ => Err(LocalError::UnsupportedPostgres {
            version: version.to_owned(),
            bin_dir: dir.to_owned(),
        }),
    }
}

/// Refuses a data directory that another major version made.
pub(crate) fn check_version(instance: &str, data: &Path, bin: &BinDir) -> Result<(), LocalError> {
    let Ok(found) = std::fs::read_to_string(data.join("PG_VERSION")) else {
        return Ok(()); // empty, or not one: the agent judges that
    };
    if found.trim() == bin.major.to_string() {
        return Ok(());
    }
    Err(LocalError::Version {
        instance: instance.to_owned(),
        found: found.trim().to_owned(),
        have: bin.major,
        bin_dir: bin.path.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_judged() {
        let dir = Path::new("/x");
        assert_eq!(supported(dir, "15.18").unwrap().major, 15);
        assert_eq!(supported(dir, "18beta1").unwrap().major, 18);
        for bad in ["14.2", "19.0", "x", ""] {
            let error = supported(dir, bad).unwrap_err();
            assert!(
                matches!(error, LocalError::UnsupportedPostgres { .. }),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_named_folder_without_postgres_is_an_error() {
        let error = find_bin_dir(Some(Path::new("/nonexistent"))).unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }
}
