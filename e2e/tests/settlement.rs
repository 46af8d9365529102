//! Long work over many moves: five switchovers and five crashes in one transaction, of a settlement
//! with temporary tables of its own and of many small statements. The programs judge by their own
//! data.

mod settlement {
    pub(crate) mod with_sqlx;
}

use helios_e2e::driver::{Program, Programs};
use helios_e2e::subject::{Move, Subject};
use helios_e2e::{Result, Shown};

/// Moves of each run: one behind each batch.
const MOVES: usize = 10;

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_survives_five_switchovers_and_five_crashes() -> std::result::Result<(), Shown>
{
    Ok(with(Program::Python("settlement")).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_by_jdbc_survives_five_switchovers_and_five_crashes()
-> std::result::Result<(), Shown> {
    Ok(with(Program::Java("Settlement")).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_by_sqlx_survives_five_switchovers_and_five_crashes()
-> std::result::Result<(), Shown> {
    Ok(by_sqlx().await?)
}

/// Many small statements; with `HELIOS_LONG_STATEMENTS` and `HELIOS_LONG_SECONDS` more of them, for
/// longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_transaction_survives_five_switchovers_and_five_crashes()
-> std::result::Result<(), Shown> {
    Ok(with(Program::Python("long_transaction")).await?)
}

/// One crash, then one switchover, and so on.
async fn alternate(subject: &Subject, moved: &mut usize) -> Result<()> {
    *moved += 1;
    match *moved % 2 {
        1 => subject.move_primary(Move::Crash).await,
        _ => subject.switchover().await,
    }
}

fn all_moved(moved: usize) -> Result<()> {
    match moved {
        MOVES => Ok(()),
        moved => Err(format!("it asked {moved} times for a move").into()),
    }
}

async fn with(program: Program) -> Result<()> {
    let programs = Programs::set_up().await?;
    let subject = Subject::start().await?;
    let target = subject.target();
    programs.run(program, target, async || Ok(())).await?;
    let mut moved = 0;
    let run = programs
        .run(program, target, async || {
            alternate(&subject, &mut moved).await
        })
        .await;
    run.map_err(|problem| format!("with moves: {problem}"))?;
    all_moved(moved)?;
    subject.stop().await;
    Ok(())
}

async fn by_sqlx() -> Result<()> {
    let subject = Subject::start().await?;
    let target = subject.target();
    settlement::with_sqlx::program(target, async || Ok(())).await?;
    let mut moved = 0;
    let run =
        settlement::with_sqlx::program(target, async || alternate(&subject, &mut moved).await);
    run.await
        .map_err(|problem| format!("with moves: {problem}"))?;
    all_moved(moved)?;
    subject.stop().await;
    Ok(())
}
