//! Long work with temporary tables of its own, over many moves: five switchovers and five crashes in
//! one transaction. The program judges by its own data.

use helios_e2e::driver::{Program, Programs};
use helios_e2e::subject::{Move, Subject};
use helios_e2e::{Result, Shown};

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_survives_five_switchovers_and_five_crashes() -> std::result::Result<(), Shown>
{
    Ok(settlement().await?)
}

async fn settlement() -> Result<()> {
    let programs = Programs::set_up().await?;
    let subject = Subject::start().await?;
    let (program, target) = (Program::Python("settlement"), subject.target());
    programs.run(program, target, async || Ok(())).await?;
    let mut crash = false;
    let moved = programs
        .run(program, target, async || {
            crash = !crash;
            match crash {
                true => subject.move_primary(Move::Crash).await,
                false => subject.switchover().await,
            }
        })
        .await;
    let asked = moved.map_err(|problem| format!("with moves: {problem}"))?;
    if asked != 10 {
        return Err(format!("it asked {asked} times for a move").into());
    }
    subject.stop().await;
    Ok(())
}
