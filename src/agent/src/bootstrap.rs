//! Bringing up a primary: `initdb` of an empty directory (or a copy, in `copy`), or the start of one that was a primary.
//!
//! A new data directory is built beside its place and moved there when it is whole, so that a full
//! disk or a dead agent leaves nothing that looks like one.

use helios_api::agent::{AgentError, AgentReply};

use crate::error::refused;
use crate::files::{self, Directory, Dynamic};
use crate::instance::Instance;
use crate::{logs, sql, tools};

/// Tried in this order: not every system has the first one.
const LOCALES: [&str; 2] = ["C.UTF-8", "C"];

impl Instance {
    pub(crate) async fn bootstrap(&mut self) -> Result<AgentReply, AgentError> {
        if self.directory()? == Directory::Empty {
            let made = match self.config.base_backup.clone() {
                Some(source) => self.copy(&source).await,
                None => self.new_directory().await,
            };
            if let Err(error) = made {
                let _ = files::remove_tree(&self.config.building_dir()).await;
                return Err(error);
            }
            files::finish_building(&self.config).await?;
        }
        // Not empty: an earlier try got as far as a whole directory.
        self.start_primary().await
    }

    async fn new_directory(&self) -> Result<(), AgentError> {
        self.step("initdb");
        let mut result = Ok(());
        for locale in LOCALES {
            result = self.initdb(locale).await;
            if result.is_ok() {
                break;
            }
        }
        result
    }

    async fn initdb(&self, locale: &str) -> Result<(), AgentError> {
        let building = files::start_building(&self.config).await?;
        let log = logs::start_building(&self.config).await?;
        let mut command = tools::command(&self.config, "initdb");
        command
            .arg("-D")
            .arg(building)
            .arg(format!("--username={}", self.config.superuser))
            .arg(format!("--locale={locale}"))
            .arg(format!("--wal-segsize={}", self.config.wal_segment_size_mb))
            .args([
                "--encoding=UTF8",
                "--data-checksums",
                "--auth-local=trust",
                "--auth-host=scram-sha-256",
            ]);
        if let Some(log) = log {
            command.arg("--waldir").arg(log);
        }
        if !self.config.syncs() {
            command.arg("--no-sync");
        }
        tools::run_long(command, "initdb", |_| {}).await
    }

    /// Starts a standby that nobody sends anything. It holds what it held: nothing is compared.
    pub(crate) async fn start_alone(&mut self) -> Result<AgentReply, AgentError> {
        if self.postmaster.is_some() {
            return Ok(AgentReply::Done);
        }
        if self.directory()? == Directory::Empty {
            return Err(refused("data directory is empty; follow a primary"));
        }
        if !files::is_standby(&self.config) || self.store.get().torn {
            return Err(refused("data directory is not that of a whole standby"));
        }
        let dynamic = Dynamic {
            primary_conninfo: String::new(),
            retry_interval: String::new(),
            ..Dynamic::read(&self.config)
        };
        dynamic.write(&self.config)?;
        self.start().await?;
        Ok(AgentReply::Done)
    }

    pub(crate) async fn start_primary(&mut self) -> Result<AgentReply, AgentError> {
        if self.postmaster.is_some() {
            let client = self.client().await?;
            let row = sql::one(&client, "select pg_is_in_recovery()", sql::LIMIT).await?;
            return match sql::column::<String>(&row, 0)?.as_str() {
                "f" => Ok(AgentReply::Done),
                _ => Err(refused("instance runs as a standby; promote it instead")),
            };
        }
        if self.directory()? == Directory::Empty {
            return Err(refused(
                "data directory is empty; bootstrap it or follow a primary",
            ));
        }
        if files::is_standby(&self.config) {
            return Err(refused(
                "data directory is a standby's; follow a primary and promote it instead",
            ));
        }
        if self.store.get().torn {
            return Err(refused(
                "data directory was left in the middle of pg_rewind; follow a primary instead",
            ));
        }
        // Synchronous replication stays as it was: the caller decides when it may be relaxed.
        let dynamic = Dynamic {
            primary_conninfo: String::new(),
            retry_interval: String::new(),
            primary_slot_name: String::new(),
            ..Dynamic::read(&self.config)
        };
        dynamic.write(&self.config)?;
        self.lease.wait().await?;
        self.start().await?;
        Ok(AgentReply::Done)
    }
}
