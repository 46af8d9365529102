//! `status`, `sessions`, `switchover` and `failover` of a local cluster, for people and as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use helios_api::agent::InstanceState;
use helios_api::control::{LostCommits, SessionInfo};
use helios_local::client::LocalClient;
use helios_local::{InstanceStatus, LocalStatus, OperationRecord, Outcome, Progress};
use serde::Serialize;

use super::local::absolute;
use super::protection;
use crate::cli::{FailoverArgs, SessionsArgs, ShowArgs, SwitchoverArgs};
use crate::failure::Failure;
use crate::{out, table};

/// What the columns of [`session`] are.
pub(crate) const SESSION_HEAD: [&str; 11] = [
    "SESSION",
    "STATE",
    "USER",
    "DATABASE",
    "APPLICATION",
    "CLIENT",
    "INSTANCE",
    "IN TRANSACTION",
    "JOURNAL",
    "MOVES",
    "PROTECTED",
];

/// `helios status`.
pub(crate) async fn status(args: &ShowArgs) -> Result<(), Failure> {
    let status = LocalClient::new(absolute(&args.dir)?).status().await?;
    if args.json {
        return json(&status);
    }
    out::print(&describe(&status));
    Ok(())
}

/// `helios sessions`.
pub(crate) async fn sessions(args: &SessionsArgs) -> Result<(), Failure> {
    let (protection, args) = (args.protection, &args.show);
    let client = LocalClient::new(absolute(&args.dir)?);
    if protection {
        let report = client.protection().await?;
        if args.json {
            return json(&report);
        }
        out::print(&protection::describe(&report));
        return Ok(());
    }
    let mut sessions = client.sessions().await?;
    sessions.sort_by_key(|s| s.id);
    if args.json {
        return json(&sessions);
    }
    let rows: Vec<_> = sessions.iter().map(session).collect();
    out::print(&table::render(&SESSION_HEAD, &rows));
    Ok(())
}

/// `helios switchover`: steps as they happen, then where the time went.
pub(crate) async fn switchover(args: &SwitchoverArgs) -> Result<(), Failure> {
    let client = LocalClient::new(absolute(&args.dir)?);
    let operation = client.switchover(args.to.as_ref(), note_step).await?;
    if args.json {
        return json(&operation);
    }
    out::print(&moved(&operation));
    Ok(())
}

fn note_step(step: &Progress) {
    if let Progress::Phase {
        phase,
        elapsed_micros,
    } = step
    {
        let elapsed = millis(*elapsed_micros);
        out::note(&format!("{elapsed:>9}  {}", phase.as_str()));
    }
}

/// A forced failover, and what it may have cost.
pub(crate) async fn failover(args: &FailoverArgs) -> Result<(), Failure> {
    let client = LocalClient::new(absolute(&args.dir)?);
    let operation = client.failover_accepting_loss(note_step).await?;
    if args.json {
        return json(&operation);
    }
    out::print(&moved(&operation));
    out::note(match operation.lost {
        LostCommits::None => "every acknowledged commit is there",
        LostCommits::Possible => {
            "commits that the new primary had not received are lost; applications have to compare"
        }
    });
    Ok(())
}

fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string(value)
        .map_err(|e| Failure::failed(format!("could not write JSON: {e}")))?;
    out::print(&text);
    Ok(())
}

fn millis(micros: u64) -> String {
    format!("{}.{} ms", micros / 1000, micros % 1000 / 100)
}

fn moved(o: &OperationRecord) -> String {
    let mut text = format!(
        "primary moved from \"{}\" to \"{}\", epoch {}\n",
        o.from, o.to, o.epoch
    );
    for p in &o.phases {
        let _ = writeln!(text, "  {:<9}{:>11}", p.phase.as_str(), millis(p.micros));
    }
    let _ = writeln!(text, "  {:<9}{:>11}", "pause", millis(o.pause_micros()));
    let _ = writeln!(
        text,
        "{} idle sessions and {} transactions moved, {} outcomes resolved",
        o.drained.idle, o.resumed.replayed, o.resumed.resolved
    );
    for (reason, count) in &o.resumed.failed {
        let _ = writeln!(text, "{count} sessions got an error: {reason}");
    }
    text
}

