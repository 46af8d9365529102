//! What can go wrong with a local cluster, each with what to do about it.

use std::path::{Path, PathBuf};

/// An error of this crate. `Display` is PostgreSQL's style: message, then detail and hint on lines
/// of their own.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// An option that cannot work.
    #[error("invalid option \"{option}\": {why}")]
    Option {
        /// Its name.
        option: &'static str,
        /// What is allowed.
        why: String,
    },
    /// Another supervisor runs on this directory.
    #[error("data directory \"{}\" is in use{}\nhint: use another directory, or stop that cluster with \"helios local stop\"", path.display(), pid.map(|p| format!(" by process {p}")).unwrap_or_default())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Who has it.
        pid: Option<i32>,
    },
    /// The directory holds something else.
    #[error("\"{}\" is not the data directory of a local cluster: {why}", path.display())]
    NotACluster {
        /// The directory.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// The directory was made by another major version of PostgreSQL.
    #[error("instance \"{instance}\" was created by PostgreSQL {found}, but the programs in \"{}\" are of version {have}\nhint: name the programs of version {found} in PG_BINDIR", bin_dir.display())]
    Version {
        /// The instance.
        instance: String,
        /// Version of the directory.
        found: String,
        /// Version of the programs.
        have: u32,
        /// The programs.
        bin_dir: PathBuf,
    },
    /// No PostgreSQL on this machine.
    #[error(
        "PostgreSQL's programs were not found\ndetail: looked in {looked}\nhint: install a PostgreSQL server of version 15 to 18, or name the folder of \"postgres\" in PG_BINDIR"
    )]
    NoPostgres {
        /// Where we looked.
        looked: String,
    },
    /// A PostgreSQL that we do not support.
    #[error("PostgreSQL {version} in \"{}\" is not supported\nhint: versions 15 to 18 are; name the folder of one in PG_BINDIR", bin_dir.display())]
    UnsupportedPostgres {
        /// What it is.
        version: String,
        /// Where.
        bin_dir: PathBuf,
    },
    /// The proxy cannot listen there.
    #[error(
        "could not listen on {address}: {why}\nhint: another program may be using the port; choose another one with \"listen\""
    )]
    Listen {
        /// The address.
        address: String,
        /// The system's reason.
        why: String,
    },
    /// The proxy did not start.
    #[error("could not start the proxy: {0}")]
    Proxy(String),
    /// An instance that never came up.
    #[error("instance \"{instance}\" did not come up: {why}\ndetail: the end of \"{}\":\n{log_tail}\nhint: {hint}", log.display())]
    NotUp {
        /// The instance.
        instance: String,
        /// What it failed with, or its last state.
        why: String,
        /// Its log.
        log: PathBuf,
        /// The end of it.
        log_tail: String,
        /// What to do.
        hint: &'static str,
    },
    /// The cluster refused a request.
    #[error("{0}")]
    Refused(String),
    /// The request was taken and did not come to what it asked for.
    #[error("{0}")]
    Aborted(String),
    /// Nothing runs on this directory.
    #[error("no cluster runs on \"{}\"\nhint: start it with \"helios local start\"", path.display())]
    NotRunning {
        /// The directory.
        path: PathBuf,
    },
    /// The supervisor answered something else than expected, or not in time.
    #[error("control connection: {0}")]
    Control(String),
    /// A file of ours that cannot be read.
    #[error("\"{}\" is damaged: {why}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The operating system said no.
    #[error("could not {what} \"{}\": {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A query on an instance failed.
    #[error("could not {what}: {why}")]
    Sql {
        /// What was tried.
        what: &'static str,
        /// The server's message.
        why: String,
    },
}

impl LocalError {
    pub(crate) fn io(what: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }
}
