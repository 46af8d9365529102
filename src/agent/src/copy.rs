//! The first data directory as a copy of a running server, which knows nothing of this cluster.
//!
//! `pg_basebackup` copies it; a server alone (`postgres --single`) then recovers what was copied and
//! makes the superuser that the service logs in as. What the other server was configured with does
//! not count here: it may name files and libraries that are not there.
//! <https://www.postgresql.org/docs/current/app-postgres.html>
//!
//! Invariant: all of that happens beside the data directory's place. What is put there is whole, and
//! of the major version that runs here.

use std::path::Path;

use helios_api::agent::AgentError;

use crate::config::BaseBackup;
use crate::error::{failed, file_failed, refused};
use crate::files::{self, remove_if_exists};
use crate::instance::Instance;
use crate::source::as_conninfo;
use crate::{logs, sql, tools};

/// What of the other server's configuration is taken away. Its passwords and its client
/// authentication are data, and files that are written at each start.
const NOT_OURS: [&str; 4] = [
    "postgresql.auto.conf",
    "standby.signal",
    "recovery.signal",
    "postmaster.opts",
];

impl Instance {
    /// Builds the copy beside the data directory's place.
    pub(crate) async fn copy(&self, source: &BaseBackup) -> Result<(), AgentError> {
        self.step("looking at the server to copy");
        self.check_version(source).await?;
        self.step("base backup");
        let building = files::start_building(&self.config).await?;
        let log = logs::start_building(&self.config).await?;
        let mut command = self.towards(source, "pg_basebackup")?;
        command
            .arg("-d")
            .arg(as_conninfo(settings(source)))
            .arg("-D")
            .arg(&building)
            .args([
                "--wal-method=stream",
                "--checkpoint=fast",
                "--progress",
                "-w",
            ]);
        if let Some(log) = log {
            command.arg("--waldir").arg(log);
        }
        if !self.config.syncs() {
            command.arg("--no-sync");
        }
        self.run_backup(command).await?;
        self.make_ours(&building).await
    }

    /// A program that logs in to the other server. The password is not on its command line, which
    /// everybody sees.
    fn towards(
        &self,
        source: &BaseBackup,
        program: &str,
    ) -> Result<tokio::process::Command, AgentError> {
        let mut command = tools::command(&self.config, program);
        if let Some(file) = &source.password_file {
            let password = std::fs::read_to_string(file).map_err(|e| {
                failed(format_args!(
                    "password of the server to copy cannot be read from \"{}\": {e}; is its Secret \
                     there, with the key?",
                    file.display()
                ))
            })?;
            command.env("PGPASSWORD", password.trim_end_matches(['\r', '\n']));
        }
        Ok(command)
    }

    /// Asks before anything is copied: the files of another major version are of no use. Over a
    /// replication connection, which is all that the role may have a right to.
    async fn check_version(&self, source: &BaseBackup) -> Result<(), AgentError> {
        let mut asked = settings(source);
        asked.push(("replication".to_owned(), "true".to_owned()));
        let mut command = self.towards(source, "psql")?;
        // The grammar of replication connections knows capitals only.
        command
            .args([
                "-X",
                "-A",
                "-t",
                "-w",
                "-c",
                "SHOW server_version_num",
                "-d",
            ])
            .arg(as_conninfo(asked));
        let said = tools::capture(command, "psql").await?;
        let place = place(source);
        if !said.success {
            return Err(failed(format_args!(
                "could not reach the server to copy, {place}: {}",
                tools::tail(&said.stderr)
            )));
        }
        let theirs = major(&said.stdout).ok_or_else(|| {
            failed(format_args!(
                "could not understand the version of {place}: \"{}\"",
                said.stdout.trim()
            ))
        })?;
        if theirs.to_string() != self.major {
            return Err(refused(format_args!(
                "the server to copy, {place}, is PostgreSQL {theirs}, and this image is {}; a copy \
                 has to be of the same major version: take an image of {theirs}, or dump and restore",
                self.major
            )));
        }
        Ok(())
    }

    /// Makes of the other server's files what this service can log in to.
    async fn make_ours(&self, dir: &Path) -> Result<(), AgentError> {
        for name in NOT_OURS {
            let path = dir.join(name);
            remove_if_exists(&path).map_err(file_failed("could not remove", &path))?;
        }
        let own = dir.join("postgresql.conf");
        std::fs::write(&own, "# taken over by helios\n")
            .and_then(|()| files::own(&self.config, &own))
            .map_err(file_failed("could not write", &own))?;
        self.step("recovery of the copy");
        let mut command = tools::command(&self.config, "postgres");
        command
            .args(["--single", "-D"])
            .arg(dir)
            .args(["-c", "lc_messages=C"]);
        for (name, value) in &self.config.parameters {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.arg("postgres");
        let said = tools::feed(command, "postgres", &superuser(&self.config.superuser)).await?;
        let wrong = |line: &&str| {
            ["ERROR:", "FATAL:", "PANIC:"]
                .iter()
                .any(|w| line.contains(w))
        };
        match said.stderr.lines().find(wrong) {
            // It ends well after a statement that has failed.
            Some(why) => Err(failed(format_args!("copy cannot be used: {}", why.trim()))),
            None if said.success => Ok(()),
            None => Err(failed(format_args!(
                "copy cannot be used: {}",
                tools::tail(&said.stderr)
            ))),
        }
    }
}

/// Connection parameters: what is asked for, over what is not.
fn settings(source: &BaseBackup) -> Vec<(String, String)> {
    let defaults = [
        ("connect_timeout", "10"),
        ("application_name", "helios-copy"),
        ("gssencmode", "disable"),
    ];
    let given = |name: &str| source.options.contains_key(name);
    let defaults = defaults.into_iter().filter(|(name, _)| !given(name));
    defaults
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .chain(source.options.clone())
        .collect()
}

/// The server, for people.
fn place(source: &BaseBackup) -> String {
    let get = |name: &str, other: &'static str| {
        let found = source.options.get(name);
        found.map_or(other, String::as_str).to_owned()
    };
    format!("{}:{}", get("host", "localhost"), get("port", "5432"))
}

/// The major version in what `SHOW server_version_num` says.
fn major(text: &str) -> Option<u32> {
    text.trim()
        .parse::<u32>()
        .ok()
        .map(|number| number / 10_000)
}

/// One line: to a server alone a statement ends with its line.
fn superuser(name: &str) -> String {
    let (literal, rights) = (sql::literal(name), "superuser login replication");
    format!(
        "do $$ begin if exists (select from pg_catalog.pg_roles where rolname = {literal}) \
         then alter role \"{name}\" {rights}; else create role \"{name}\" {rights}; end if; end $$\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(major("150018\n"), Some(15));
        assert_eq!(major("90624"), Some(9));
        assert_eq!(major("ERROR"), None);
    }

    #[test]
    fn what_is_asked_for_outranks_what_is_not() {
        let source = BaseBackup {
            options: [("host", "old"), ("connect_timeout", "3"), ("user", "it's")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            password_file: None,
        };
        assert_eq!(
            as_conninfo(settings(&source)),
            "application_name='helios-copy' gssencmode='disable' connect_timeout='3' host='old' \
             user='it\\'s'"
        );
        assert_eq!(place(&source), "old:5432");
    }
}