fn describe(s: &LocalStatus) -> String {
    let dash = || "-".to_owned();
    let mut text = String::new();
    let step = s
        .step
        .map_or_else(String::new, |p| format!(" ({})", p.as_str()));
    let lines = [
        ("cluster", s.data_dir.display().to_string()),
        ("connect", s.connection_string.clone()),
        ("metrics", s.http.clone().unwrap_or_else(dash)),
        (
            "primary",
            s.primary.as_ref().map_or_else(dash, ToString::to_string),
        ),
        (
            "epoch",
            format!(
                "{} (timeline {})",
                s.epoch,
                s.timeline.map_or_else(dash, |t| t.to_string())
            ),
        ),
        ("phase", format!("{}{step}", s.phase)),
        (
            "proxy",
            s.proxy.as_ref().map_or_else(
                || "down".to_owned(),
                |p| {
                    format!(
                        "{}, {} sessions, {} in a transaction, {} protected, {} journal bytes",
                        p.phase, p.sessions, p.in_transaction, p.protected, p.journal_bytes
                    )
                },
            ),
        ),
    ];
    for (name, value) in lines {
        let _ = writeln!(text, "{name:<9}{value}");
    }
    let rows: Vec<_> = s.instances.iter().map(instance).collect();
    text.push('\n');
    text.push_str(&table::render(
        &["INSTANCE", "ROLE", "STATE", "SYNC", "LAG", "ADDRESS"],
        &rows,
    ));
    for i in &s.instances {
        if let Some(trouble) = &i.trouble {
            let _ = writeln!(text, "\n{}: {trouble}", i.name);
        }
    }
    if !s.operations.is_empty() {
        let rows: Vec<_> = s.operations.iter().rev().take(10).map(operation).collect();
        text.push('\n');
        text.push_str(&table::render(
            &["MOVE", "KIND", "FROM", "TO", "PAUSE", "RESULT", "CAUSE"],
            &rows,
        ));
    }
    text
}

fn instance(i: &InstanceStatus) -> Vec<String> {
    vec![
        i.name.to_string(),
        i.role.clone(),
        state(i),
        if i.synchronous { "yes" } else { "no" }.to_owned(),
        i.lag_bytes
            .map_or_else(|| "-".to_owned(), |b| format!("{b} B")),
        i.endpoint.to_string(),
    ]
}

fn state(i: &InstanceStatus) -> String {
    let text = match &i.state {
        None => "agent does not answer".to_owned(),
        Some(InstanceState::Empty) => "empty".to_owned(),
        Some(InstanceState::Stopped { crashed: true, .. }) => "crashed".to_owned(),
        Some(InstanceState::Stopped { .. }) => "stopped".to_owned(),
        Some(InstanceState::Starting { step }) => format!("starting: {step}"),
        Some(InstanceState::Primary { position, .. }) => format!("running at {position}"),
        Some(InstanceState::Standby {
            replayed, heard_ms, ..
        }) => match heard_ms {
            Some(_) => format!("streaming at {replayed}"),
            None => format!("not streaming, at {replayed}"),
        },
        Some(InstanceState::Unresponsive { for_ms }) => {
            format!("no answer for {:?}", Duration::from_millis(*for_ms))
        }
    };
    if i.fenced {
        format!("{text}, fenced")
    } else {
        text
    }
}

fn operation(o: &OperationRecord) -> Vec<String> {
    let mut outcome = match &o.outcome {
        Outcome::Succeeded => "succeeded".to_owned(),
        Outcome::Aborted { reason } => format!("aborted: {reason}"),
        Outcome::Diverted { reason } => format!("diverted: {reason}"),
    };
    if o.lost == LostCommits::Possible {
        outcome.push_str(", commits may be lost");
    }
    vec![
        o.id.to_string(),
        format!("{:?}", o.kind).to_lowercase(),
        o.from.to_string(),
        o.to.to_string(),
        millis(o.pause_micros()),
        outcome,
        o.cause.clone(),
    ]
}

/// A session as a row.
pub(crate) fn session(s: &SessionInfo) -> Vec<String> {
    let dash = || "-".to_owned();
    vec![
        s.id.to_string(),
        match s.replay {
            Some(replay) => format!("{} {}/{}", s.state, replay.done, replay.total),
            None => s.state.clone(),
        },
        s.user.clone(),
        s.database.clone(),
        s.application.clone(),
        s.client.clone(),
        s.instance.as_ref().map_or_else(dash, ToString::to_string),
        s.transaction_age_ms
            .map_or_else(dash, |ms| format!("{:.1?}", Duration::from_millis(ms))),
        format!("{} B", s.journal_bytes),
        s.migrations.to_string(),
        s.unprotected
            .as_ref()
            .map_or_else(|| "yes".to_owned(), |why| format!("no: {why}")),
    ]
}
