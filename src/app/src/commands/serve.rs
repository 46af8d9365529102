//! Commands that run one server process: `agent`.

use std::path::Path;

use helios_agent::AgentConfig;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::cli::AgentArgs;
use crate::failure::Failure;

/// `helios agent`.
pub(crate) async fn agent(args: &AgentArgs) -> Result<(), Failure> {
    let mut config: AgentConfig = serde_json::from_str(&read(&args.config)?)
        .map_err(|e| Failure::usage(format!("\"{}\": {e}", args.config.display())))?;
    // Whoever wrote it for a Pod does not know where the image has PostgreSQL.
    if config.bin_dir.as_os_str().is_empty() {
        config.bin_dir = helios_local::postgres::find_bin_dir(None)?.path;
    }
    let cancel = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())
        .map_err(|e| Failure::failed(format!("could not listen for signals: {e}")))?;
    // ctrl-C in a terminal reaches the whole group; the supervisor decides when its agents end.
    let mut interrupt = signal(SignalKind::interrupt())
        .map_err(|e| Failure::failed(format!("could not listen for signals: {e}")))?;
    let mut running = Box::pin(helios_agent::run(config, cancel.clone()));
    loop {
        tokio::select! {
            result = &mut running => {
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
