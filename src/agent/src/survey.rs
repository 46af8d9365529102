//! What a data directory holds whose server does not run: how far its WAL goes.
//!
//! Reads, and changes nothing. `pg_control` alone lags behind on a standby: the WAL counts that lies
//! there and that recovery would replay.

use std::process::Stdio;
use std::time::Duration;

use helios_api::agent::{AgentError, AgentReply};
use helios_api::{Lsn, Timeline};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::error::{failed, file_failed, refused};
use crate::files::{self, Directory};
use crate::instance::Instance;
use crate::wal::{self, Control, History, history_file};
use crate::{AgentConfig, logs, tools};

/// How long the WAL may take to be read: it may have as much as `max_wal_size` behind the last
/// checkpoint.
const READ_LIMIT: Duration = Duration::from_secs(600);

impl Instance {
    pub(crate) async fn survey(&self) -> Result<AgentReply, AgentError> {
        if self.postmaster.is_some() {
            return Err(refused("server runs"));
        }
        if self.directory()? == Directory::Empty {
            return Err(refused("data directory is empty"));
        }
        let standby = files::is_standby(&self.config);
        let torn = self.store.get().torn || logs::are_lost(&self.config);
        let control = Control::read(&self.config).await?;
        let (timeline, end) = match torn {
            true => (control.timeline, control.checkpoint),
            false => end_of_wal(&self.config, &control).await?,
        };
        tracing::info!(standby, torn, %timeline, %end, "data directory holds");
        Ok(AgentReply::Held {
            standby,
            torn,
            timeline,
            end,
        })
    }
}

/// The latest timeline, and its last record.
async fn end_of_wal(
    config: &AgentConfig,
    control: &Control,
) -> Result<(Timeline, Lsn), AgentError> {
    let timeline = wal::latest_timeline(config, control.timeline)?;
    let from = match timeline == control.checkpoint_timeline {
        true => control.checkpoint,
        // The last checkpoint is of an ancestor.
        false => begin(config, timeline)?,
    };
    // Where records begin, which is the same for everybody: where the last one ends is not always
    // known.
    let last = last_record(config, timeline, from).await?;
    Ok((timeline, last.unwrap_or(from)))
}

/// Where a timeline begins, by its history file.
fn begin(config: &AgentConfig, timeline: Timeline) -> Result<Lsn, AgentError> {
    let path = config.data_dir.join("pg_wal").join(history_file(timeline));
    let text = std::fs::read_to_string(&path).map_err(file_failed("could not read", &path))?;
    let history = History::parse(&text);
    history.and_then(|history| history.begin()).ok_or_else(|| {
        failed(format_args!(
            "history of timeline {timeline} is damaged: \"{}\"",
            path.display()
        ))
    })
}

/// The last valid record of a timeline, from a position on. `pg_waldump` ends with an error where
/// the WAL ends.
async fn last_record(
    config: &AgentConfig,
    timeline: Timeline,
    from: Lsn,
) -> Result<Option<Lsn>, AgentError> {
    let mut child = tools::command(config, "pg_waldump")
        .arg("-p")
        .arg(config.data_dir.join("pg_wal"))
        .arg("-t")
        .arg(timeline.to_string())
        .arg("-s")
        .arg(from.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| failed(format_args!("could not run pg_waldump: {e}")))?;
    let Some(stdout) = child.stdout.take() else {
        return Err(failed("pg_waldump says nothing"));
    };
    let reading = async {
        let mut lines = BufReader::new(stdout).split(b'\n');
        let mut last = None;
        // A description may hold any bytes.
        while let Some(line) = lines.next_segment().await? {
            last = position(&String::from_utf8_lossy(&line)).or(last);
        }
        child.wait().await?;
        Ok(last)
    };
    let read: std::io::Result<_> = tokio::time::timeout(READ_LIMIT, reading)
        .await
        .map_err(|_| failed(format_args!("WAL was not read within {READ_LIMIT:?}")))?;
    read.map_err(|e| failed(format_args!("could not read what pg_waldump says: {e}")))
}

/// The position in a line of `pg_waldump`.
fn position(line: &str) -> Option<Lsn> {
    let (_, rest) = line.split_once("lsn: ")?;
    rest.split(',').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_read_from_pg_waldump() {
        let line = "rmgr: XLOG        len (rec/tot):    114/   114, tx:          0, \
                    lsn: 0/015B88A0, prev 0/015B8868, desc: CHECKPOINT_SHUTDOWN redo 0/15B88A0; tli 1";
        assert_eq!(position(line), Some(Lsn(0x15B_88A0)));
        assert_eq!(position("pg_waldump: error: no lsn"), None);
    }
}
