//! New settings while the instance lives: checked by PostgreSQL itself before anything is touched,
//! in force as far as a reload goes, and the ones before them again where a server does not start.
//!
//! Invariant: settings that PostgreSQL refuses are never in the files of a running server, and a
//! server that ran with its last settings is not down because of new ones.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use helios_api::agent::{AgentError, AgentReply, ServerSettings, SettingsReport};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::error::{failed, file_failed};
use crate::files::{self, FLOORED, Floor};
use crate::instance::Instance;
use crate::wal::Control;
use crate::{AgentConfig, record, sql, tools};

/// How long the server may take to have re-read its files.
const RELOAD_LIMIT: Duration = Duration::from_secs(5);
/// How often it is asked whether it has.
const INTERVAL: Duration = Duration::from_millis(5);
/// The longest refusal that is passed on.
const WORDS: usize = 500;

impl AgentConfig {
    /// What of it may change while the instance lives.
    pub(crate) fn settings(&self) -> ServerSettings {
        ServerSettings {
            parameters: self.parameters.clone(),
            hba: self.hba.clone(),
        }
    }

    fn with(&self, settings: &ServerSettings) -> Self {
        Self {
            parameters: settings.parameters.clone(),
            hba: settings.hba.clone(),
            ..self.clone()
        }
    }

    /// The settings that a server last started with.
    fn settings_file(&self) -> PathBuf {
        self.home().join("settings.json")
    }
}

impl Instance {
    /// Takes new settings, or says in the report why not.
    pub(crate) async fn reconfigure(
        &mut self,
        settings: &ServerSettings,
    ) -> Result<AgentReply, AgentError> {
        let told = settings.fingerprint();
        if self.hub.state().settings.told == told {
            return Ok(AgentReply::Done);
        }
        let report = match self.try_settings(settings).await? {
            Ok(report) => report,
            Err(why) => {
                tracing::warn!(why, "settings are refused, those before them stay");
                SettingsReport {
                    refused: Some(why),
                    ..self.hub.state().settings
                }
            }
        };
        self.hub.set_settings(SettingsReport { told, ..report });
        Ok(AgentReply::Done)
    }

    /// The inner error is a refusal: nothing has changed.
    async fn try_settings(
        &mut self,
        settings: &ServerSettings,
    ) -> Result<Result<SettingsReport, String>, AgentError> {
        let candidate = self.config.with(settings);
        if let Err(error) = candidate.validate() {
            return Ok(Err(error.to_string()));
        }
        if let Some(why) = check(&candidate).await? {
            return Ok(Err(why));
        }
        if self.running().is_err() {
            self.config = Arc::new(candidate);
            return Ok(Ok(SettingsReport::default()));
        }
        let client = self.client().await?;
        if let Some(why) = self.check_hba(&candidate, &client).await? {
            return Ok(Err(why));
        }
        let floor = running_floor(&client).await?;
        let kept = files::configure(&candidate, &floor)?;
        self.config = Arc::new(candidate);
        let before = loaded_at(&client).await?;
        self.running()?.reload()?;
        let deadline = Instant::now() + RELOAD_LIMIT;
        while loaded_at(&client).await? == before {
            if Instant::now() > deadline {
                return Err(failed(format_args!(
                    "configuration was not re-read within {RELOAD_LIMIT:?}"
                )));
            }
            tokio::time::sleep(INTERVAL).await;
        }
        let restart = names(
            &client,
            "select name from pg_settings where pending_restart order by 1",
        )
        .await?;
        tracing::info!(?restart, ?kept, "settings are in force");
        Ok(Ok(SettingsReport {
            restart,
            kept,
            ..SettingsReport::default()
        }))
    }

    /// Whether PostgreSQL understands `pg_hba.conf`: it reads the file, and uses it after a reload
    /// only.
    async fn check_hba(
        &self,
        candidate: &AgentConfig,
        client: &Client,
    ) -> Result<Option<String>, AgentError> {
        files::write_hba(candidate)?;
        let sql = "select 'pg_hba.conf: ' || error from pg_hba_file_rules \
                   where error is not null order by line_number limit 1";
        let wrong = names(client, sql).await;
        if !matches!(&wrong, Ok(none) if none.is_empty()) {
            files::write_hba(&self.config)?;
        }
        Ok(wrong?.pop())
    }

    /// Before the first start of this agent: what the file says may be what PostgreSQL refuses.
    pub(crate) async fn first_settings(&mut self) -> Result<(), AgentError> {
        let told = self.config.settings().fingerprint();
        let refused = check(&self.config).await?;
        if refused.is_some()
            && let Some(accepted) = self.accepted()
        {
            self.config = Arc::new(self.config.with(&accepted));
        }
        self.hub.set_settings(SettingsReport {
            told,
            refused,
            ..SettingsReport::default()
        });
        Ok(())
    }

