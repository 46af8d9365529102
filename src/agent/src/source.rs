//! The primary that an instance is to follow, seen over SQL: who it is, its history, the
//! instance's slot on it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use helios_api::agent::AgentError;
use helios_api::control::Backend;
use helios_api::{Host, Lsn, Timeline};
use tokio_postgres::Client;

use crate::AgentConfig;
use crate::error::{failed, refused};
use crate::promote::current_timeline;
use crate::sql;
use crate::wal::{History, history_file};

/// How long a checkpoint on the primary may take.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(300);

/// A primary, connected.
#[derive(Debug)]
pub(crate) struct Source {
    client: Arc<Client>,
    pub(crate) timeline: Timeline,
    pub(crate) history: History,
    pub(crate) system: String,
}

impl Source {
    /// Connects and makes sure that it is the primary it is said to be.
    pub(crate) async fn connect(
        config: &AgentConfig,
        primary: &Backend,
        timeline: Timeline,
        fork: Option<Lsn>,
    ) -> Result<Self, AgentError> {
        let tls = match &config.network {
            Some(network) => Some(network.towards(&primary.name)?),
            None => None,
        };
        let client = sql::connect_to_other(
            &primary.endpoint,
            &config.superuser,
            config.primary_options.get("password").map(String::as_str),
            tls,
            CHECKPOINT_LIMIT,
        )
        .await
        .map_err(|e| {
            failed(format_args!(
                "could not reach primary {}: {e}",
                primary.name
            ))
        })?;
        let row = sql::one(
            &client,
            "select pg_is_in_recovery(), system_identifier from pg_control_system()",
            sql::LIMIT,
        )
        .await?;
        if sql::column::<String>(&row, 0)? != "f" {
            return Err(failed(format_args!(
                "{} is in recovery, not a primary",
                primary.name
            )));
        }
        let writes = current_timeline(&client).await?;
        if writes != timeline {
            return Err(failed(format_args!(
                "{} writes timeline {writes}, not {timeline}",
                primary.name
            )));
        }
        let history = read_history(&client, timeline).await?;
        if let Some(fork) = fork
            && history.begin() != Some(fork)
        {
            return Err(refused(format_args!(
                "timeline {timeline} of {} did not begin at {fork}",
                primary.name
            )));
        }
        Ok(Self {
            client,
            timeline,
            history,
            system: sql::column(&row, 1)?,
        })
    }

    /// Makes the instance's slot, anew if its WAL is lost.
    pub(crate) async fn ensure_slot(&self, slot: &str) -> Result<(), AgentError> {
        let name = sql::literal(slot);
        let script = format!(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots \
             where slot_name = {name} and wal_status = 'lost' and not active;\
             select pg_create_physical_replication_slot({name}, true) \
             where not exists (select from pg_replication_slots where slot_name = {name})"
        );
        sql::rows(&self.client, &script, sql::LIMIT).await?;
        Ok(())
    }

    /// The primary's flushed position.
    pub(crate) async fn position(&self) -> Result<Lsn, AgentError> {
        let row = sql::one(
            &self.client,
            "select pg_current_wal_flush_lsn()",
            sql::LIMIT,
        )
        .await?;
        Ok(sql::column(&row, 0)?)
    }

    /// Makes `pg_control` name the current timeline, which `pg_rewind` goes by before version 16.
    pub(crate) async fn checkpoint(&self) -> Result<(), AgentError> {
        sql::rows(&self.client, "checkpoint", CHECKPOINT_LIMIT).await?;
        Ok(())
    }

    /// Whether the primary still has the segment that holds a position, on whatever timeline.
    pub(crate) async fn has_wal(&self, position: Lsn) -> Result<bool, AgentError> {
        // The part of the name behind the timeline.
        let sql = format!(
            "select exists (select from pg_ls_waldir() where substr(name, 9) = \
             substr(pg_walfile_name({}::pg_lsn + 1), 9))",
            sql::literal(&position.to_string())
        );
        let row = sql::one(&self.client, &sql, sql::LIMIT).await?;
        Ok(sql::column::<String>(&row, 0)? == "t")
    }
}

async fn read_history(client: &Client, timeline: Timeline) -> Result<History, AgentError> {
    if timeline <= Timeline(1) {
        return Ok(History::default());
    }
    let sql = format!(
        "select pg_read_file({})",
        sql::literal(&format!("pg_wal/{}", history_file(timeline)))
    );
    let row = sql::one(client, &sql, sql::LIMIT).await?;
    History::parse(&sql::column::<String>(&row, 0)?)
        .ok_or_else(|| failed(format_args!("history of timeline {timeline} is damaged")))
}

/// How PostgreSQL's own programs and the WAL receiver reach the primary.
pub(crate) fn conninfo(config: &AgentConfig, primary: &Backend) -> String {
    let host = match &primary.endpoint.host {
        Host::Tcp(name) => name.clone(),
        Host::Unix(dir) => dir.display().to_string(),
    };
    let mut settings = BTreeMap::from([
        ("host", host),
        ("port", primary.endpoint.port.to_string()),
        ("user", config.superuser.clone()),
        // The name under which it counts as a synchronous standby.
        ("application_name", config.name.to_string()),
        ("connect_timeout", "3".to_owned()),
        ("gssencmode", "disable".to_owned()),
    ]);
    if let Some(network) = &config.network {
        let path = |path: &std::path::Path| path.display().to_string();
        // Not verify-full: the address is a Pod's, the certificate has the instance's name.
        settings.insert("sslmode", "verify-ca".to_owned());
        settings.insert("sslrootcert", path(&network.tls.ca));
        settings.insert("sslcert", path(&network.tls.certificate));
        settings.insert("sslkey", path(&network.tls.key));
    }
    for (name, value) in &config.primary_options {
        settings.insert(name, value.clone());
    }
    as_conninfo(settings)
}

/// Connection parameters as one string, quoted.
pub(crate) fn as_conninfo<N: std::fmt::Display>(
    settings: impl IntoIterator<Item = (N, String)>,
) -> String {
    let mut text = String::new();
    for (name, value) in settings {
        let value = value.replace('\\', "\\\\").replace('\'', "\\'");
        let _ = write!(text, "{name}='{value}' ");
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn conninfo_is_quoted() {
        let mut config = AgentConfig::local(
            "pg-1".parse().unwrap(),
            Path::new("/a"),
            Path::new("/a"),
            1,
            Path::new("/a"),
        );
        config
            .primary_options
            .insert("password".into(), "it's".into());
        let primary = Backend {
            name: "pg-2".parse().unwrap(),
            endpoint: helios_api::Endpoint {
                host: Host::Unix("/x y".into()),
                port: 5,
            },
        };
        assert_eq!(
            conninfo(&config, &primary),
            "application_name='pg-1' connect_timeout='3' gssencmode='disable' host='/x y' \
             password='it\\'s' port='5' user='helios'"
        );
    }
}
