//! Where an instance's WAL ends and where timelines part: `pg_control`, history files, segment
//! names. Reads files and runs `pg_controldata` and `pg_waldump`; changes nothing.

use std::collections::HashMap;
use std::str::FromStr;

use helios_api::agent::AgentError;
use helios_api::{Lsn, Timeline};

use crate::AgentConfig;
use crate::error::{failed, file_failed};
use crate::files::{FLOORED, Floor};
use crate::tools;

/// How `pg_controldata` calls the values of [`FLOORED`], in their order.
const IN_CONTROL: [&str; FLOORED.len()] = [
    "max_connections setting",
    "max_locks_per_xact setting",
    "max_prepared_xacts setting",
    "max_wal_senders setting",
    "max_worker_processes setting",
];

/// What matters of `pg_control`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Control {
    /// Identifies the cluster since its initdb.
    pub(crate) system: String,
    /// Whether the server was shut down, as a primary or in recovery.
    pub(crate) clean: bool,
    /// Start of the last checkpoint's record: after a clean stop of a primary, the last record.
    pub(crate) checkpoint: Lsn,
    /// The timeline of that record.
    pub(crate) checkpoint_timeline: Timeline,
    /// The furthest position that data pages may already hold; 0 on a primary.
    pub(crate) minimum: Lsn,
    /// The latest timeline that it names.
    pub(crate) timeline: Timeline,
    /// Parameters that a standby may not have less of.
    pub(crate) floor: Floor,
}

impl Control {
    /// Reads it with `pg_controldata`, which checks its checksum.
    pub(crate) async fn read(config: &AgentConfig) -> Result<Self, AgentError> {
        let mut command = tools::command(config, "pg_controldata");
        command.arg("-D").arg(&config.data_dir);
        let text = tools::output(command, "pg_controldata").await?;
        Self::parse(&text).ok_or_else(|| {
            failed(format_args!(
                "could not understand what pg_controldata says of \"{}\"",
                config.data_dir.display()
            ))
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let fields: HashMap<&str, &str> = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.trim(), value.trim()))
            .collect();
        fn number<T: FromStr>(fields: &HashMap<&str, &str>, name: &str) -> Option<T> {
            fields.get(name)?.parse().ok()
        }
        let last = number::<u32>(&fields, "Latest checkpoint's TimeLineID")?;
        let minimum = number::<u32>(&fields, "Min recovery ending loc's timeline")?;
        Some(Self {
            system: (*fields.get("Database system identifier")?).to_owned(),
            clean: fields
                .get("Database cluster state")?
                .starts_with("shut down"),
            checkpoint: number(&fields, "Latest checkpoint location")?,
            checkpoint_timeline: Timeline(last),
            minimum: number(&fields, "Minimum recovery ending location")?,
            timeline: Timeline(last.max(minimum)),
            floor: FLOORED
                .iter()
                .zip(IN_CONTROL)
                .filter_map(|(name, line)| Some((*name, number(&fields, line)?)))
                .collect(),
        })
    }
}

/// The ancestors of a timeline, oldest first: each with the position where it was left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct History(Vec<(Timeline, Lsn)>);

impl History {
    /// Reads the text of a `.history` file.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        text.lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| {
                let mut words = line.split_whitespace();
                let timeline = words.next()?.parse().ok()?;
                Some((Timeline(timeline), words.next()?.parse().ok()?))
            })
            .collect::<Option<Vec<_>>>()
            .map(Self)
    }

    /// Where the timeline begins; `None` for one without ancestors.
    pub(crate) fn begin(&self) -> Option<Lsn> {
        self.0.last().map(|(_, fork)| *fork)
    }

    /// Where this history leaves `timeline`; `None` when it never was on it.
    pub(crate) fn leaves(&self, timeline: Timeline) -> Option<Lsn> {
        self.0
            .iter()
            .find(|(ancestor, _)| *ancestor == timeline)
            .map(|(_, at)| *at)
    }
}

/// Name of a timeline's history file.
pub(crate) fn history_file(timeline: Timeline) -> String {
    format!("{:08X}.history", timeline.0)
}

