//! Commands that run one server process: `agent`.

use std::path::Path;
use std::time::Duration;

use helios_agent::AgentConfig;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::cli::AgentArgs;
use crate::failure::Failure;

/// How long the last lines of PostgreSQL's log may take.
const LAST_LINES: Duration = Duration::from_secs(1);

/// `helios agent`.
pub(crate) async fn agent(args: &AgentArgs) -> Result<(), Failure> {
    let mut config: AgentConfig = serde_json::from_str(&read(&args.config)?)
        .map_err(|e| Failure::usage(format!("\"{}\": {e}", args.config.display())))?;
    // Whoever wrote it for a Pod does not know where the image has PostgreSQL.
    if config.bin_dir.as_os_str().is_empty() {
        config.bin_dir = helios_local::postgres::find_bin_dir(None)?.path;
    }
    let cancel = CancellationToken::new();
    // Ends when nothing more can come: behind the agent, which stops the server first.
    let (log, ended) = (config.log_file(), CancellationToken::new());
    let forwarding = args.forward_log.then(|| {
        let pass = |line: &str| tracing::info!(target: "postgres", "{line}");
        tokio::spawn(helios_agent::forward_log(log, ended.clone(), pass))
    });
    let mut terminate = signal(SignalKind::terminate())
        .map_err(|e| Failure::failed(format!("could not listen for signals: {e}")))?;
    // ctrl-C in a terminal reaches the whole group; the supervisor decides when its agents end.
    let mut interrupt = signal(SignalKind::interrupt())
        .map_err(|e| Failure::failed(format!("could not listen for signals: {e}")))?;
    let mut running = Box::pin(helios_agent::run(config, cancel.clone()));
    loop {
        tokio::select! {
            result = &mut running => {
                ended.cancel();
                if let Some(task) = forwarding {
                    let _ = tokio::time::timeout(LAST_LINES, task).await;
                }
                return result.map_err(|e| Failure::failed(e.to_string()));
            }
            _ = terminate.recv() => cancel.cancel(),
            _ = interrupt.recv() => tracing::debug!("interrupt ignored"),
        }
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path)
        .map_err(|e| Failure::usage(format!("could not read \"{}\": {e}", path.display())))
}
