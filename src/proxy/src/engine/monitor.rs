//! Health of the primary, as this proxy sees it. A witness only: a proxy alone never triggers a
//! failover (design section 6).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::gate::Phase;
use super::link::Link;
use super::registry::lock;
use super::replay::simple;
use super::shared::Shared;
use crate::backend;

const CHECK: &str = "SELECT pg_catalog.pg_postmaster_start_time()::pg_catalog.text";

/// Watches until it is dropped. The postmaster's start time tells an administrator's kill from a
/// restart; it is taken as soon as an epoch begins.
pub async fn watch(
    shared: Arc<Shared>,
    reachable: Arc<AtomicBool>,
    interval: Duration,
    timeout: Duration,
) {
    let mut gate = shared.gate.watch();
    let mut link: Option<(helios_api::Epoch, Link)> = None;
    let (mut good, mut bad) = (0_u32, 0_u32);
    loop {
        let state = gate.borrow_and_update().clone();
        if state.phase == Phase::Open {
            let epoch = state.topology.epoch;
            let old = link.take().filter(|(e, _)| *e == epoch).map(|(_, l)| l);
            let checked = tokio::time::timeout(timeout, check(&shared, old)).await;
            let up = matches!(checked, Ok(Some(_)));
            if let Ok(Some((fresh, started))) = checked {
                link = Some((epoch, fresh));
                *lock(&shared.postmaster_start) = started;
            }
            (good, bad) = if up {
                (good.saturating_add(1), 0)
            } else {
                (0, bad.saturating_add(1))
            };
            let up = match reachable.load(Ordering::Relaxed) {
                true => bad < shared.options.failure_threshold,
                false => good >= shared.options.success_threshold,
            };
            if reachable.swap(up, Ordering::Relaxed) != up {
                tracing::info!(primary = %state.topology.primary.name, up, "primary's health changed");
            }
            shared
                .metrics
                .backend_up(state.topology.primary.name.as_str(), up);
        }
        let pause = if link.is_some() {
            interval
        } else {
            interval.min(Duration::from_millis(100))
        };
        let _ = tokio::time::timeout(pause, gate.changed()).await;
    }
}

async fn check(shared: &Shared, old: Option<Link>) -> Option<(Link, Option<String>)> {
    if let Some(mut link) = old
        && simple(&mut link, &shared.options.check_query).await.is_ok()
        && let Ok(rows) = simple(&mut link, CHECK).await
    {
        return Some((
            link,
            rows.first().and_then(|r| r.first()).cloned().flatten(),
        ));
    }
    let at = shared.gate.now().topology.primary.endpoint.clone();
    let limit = shared.options.connect_timeout;
    let conn = backend::connect(&at, &shared.tls, &shared.service, limit)
        .await
        .ok()?;
    let mut link = Link::new(conn.stream, conn.buf);
    let rows = simple(&mut link, CHECK).await.ok()?;
    Some((
        link,
        rows.first().and_then(|r| r.first()).cloned().flatten(),
    ))
}