    fn accepted(&self) -> Option<ServerSettings> {
        let text = std::fs::read(self.config.settings_file()).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// A server has started with these settings.
    pub(crate) fn accept_settings(&self, kept: Vec<String>) {
        let settings = self.config.settings();
        let path = self.config.settings_file();
        if self.accepted().as_ref() != Some(&settings) {
            let written = serde_json::to_vec(&settings)
                .map_err(std::io::Error::other)
                .and_then(|text| record::replace(&path, &text, 0o600));
            if let Err(error) = written {
                tracing::warn!(%error, "settings that work could not be remembered");
            }
        }
        self.hub.set_settings(SettingsReport {
            restart: Vec::new(),
            kept,
            ..self.hub.state().settings
        });
    }

    /// A server does not start: with the settings that one last started with it may. `false` when
    /// these are the same.
    pub(crate) fn fall_back(&mut self, why: &AgentError) -> bool {
        let now = self.config.settings();
        let Some(accepted) = self.accepted().filter(|accepted| *accepted != now) else {
            return false;
        };
        let why = words(&why.to_string());
        tracing::warn!(why, "server does not start, trying the settings before");
        self.config = Arc::new(self.config.with(&accepted));
        self.hub.set_settings(SettingsReport {
            refused: Some(why),
            ..self.hub.state().settings
        });
        true
    }

    /// What a start as what the directory is may not fall below.
    pub(crate) async fn floor(&self) -> Result<Floor, AgentError> {
        if !files::is_standby(&self.config) {
            return Ok(Floor::new());
        }
        Ok(Control::read(&self.config).await?.floor)
    }
}

/// Has PostgreSQL look at the parameters; its words when it refuses one. A program of its own: the
/// running server is not touched.
async fn check(config: &AgentConfig) -> Result<Option<String>, AgentError> {
    let folder = config.home().join("check");
    std::fs::create_dir_all(&folder)
        .and_then(|()| files::own(config, &folder))
        .map_err(file_failed("could not prepare", &folder))?;
    let file = folder.join("postgresql.conf");
    std::fs::write(&file, "")
        .and_then(|()| files::own(config, &file))
        .map_err(file_failed("could not write", &file))?;
    let mut command = tools::command(config, "postgres");
    command
        .arg("-D")
        .arg(&folder)
        .args(["-C", "data_directory"]);
    for (name, value) in &config.parameters {
        command.arg("-c").arg(format!("{name}={value}"));
    }
    let done = tools::capture(command, "postgres").await?;
    Ok((!done.success).then(|| words(&done.stderr)))
}

/// PostgreSQL's own words in what a program or a log says.
fn words(text: &str) -> String {
    let start = ["FATAL:", "ERROR:"]
        .iter()
        .find_map(|level| text.rfind(level).map(|at| at + level.len()))
        .unwrap_or_default();
    let lines = text.get(start..).unwrap_or_default().lines();
    let own: Vec<&str> = lines
        .map(
            |line| match line.find("HINT:").or_else(|| line.find("DETAIL:")) {
                Some(at) => line.get(at..).unwrap_or(line).trim(),
                None => line.trim(),
            },
        )
        .enumerate()
        .take_while(|(n, line)| *n == 0 || line.starts_with("HINT:") || line.starts_with("DETAIL:"))
        .map(|(_, line)| line)
        .collect();
    own.join("; ").chars().take(WORDS).collect()
}

/// What the running server has of the parameters that a standby may not have less of.
async fn running_floor(client: &Client) -> Result<Floor, AgentError> {
    let list: Vec<String> = FLOORED.iter().map(|name| sql::literal(name)).collect();
    let question = format!(
        "select name, setting from pg_settings where name in ({})",
        list.join(", ")
    );
    let rows = sql::rows(client, &question, sql::LIMIT).await?;
    let mut floor = BTreeMap::new();
    for row in &rows {
        let name: String = sql::column(row, 0)?;
        if let Some(known) = FLOORED.iter().find(|known| **known == name) {
            floor.insert(*known, sql::column(row, 1)?);
        }
    }
    Ok(floor)
}

async fn loaded_at(client: &Client) -> Result<String, AgentError> {
    let row = sql::one(client, "select pg_conf_load_time()", sql::LIMIT).await?;
    Ok(sql::column(&row, 0)?)
}

async fn names(client: &Client, sql: &str) -> Result<Vec<String>, AgentError> {
    let rows = sql::rows(client, sql, sql::LIMIT).await?;
    rows.iter().map(|row| Ok(sql::column(row, 0)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_words_are_found() {
        let log = "PostgreSQL ended; its log: 2026-01-01 00:00:00 UTC [7] LOG:  starting\n\
                   2026-01-01 00:00:00 UTC [7] FATAL:  could not access file \"nope\": No such file\n\
                   2026-01-01 00:00:00 UTC [7] LOG:  database system is shut down";
        assert_eq!(words(log), "could not access file \"nope\": No such file");
        let told = "FATAL:  invalid value for parameter \"work_mem\": \"lots\"\n\
                    HINT:  Valid units for this parameter are \"B\", \"kB\".\n";
        assert_eq!(
            words(told),
            "invalid value for parameter \"work_mem\": \"lots\"; \
             HINT:  Valid units for this parameter are \"B\", \"kB\"."
        );
        assert_eq!(words("no level at all"), "no level at all");
    }
}
