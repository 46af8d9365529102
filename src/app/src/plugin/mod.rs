//! `kubectl helios`: what a person does with a HeliosCluster. The same program under the name
//! `kubectl-helios`, or `helios kubectl`.
//!
//! May do I/O: the API server, with the rights of whoever runs it, and nothing else; psql is this
//! machine's own. Invariant: it asks the operator (by annotation) and shows what the operator and
//! the proxies say; it decides nothing.

mod args;
mod complete;
mod fence;
mod forward;
mod logs;
mod place;
mod psql;
mod report;
mod sessions;
mod status;
mod switchover;

use clap::CommandFactory as _;

use args::PluginCommand;
pub(crate) use args::{PluginArgs, PluginCli};
use place::Place;

use crate::failure::Failure;
use crate::out;

/// Names under which this program is the plugin, and its completion.
pub(crate) const NAME: &str = "kubectl-helios";
pub(crate) const COMPLETE: &str = "kubectl_complete-helios";

/// Runs a command of the plugin.
pub(crate) async fn run(args: &PluginArgs) -> Result<(), Failure> {
    if let PluginCommand::Completions { shell } = &args.command {
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut PluginCli::command(), NAME, &mut script);
        out::print_raw(&script);
        return Ok(());
    }
    let place = Place::find(&args.place).await?;
    match &args.command {
        PluginCommand::Status(args) => status::run(&place, args).await,
        PluginCommand::Switchover(args) => Box::pin(switchover::run(&place, args)).await,
        PluginCommand::Sessions(args) => sessions::run(&place, args).await,
        PluginCommand::Fence(args) => fence::run(&place, args, true).await,
        PluginCommand::Unfence(args) => fence::run(&place, args, false).await,
        PluginCommand::Logs(args) => logs::run(&place, args).await,
        PluginCommand::Psql(args) => psql::run(&place, args).await,
        PluginCommand::Report(args) => Box::pin(report::run(&place, args)).await,
        PluginCommand::Completions { .. } => Ok(()),
    }
}

/// Prints what the last of `words` can be.
pub(crate) async fn complete(words: &[String]) {
    out::print_raw(complete::run(words).await.as_bytes());
}
