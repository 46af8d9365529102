//! The `helios` command line: reads options, sets up logs and the runtime, calls a library, turns
//! the result into output and an exit status. No logic of the product lives here but the demo's.

mod cli;
mod commands;
mod demo;
mod failure;
mod out;
mod plugin;
mod table;

use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use helios_telemetry::LogFormat;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use cli::{Cli, Command, LocalCommand, LogArgs, LogFormatArg};
use failure::Failure;

fn main() -> ExitCode {
    let cli = match plugin_name() {
        Some(plugin::COMPLETE) => return complete(),
        Some(_) => {
            let plugin::PluginCli { log, plugin } = plugin::PluginCli::parse();
            let command = Command::Kubectl(plugin);
            Cli { log, command }
        }
        None => Cli::parse(),
    };
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message().is_empty() {
                out::note(&format!("helios: {failure}"));
            }
            ExitCode::from(failure.code())
        }
    }
}

/// The plugin's name, if this program was started under it.
fn plugin_name() -> Option<&'static str> {
    let path = std::env::args_os().next()?;
    let name = Path::new(&path).file_name()?.to_str()?.to_owned();
    [plugin::NAME, plugin::COMPLETE]
        .into_iter()
        .find(|known| *known == name)
}

/// kubectl asks what comes next on its command line. Nothing is a good answer.
fn complete() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    if let Ok(runtime) = runtime {
        runtime.block_on(plugin::complete(&words));
    }
    ExitCode::SUCCESS
}

fn run(cli: &Cli) -> Result<(), Failure> {
    match &cli.command {
        Command::Completions { shell } => return completions(*shell),
        Command::Proxy(args) if args.check => return commands::proxy::check(args),
        Command::Crds { values_schema } => return commands::kubernetes::crds(*values_schema),
        Command::CopyTo { path } => return commands::kubernetes::copy_to(path),
        // The first process of a container has to reap what others leave; that is all it does.
        Command::Agent(_) if std::process::id() == 1 => return commands::first::run(),
        _ => {}
    }
    raise_file_limit();
    // The demo has a terminal of its own to draw on: its log goes to a file.
    let workspace = match &cli.command {
        Command::Demo(_) => Some(demo::Workspace::create()?),
        _ => None,
    };
    let log_file = workspace.as_ref().map(demo::Workspace::log);
    if let Err(failure) = set_up_log(&cli.log, &cli.command, log_file.as_deref()) {
        if let Some(workspace) = &workspace {
            workspace.remove();
        }
        return Err(failure);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::failed(format!("could not start threads: {e}")))?;
    runtime.block_on(async {
        match (&cli.command, &workspace) {
            (Command::Demo(args), Some(workspace)) => Box::pin(demo::run(args, workspace)).await,
            (Command::Local(command), _) => Box::pin(commands::local::run(command)).await,
            (Command::Agent(args), _) => Box::pin(commands::serve::agent(args)).await,
            (Command::Status(args), _) => commands::show::status(args).await,
            (Command::Sessions(args), _) => commands::show::sessions(args).await,
            (Command::Switchover(args), _) => commands::show::switchover(args).await,
            (Command::Proxy(args), _) => Box::pin(commands::proxy::run(args)).await,
            (Command::Operator(args), _) => Box::pin(commands::kubernetes::operator(args)).await,
            (Command::Kubectl(args), _) => Box::pin(plugin::run(args)).await,
            (
                Command::Completions { .. }
                | Command::Demo(_)
                | Command::Crds { .. }
                | Command::CopyTo { .. },
                _,
            ) => Ok(()),
        }
    })
}

fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "helios", &mut script);
    out::print_raw(&script);
    Ok(())
}

fn set_up_log(args: &LogArgs, command: &Command, file: Option<&Path>) -> Result<(), Failure> {
    let runs_on = matches!(
        command,
        Command::Local(LocalCommand::Start(_))
            | Command::Agent(_)
            | Command::Proxy(_)
            | Command::Operator(_)
            | Command::Demo(_)
    );
    let default = if runs_on { "info" } else { "warn" };
    let format = match args.log_format {
        LogFormatArg::Text => LogFormat::Text,
        LogFormatArg::Json => LogFormat::Json,
    };
    let filter = args.log_level.as_deref().unwrap_or(default);
    helios_telemetry::init(format, filter, file).map_err(|e| Failure::usage(e.to_string()))
}

/// Thousands of sessions need thousands of descriptors; the usual soft limit is 1024.
fn raise_file_limit() {
    // Failing is no reason to stop: the limit then shows as refused connections, with a reason.
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