/// How an instance's WAL stands to the timeline that it is to follow. A pure judgement; the
/// evidence is gathered by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is on that timeline.
    Same,
    /// It is on an ancestor, which that timeline left here.
    Ancestor(Lsn),
    /// It is on a timeline that is no ancestor.
    Foreign,
}

impl Standing {
    pub(crate) fn of(held: Timeline, target: Timeline, history: &History) -> Self {
        if held == target {
            return Self::Same;
        }
        history.leaves(held).map_or(Self::Foreign, Self::Ancestor)
    }
}

/// The latest timeline of which the instance holds WAL. The segments count as well as
/// `pg_control`, which lags behind on a standby.
pub(crate) fn latest_timeline(
    config: &AgentConfig,
    control: Timeline,
) -> Result<Timeline, AgentError> {
    let folder = config.data_dir.join("pg_wal");
    let entries = std::fs::read_dir(&folder).map_err(file_failed("could not list", &folder))?;
    let latest = entries
        .flatten()
        .filter_map(|entry| segment_timeline(entry.file_name().to_str()?))
        .max();
    Ok(latest.map_or(control, |timeline| timeline.max(control)))
}

fn segment_timeline(name: &str) -> Option<Timeline> {
    let hexadecimal = name.len() == 24 && name.bytes().all(|b| b.is_ascii_hexdigit());
    if !hexadecimal {
        return None;
    }
    u32::from_str_radix(&name[..8], 16).ok().map(Timeline)
}

/// Whether the instance holds a valid record of `timeline` that begins at `at`, where a record
/// must begin if there is any.
///
/// "No" is only to be trusted together with `pg_control` naming nothing past `at`: else the
/// segment may have been recycled since.
pub(crate) async fn has_record(
    config: &AgentConfig,
    timeline: Timeline,
    at: Lsn,
) -> Result<bool, AgentError> {
    let mut command = tools::command(config, "pg_waldump");
    command
        .arg("-p")
        .arg(config.data_dir.join("pg_wal"))
        .arg("-t")
        .arg(timeline.to_string())
        .arg("-s")
        .arg(at.to_string())
        .args(["-n", "1"]);
    let done = tools::capture(command, "pg_waldump").await?;
    Ok(done.success && !done.stdout.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_data_is_read() {
        let text = "pg_control version number:            1300\n\
            Database system identifier:           7300000000000000001\n\
            Database cluster state:               in production\n\
            Latest checkpoint location:           0/15B88A0\n\
            Latest checkpoint's REDO location:    0/15B8868\n\
            Latest checkpoint's TimeLineID:       2\n\
            Minimum recovery ending location:     0/15B8C00\n\
            Min recovery ending loc's timeline:   3\n";
        let control = Control::parse(text).unwrap();
        assert_eq!(control.timeline, Timeline(3));
        assert_eq!(control.checkpoint, Lsn(0x15B_88A0));
        assert!(!control.clean);
        assert_eq!(Control::parse("nonsense"), None);
    }

    #[test]
    fn histories_tell_where_timelines_part() {
        let text = "1\t0/3000060\tno recovery target specified\n\n\
                    # comment\n2\t0/50000A0\tno recovery target specified\n";
        let history = History::parse(text).unwrap();
        assert_eq!(history.begin(), Some(Lsn(0x500_00A0)));
        let standing = |held| Standing::of(Timeline(held), Timeline(3), &history);
        assert_eq!(standing(3), Standing::Same);
        assert_eq!(standing(1), Standing::Ancestor(Lsn(0x300_0060)));
        assert_eq!(standing(4), Standing::Foreign);
        assert_eq!(History::parse("x\ty"), None);
    }

    #[test]
    fn segments_are_known_by_their_names() {
        assert_eq!(
            segment_timeline("00000003000000000000000A"),
            Some(Timeline(3))
        );
        assert_eq!(segment_timeline("00000003.history"), None);
        assert_eq!(segment_timeline("00000003000000000000000A.partial"), None);
    }
}
