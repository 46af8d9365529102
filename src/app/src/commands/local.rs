//! `helios local` but for `start` and what shows something.

use std::io::{BufRead as _, IsTerminal as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use helios_local::client::LocalClient;

use crate::cli::{DestroyArgs, DirArgs, InstanceArgs, LocalCommand, PsqlArgs};
use crate::failure::Failure;
use crate::out;

/// Runs one of them.
pub(crate) async fn run(command: &LocalCommand) -> Result<(), Failure> {
    match command {
        LocalCommand::Start(args) => super::start::run(args).await,
        LocalCommand::Status(args) => super::show::status(args).await,
        LocalCommand::Sessions(args) => super::show::sessions(args).await,
        LocalCommand::Switchover(args) => super::show::switchover(args).await,
        LocalCommand::Failover(args) => super::show::failover(args).await,
        LocalCommand::Fence(args) => fence(args).await,
        LocalCommand::Unfence(args) => unfence(args).await,
        LocalCommand::Stop(args) => stop(args).await,
        LocalCommand::Destroy(args) => destroy(args).await,
        LocalCommand::Psql(args) => psql(args).await,
    }
}

/// The data directory as an absolute path: the cluster's processes have other current ones.
pub(crate) fn absolute(dir: &DirArgs) -> Result<PathBuf, Failure> {
    std::path::absolute(&dir.data_dir).map_err(|e| {
        Failure::usage(format!(
            "invalid data directory \"{}\": {e}",
            dir.data_dir.display()
        ))
    })
}

async fn fence(args: &InstanceArgs) -> Result<(), Failure> {
    LocalClient::new(absolute(&args.dir)?)
        .fence(&args.instance)
        .await?;
    out::note(&format!("\"{}\" is fenced", args.instance));
    Ok(())
}

async fn unfence(args: &InstanceArgs) -> Result<(), Failure> {
    LocalClient::new(absolute(&args.dir)?)
        .unfence(&args.instance)
        .await?;
    out::note(&format!("\"{}\" may come back", args.instance));
    Ok(())
}

async fn stop(args: &DirArgs) -> Result<(), Failure> {
    LocalClient::new(absolute(args)?).stop().await?;
    out::note("stopped");
    Ok(())
}

async fn destroy(args: &DestroyArgs) -> Result<(), Failure> {
    let dir = absolute(&args.dir)?;
    if !args.yes && !confirmed(&dir.display().to_string())? {
        return Err(Failure::failed("nothing was removed"));
    }
    helios_local::destroy(&dir).await?;
    out::note(&format!("removed {}", dir.display()));
    Ok(())
}

fn confirmed(dir: &str) -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage(
            "removing a cluster needs a confirmation\nhint: use --yes where nobody can be asked",
        ));
    }
    out::note(&format!("Remove {dir} and all data in it? Type yes:"));
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|e| Failure::failed(format!("could not read the answer: {e}")))?;
    Ok(answer.trim() == "yes")
}

/// Becomes psql.
async fn psql(args: &PsqlArgs) -> Result<(), Failure> {
    let status = LocalClient::new(absolute(&args.dir)?).status().await?;
    let program = std::env::var_os("PG_BINDIR")
        .map(|dir| PathBuf::from(dir).join("psql"))
        .filter(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from("psql"));
    // Only returns when it could not be started.
    let error = Command::new(&program)
        .arg(&status.connection_string)
        .args(&args.args)
        .exec();
    Err(Failure::failed(format!(
        "could not start \"{}\": {error}\nhint: install PostgreSQL's client, or name its folder in PG_BINDIR",
        program.display()
    )))
}
