//! Health of the primary, as this proxy sees it. A witness only: a proxy alone never triggers a
//! failover (design section 6).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::gate::Phase;
use super::link::Link;
use super::registry::{Identity, lock};
use super::replay::simple;
use super::shared::Shared;
use crate::backend;

const CHECK: &str = "SELECT pg_catalog.pg_postmaster_start_time()::pg_catalog.text";

/// When a backend began, exact and the same whatever the connection's settings are.
pub(super) const STARTED: &str = "extract(epoch from backend_start)::pg_catalog.text";

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
            if let Ok(Some((mut fresh, started))) = checked {
                let known = identify(&shared, &mut fresh, epoch);
                // One that does not answer is out of step, and opened anew.
                link = matches!(tokio::time::timeout(timeout, known).await, Ok(Some(())))
                    .then_some((epoch, fresh));
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

/// Asks when the backends began of which that is not known yet.
async fn identify(shared: &Shared, link: &mut Link, epoch: helios_api::Epoch) -> Option<()> {
    let is_new = |i: &Identity| i.started.is_none() && i.epoch == epoch && i.pid != 0;
    let mut new = shared.registry.all();
    new.retain(|entry| is_new(&lock(&entry.identity)));
    if new.is_empty() {
        return Some(());
    }
    let pids: Vec<String> = new
        .iter()
        .map(|entry| lock(&entry.identity).pid.to_string())
        .collect();
    let sql = format!(
        "SELECT pid, {STARTED} FROM pg_catalog.pg_stat_activity \
         WHERE pid OPERATOR(pg_catalog.=) ANY ('{{{}}}'::pg_catalog.int4[])",
        pids.join(",")
    );
    let rows = simple(link, &sql).await.ok()?;
    let started: HashMap<i32, String> = rows
        .into_iter()
        .filter_map(|row| match <[_; 2]>::try_from(row) {
            Ok([Some(pid), Some(at)]) => Some((pid.parse().ok()?, at)),
            _ => None,
        })
        .collect();
    for entry in new {
        let mut identity = lock(&entry.identity);
        if is_new(&identity) {
            identity.started = started.get(&identity.pid).cloned();
        }
    }
    Some(())
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
