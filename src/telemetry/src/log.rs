//! Set-up of log output. Called once, by `main`.
//!
//! # What the levels mean
//!
//! | level | meaning |
//! |---|---|
//! | `ERROR` | a promise to the user was broken, or a person is needed |
//! | `WARN` | abnormal, but handled: a failover began, a peer was unreachable and is retried |
//! | `INFO` | a change of state that an operator wants to read: started, promoted, switched over |
//! | `DEBUG` | at most a few lines a session: logged in, moved, closed |
//! | `TRACE` | a line a message |
//!
//! An event is logged where it is handled, not where it is passed on. A client's own mistakes
//! (wrong password, syntax error) are never above `DEBUG`.

use std::fs::{File, OpenOptions};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use tracing_subscriber::EnvFilter;

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// One line of text an event, for people.
    #[default]
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

impl FromStr for LogFormat {
    type Err = InitError;

    fn from_str(s: &str) -> Result<Self, InitError> {
        match s {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(InitError::Format(other.to_owned())),
        }
    }
}

/// Why log output could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The format is not known.
    #[error("invalid log format \"{0}\"; use \"text\" or \"json\"")]
    Format(String),
    /// The filter is not a level or a list of `target=level`.
    #[error(
        "invalid log level \"{filter}\": {why}; use error, warn, info, debug, trace or target=level,..."
    )]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        why: String,
    },
    /// The log file cannot be opened.
    #[error("could not open log file \"{}\": {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A subscriber is set already.
    #[error("log output is set up already")]
    Twice,
}

/// Sets up log output for the whole process.
///
/// `filter` is a level (`info`) or a list of directives (`info,helios_proxy=trace`). Lines go to
/// standard error, or are appended to `path`; standard output belongs to the commands' results.
///
/// # Errors
/// When the filter cannot be read, the file cannot be opened, or a subscriber is set already.
pub fn init(format: LogFormat, filter: &str, path: Option<&Path>) -> Result<(), InitError> {
    let filter = parse_filter(filter)?;
    let file = path.map(open).transpose()?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(true)
        .with_ansi(file.is_none() && std::io::stderr().is_terminal());
    let done = match (format, file) {
        (LogFormat::Text, None) => builder.with_writer(std::io::stderr).try_init(),
        (LogFormat::Text, Some(file)) => builder.with_writer(file).try_init(),
        (LogFormat::Json, None) => json(builder).with_writer(std::io::stderr).try_init(),
        (LogFormat::Json, Some(file)) => json(builder).with_writer(file).try_init(),
    };
    done.map_err(|_| InitError::Twice)
}

type Builder<N, F> = tracing_subscriber::fmt::SubscriberBuilder<N, F, EnvFilter>;
type JsonFields = tracing_subscriber::fmt::format::JsonFields;
type JsonEvents = tracing_subscriber::fmt::format::Format<tracing_subscriber::fmt::format::Json>;

fn json(
    builder: Builder<
        tracing_subscriber::fmt::format::DefaultFields,
        tracing_subscriber::fmt::format::Format,
    >,
) -> Builder<JsonFields, JsonEvents> {
    // Fields on the top level: collectors index them without a rule of their own.
    builder.json().flatten_event(true).with_ansi(false)
}

fn parse_filter(filter: &str) -> Result<EnvFilter, InitError> {
    let bad = |why: String| InitError::Filter {
        filter: filter.to_owned(),
        why,
    };
    if filter.trim().is_empty() {
        return Err(bad("it is empty".to_owned()));
    }
    // EnvFilter takes a word that is no level for the name of a target: a typo would silence the
    // log. A directive without '=' has to be a level here.
    for part in filter.split(',').map(str::trim) {
        let level = part.rsplit('=').next().unwrap_or(part);
        if tracing_subscriber::filter::LevelFilter::from_str(level).is_err() {
            return Err(bad(format!("\"{level}\" is not a level")));
        }
    }
    EnvFilter::try_new(filter).map_err(|e| bad(e.to_string()))
}

fn open(path: &Path) -> Result<Arc<File>, InitError> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map(Arc::new)
        .map_err(|source| InitError::File {
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_levels_or_directives() {
        for good in [
            "info",
            "WARN",
            "off",
            "info,helios_proxy=trace",
            "helios_agent=debug",
        ] {
            assert!(parse_filter(good).is_ok(), "{good}");
        }
        for bad in ["", "inof", "info,verbose", "helios_proxy=loud"] {
            assert!(parse_filter(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_unwritable_log_file_is_named() {
        let error = open(Path::new("/nonexistent/helios.log")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/helios.log"));
    }
}
