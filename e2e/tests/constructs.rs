//! Everything that a transaction can contain, with the primary moved in the middle of it.
//!
//! All programs run side by side on one cluster: once with a switchover (and a crash, where a
//! program has a second mark), once with a crash (and then a switchover). What their sessions
//! received is compared, message by message, with the same program on PostgreSQL alone.

mod constructs {
    pub(crate) mod copy_and_cursors;
    pub(crate) mod locks_and_levels;
    pub(crate) mod objects;
    pub(crate) mod protocol;
    pub(crate) mod statements;
}

use std::time::Duration;

use helios_e2e::driver::Target;
use helios_e2e::lockstep::{Program, judge, run_alone, run_together, wanted};
use helios_e2e::subject::{Move, Subject};
use helios_e2e::{Result, Shown};
use helios_testkit::{PgOptions, PgServer};

/// Group by group on one cluster; the programs of a group run side by side.
async fn with_moves(groups: Vec<Vec<Program>>, moves: &[Move]) -> Result<()> {
    let server = PgServer::start(PgOptions::default()).await?;
    let direct = Target {
        host: "127.0.0.1".to_owned(),
        port: server.port(),
        user: "postgres".to_owned(),
        password: String::new(),
        database: "postgres".to_owned(),
    };
    let subject = Subject::start_with(|builder| {
        builder
            .parameter("max_connections", "150")
            // A crash here is one of processes: what they wrote is in the kernel's cache.
            .parameter("fsync", "off")
            .drain_timeout(Duration::from_millis(500))
    })
    .await?;
    let role = format!("grant pg_monitor to \"{}\"", subject.target().user);
    subject.admin().await?.batch_execute(&role).await?;
    let mut problems = Vec::new();
    for programs in groups.into_iter().map(wanted) {
        problems.extend(Box::pin(group(&programs, &subject, &direct, moves)).await?);
    }
    subject.stop().await;
    problems.sort();
    if problems.is_empty() {
        return Ok(());
    }
    Err(problems.join("\n").into())
}

async fn group(
    programs: &[Program],
    subject: &Subject,
    direct: &Target,
    moves: &[Move],
) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for (name, ran) in Box::pin(run_together(programs, subject, moves)).await? {
        let Some(program) = programs.iter().find(|p| p.name == name) else {
            continue;
        };
        let expect = match moves.first() {
            Some(Move::Crash) => program.crash,
            _ => program.planned,
        };
        let judged = match ran {
            Ok(ran) => {
                let alone = run_alone(program, direct).await;
                let alone = alone.map_err(|e| format!("{name} on PostgreSQL alone: {e}"))?;
                judge(program, expect, &ran, &alone, direct).await?
            }
            Err(error) => Some(error.to_string()),
        };
        problems.extend(judged.map(|problem| format!("{name}: {problem}")));
    }
    Ok(problems)
}

fn programs() -> Vec<Vec<Program>> {
    let mut all = constructs::statements::programs();
    all.extend(constructs::copy_and_cursors::programs());
    all.extend(constructs::locks_and_levels::programs());
    all.extend(constructs::objects::programs());
    all.extend(constructs::protocol::programs());
    // These wait until no serializable transaction writes any more: nobody may write beside them.
    vec![all, constructs::locks_and_levels::deferrable()]
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_switchover() -> std::result::Result<(), Shown> {
    Ok(with_moves(programs(), &[Move::Planned, Move::Crash]).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_crash() -> std::result::Result<(), Shown> {
    Ok(with_moves(programs(), &[Move::Crash, Move::Planned]).await?)
}
