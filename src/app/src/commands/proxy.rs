//! `helios proxy --check`: says everything that is wrong with a `helios_proxy.toml`.

use helios_proxy::config::ProxyConfig;

use crate::cli::ProxyArgs;
use crate::failure::Failure;
use crate::out;

/// Runs it.
pub(crate) fn check(args: &ProxyArgs) -> Result<(), Failure> {
    ProxyConfig::load(&args.config).map_err(|e| Failure::usage(e.to_string()))?;
    out::note(&format!("{} is valid", args.config.display()));
    Ok(())
}
