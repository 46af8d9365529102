//! Synchronous replication: who must confirm commits. Answered when the setting is in effect.

use std::time::Duration;

use helios_api::InstanceName;
use helios_api::agent::{AgentError, AgentReply};
use tokio::time::Instant;

use crate::error::{failed, refused};
use crate::files::{self, Dynamic};
use crate::instance::Instance;
use crate::sql;

/// How long the server may take to follow a changed setting.
const LIMIT: Duration = Duration::from_secs(5);
/// How often it is asked whether it has.
const INTERVAL: Duration = Duration::from_millis(2);

impl Instance {
    pub(crate) async fn set_synchronous(
        &mut self,
        standbys: &[InstanceName],
        number: u32,
    ) -> Result<AgentReply, AgentError> {
        let names = value(standbys, number)?;
        let client = self.client().await?;
        let row = sql::one(&client, "select pg_is_in_recovery()", sql::LIMIT).await?;
        if sql::column::<String>(&row, 0)? != "f" {
            return Err(refused(
                "instance is a standby; only a primary has synchronous standbys",
            ));
        }
        let dynamic = Dynamic {
            synchronous_standby_names: names.clone(),
            ..Dynamic::read(&self.config)
        };
        files::write_dynamic_through(&self.config, &dynamic)?;
        self.running()?.reload()?;
        // In effect: this backend has re-read the file, and the WAL senders of the standbys that
        // stream have taken up their places. Those that are away do so when they come.
        let question = format!(
            "select current_setting('synchronous_standby_names') = {} and \
             (select count(*) filter (where sync_state in ('sync', 'quorum')) >= \
                     least(count(*) filter (where application_name = any({})), {number}) and \
                     ({number} > 0 or count(*) filter (where sync_state <> 'async') = 0) \
              from pg_stat_replication where state = 'streaming')",
            sql::literal(&names),
            sql::literal(&array(standbys)),
        );
        let deadline = Instant::now() + LIMIT;
        loop {
            let row = sql::one(&client, &question, sql::LIMIT).await?;
            if sql::column::<String>(&row, 0)? == "t" {
                return Ok(AgentReply::Done);
            }
            if Instant::now() > deadline {
                return Err(failed(format_args!(
                    "synchronous_standby_names did not take effect within {LIMIT:?}"
                )));
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

/// Forgets the slot of a standby that is gone for good.
impl Instance {
    pub(crate) async fn drop_slot(
        &mut self,
        standby: &InstanceName,
    ) -> Result<AgentReply, AgentError> {
        let client = self.client().await?;
        // Of a standby that still streams it is active, and PostgreSQL refuses.
        let sql = format!(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots \
             where slot_name = {}",
            sql::literal(&standby.slot_name())
        );
        sql::rows(&client, &sql, sql::LIMIT).await?;
        Ok(AgentReply::Done)
    }
}

/// The parameter's value.
fn value(standbys: &[InstanceName], number: u32) -> Result<String, AgentError> {
    if number == 0 || standbys.is_empty() {
        return Ok(String::new());
    }
    if u32::try_from(standbys.len()).is_ok_and(|length| number > length) {
        return Err(refused(format_args!(
            "{number} standbys must confirm, but only {} are named",
            standbys.len()
        )));
    }
    let names: Vec<String> = standbys.iter().map(|n| format!("\"{n}\"")).collect();
    Ok(format!("FIRST {number} ({})", names.join(", ")))
}

/// The names as an array's text; they need no quoting.
fn array(standbys: &[InstanceName]) -> String {
    let names: Vec<&str> = standbys.iter().map(InstanceName::as_str).collect();
    format!("{{{}}}", names.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_the_parameters_value() {
        let names: Vec<InstanceName> = ["pg-2", "pg-3"].map(|n| n.parse().unwrap()).into();
        assert_eq!(value(&names, 1).unwrap(), "FIRST 1 (\"pg-2\", \"pg-3\")");
        assert_eq!(value(&names, 0).unwrap(), "");
        assert_eq!(value(&[], 1).unwrap(), "");
        assert!(value(&names, 3).is_err());
    }
}
