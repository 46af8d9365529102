//! What a proxy goes on with when it was started again and nobody tells it where the primary is.
//!
//! The invariant: a primary that was promoted since is not served by what was kept of the time
//! before, because other proxies may be in the middle of their replays there.

use std::path::Path;

use helios_api::Timeline;
use helios_api::control::Topology;

use super::link::Link;
use super::replay::simple;
use crate::ProxyOptions;
use crate::backend;

/// Writes what is served now.
pub(crate) fn write(file: &Path, topology: &Topology) {
    let fresh = file.with_extension("new");
    let kept = serde_json::to_vec(topology)
        .map_err(std::io::Error::from)
        .and_then(|text| std::fs::write(&fresh, text))
        .and_then(|()| std::fs::rename(&fresh, file));
    if let Err(error) = kept {
        tracing::warn!(%error, "topology could not be kept");
    }
}

/// Whether the primary of then is there, and writes the same timeline as then.
pub(crate) async fn is_still_so(
    topology: &Topology,
    options: &ProxyOptions,
) -> Result<bool, String> {
    let (at, limit) = (&topology.primary.endpoint, options.engine.connect_timeout);
    let conn = backend::connect(at, &options.backend_tls, &options.service, limit).await;
    let conn = conn.map_err(|e| e.to_string())?;
    let mut link = Link::new(conn.stream, conn.buf);
    // Fails on a standby.
    let sql = "SELECT pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn())";
    let rows = simple(&mut link, sql).await.map_err(|e| e.to_string())?;
    let name = rows.first().and_then(|row| row.first()?.as_deref());
    let timeline = name.and_then(|name| u32::from_str_radix(name.get(..8)?, 16).ok());
    Ok(timeline.map(Timeline) == Some(topology.timeline))
}
