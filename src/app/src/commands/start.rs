//! `helios local start`, in the foreground and in the background.

use std::fs::OpenOptions;
use std::io::IsTerminal as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use helios_local::client::LocalClient;
use helios_local::{AgentMode, Durability, LocalCluster, LocalOptions, Progress, ProxyAuth};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast;

use super::local::absolute;
use crate::cli::{Auth, DurabilityArg, StartArgs};
use crate::failure::Failure;
use crate::out;

/// How long a background start may take; the cluster's own limit is 120 s.
const DETACH_LIMIT: Duration = Duration::from_secs(150);

/// Runs it.
pub(crate) async fn run(args: &StartArgs) -> Result<(), Failure> {
    let options = options(args)?;
    options.check()?;
    if args.detach {
        detach(&options.data_dir).await
    } else {
        foreground(options).await
    }
}

fn options(args: &StartArgs) -> Result<LocalOptions, Failure> {
    let program = std::env::current_exe()
        .map_err(|e| Failure::failed(format!("could not find this program's file: {e}")))?;
    let mut options = LocalOptions::new(absolute(&args.dir)?);
    options.instances = args.instances;
    options.listen.clone_from(&args.listen);
    options.http_listen.clone_from(&args.http);
    options.unix_socket_dir.clone_from(&args.socket_dir);
    args.mode.as_str().clone_into(&mut options.replay_mode);
    options.auth = match args.auth {
        Auth::Trust => ProxyAuth::Trust,
        Auth::Scram => ProxyAuth::Scram,
    };
    options.database.clone_from(&args.database);
    options.user.clone_from(&args.user);
    options.password.clone_from(&args.password);
    options.synchronous = !args.asynchronous;
    options.durability = match args.durability {
        DurabilityArg::Preferred => Durability::Preferred,
        DurabilityArg::Required => Durability::Required,
    };
    options.parameters.extend(args.settings.iter().cloned());
    options.proxy_config.clone_from(&args.proxy_config);
    options.agents = AgentMode::Process(program);
    Ok(options)
}

async fn foreground(options: LocalOptions) -> Result<(), Failure> {
    let dir = options.data_dir.clone();
    let failed = |e| Failure::failed(format!("could not listen for signals: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    out::note(&format!(
        "starting {} PostgreSQL servers in {}",
        options.instances,
        dir.display()
    ));
    let begun = Instant::now();
    let cluster = tokio::select! {
        cluster = Box::pin(LocalCluster::start(options)) => cluster?,
        _ = interrupt.recv() => return Err(Failure::interrupted()),
        _ = terminate.recv() => return Err(Failure::interrupted()),
    };
    // With the password for a person, who may see it, and not for a log.
    let address = match std::io::stderr().is_terminal() {
        true => cluster.connection_string(),
        false => cluster.status().await.connection_string,
    };
    let took = begun.elapsed().as_secs_f64();
    out::note(&format!("ready after {took:.1} s: psql \"{address}\""));
    let progress = tokio::spawn(follow(cluster.progress()));
    tokio::select! {
        () = cluster.stop_requested() => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    out::note("stopping");
    cluster.shutdown().await;
    progress.abort();
    out::note("stopped");
    Ok(())
}

/// Writes a line for each step of an operation.
async fn follow(mut steps: broadcast::Receiver<Progress>) {
    loop {
        match steps.recv().await {
            Ok(Progress::Phase {
                phase,
                elapsed_micros,
            }) => out::note(&format!(
                "{:>6} ms  {}",
                elapsed_micros / 1000,
                phase.as_str()
            )),
            Ok(Progress::Finished { operation: o }) => out::note(&format!(
                "{:?} from \"{}\" to \"{}\": {:?}, pause {} ms",
                o.kind,
                o.from,
                o.to,
                o.outcome,
                o.pause_micros() / 1000
            )),
            Ok(Progress::Refused { reason }) => out::note(&format!("refused: {reason}")),
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// Starts this program again without `--detach`, in a process group of its own, and waits until
/// the cluster answers.
async fn detach(dir: &Path) -> Result<(), Failure> {
    let failed = |what: &str, e: std::io::Error| Failure::failed(format!("could not {what}: {e}"));
    std::fs::create_dir_all(dir).map_err(|e| failed("create the data directory", e))?;
    // Beside the data directory, not in it: a new one has to be empty.
    let log_path = dir.with_extension("log");
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .map_err(|e| failed(&format!("open \"{}\"", log_path.display()), e))?;
    let errors = log.try_clone().map_err(|e| failed("open the log", e))?;
    let program = std::env::current_exe().map_err(|e| failed("find this program's file", e))?;
    let mut child = Command::new(program)
        .args(std::env::args_os().skip(1).filter(|a| a != "--detach"))
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        // Signals of this terminal must not reach it.
        .process_group(0)
        .spawn()
        .map_err(|e| failed("start in the background", e))?;
    let client = LocalClient::new(dir);
    let deadline = Instant::now() + DETACH_LIMIT;
    loop {
        if let Ok(status) = client.status().await
            && status.pid == child.id()
            && status.proxy.as_ref().is_some_and(|p| p.phase == "running")
        {
            out::note(&format!(
                "running in the background, process {}: psql \"{}\"",
                status.pid, status.connection_string
            ));
            return Ok(());
        }
        if let Some(status) = child.try_wait().map_err(|e| failed("wait for it", e))? {
            return Err(Failure::failed(format!(
                "the cluster did not start ({status})\ndetail: {}",
                last_line(&log_path)
            )));
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            return Err(Failure::failed(format!(
                "the cluster did not start within {DETACH_LIMIT:?}\ndetail: its log is \"{}\"",
                log_path.display()
            )));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The end of a log, for an error message.
fn last_line(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}
