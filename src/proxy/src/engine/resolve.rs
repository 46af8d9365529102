//! Whether a transaction committed, from evidence in the database (design rule 4).
//!
//! `pg_xact_status` on the current primary is evidence only for ids that no later timeline has
//! handed out again: ids below the fence of the first promotion after the transaction's epoch. Ids
//! that the same timeline hands out again are `super::restarts`'s.

use helios_api::control::Topology;
use helios_api::{Epoch, Timeline, Xid};

use helios_session::state::literal;

use super::link::Link;
use super::replay::{ReplayError, simple};

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It committed, or was prepared: what was asked of it has been done.
    Committed,
    /// It did not, and never will.
    Aborted,
    /// It still runs.
    InProgress,
    /// Nobody can tell any more.
    Unknown,
}

/// What the fences say of a transaction of `epoch`, before the database is asked.
#[must_use]
pub(super) fn by_fence(
    topology: &Topology,
    (epoch, timeline): (Epoch, Timeline),
    xid: Xid,
) -> Option<Outcome> {
    // The same timeline goes on; ids that a restart handed out again are seen in its log
    // (`super::restarts`).
    if topology.epoch == epoch || topology.timeline == timeline {
        return None;
    }
    let first_after = topology
        .fences
        .iter()
        .filter(|f| f.epoch > epoch)
        .min_by_key(|f| f.epoch);
    match first_after {
        Some(fence) if fence.epoch == epoch.next() => match fence.xid {
            Some(fence) if xid >= fence => Some(Outcome::Aborted),
            Some(_) => None,
            None => Some(Outcome::Unknown),
        },
        _ => Some(Outcome::Unknown),
    }
}

/// Asks the primary behind `link`; `prepares` is the identifier when PREPARE TRANSACTION was to end
/// the transaction.
///
/// # Errors
/// The connection's.
pub(super) async fn resolve(
    link: &mut Link,
    topology: &Topology,
    ran_on: (Epoch, Timeline),
    xid: Xid,
    prepares: Option<&str>,
) -> Result<Outcome, ReplayError> {
    // First: a prepared transaction is not completed, so its id may lie above the fence.
    if let Some(gid) = prepares
        && is_prepared(link, xid, gid).await?
    {
        return Ok(Outcome::Committed);
    }
    if let Some(outcome) = by_fence(topology, ran_on, xid) {
        return Ok(outcome);
    }
    let sql = format!("SELECT pg_catalog.pg_xact_status('{xid}'::pg_catalog.xid8)");
    let rows = match simple(link, &sql).await {
        Ok(rows) => rows,
        // "is in the future": this primary has never handed the id out.
        Err(ReplayError::State(why)) if why.contains("(22023)") => return Ok(Outcome::Aborted),
        Err(e) => return Err(e),
    };
    let status = rows.first().and_then(|r| r.first()).cloned().flatten();
    Ok(match status.as_deref() {
        Some("committed") => {
            if topology.epoch == ran_on.0 {
                confirm(link).await?;
            }
            Outcome::Committed
        }
        Some("aborted") => Outcome::Aborted,
        // The server goes on, or was started again; after a promotion nothing of before can run.
        Some("in progress") if topology.epoch == ran_on.0 || topology.timeline == ran_on.1 => {
            Outcome::InProgress
        }
        _ => Outcome::Unknown,
    })
}

/// Waits until the standbys have what the primary has committed, as the cluster asks for: a backend
/// that was ended during its wait has committed here, and perhaps nowhere else.
async fn confirm(link: &mut Link) -> Result<(), ReplayError> {
    let sql = "SELECT pg_catalog.pg_logical_emit_message(true, 'helios', '')";
    simple(link, sql).await.map(drop)
}

/// Whether a transaction stands prepared: it is in progress until somebody ends it, on every
/// primary to come, and its PREPARE TRANSACTION has succeeded.
async fn is_prepared(link: &mut Link, xid: Xid, gid: &str) -> Result<bool, ReplayError> {
    let low = xid.0 & u64::from(u32::MAX);
    let gid = literal(gid);
    let sql = format!(
        "SELECT 1 FROM pg_catalog.pg_prepared_xacts \
         WHERE transaction OPERATOR(pg_catalog.=) '{low}'::pg_catalog.xid \
         AND gid OPERATOR(pg_catalog.=) {gid}"
    );
    Ok(!simple(link, &sql).await?.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use helios_api::control::{Backend, Fence};
    use helios_api::{Endpoint, Host, Lsn};

    fn topology(epoch: u64, fences: &[(u64, Option<u64>)]) -> Topology {
        let fences = fences.iter().map(|(epoch, xid)| Fence {
            epoch: Epoch(*epoch),
            timeline: Timeline(u32::try_from(*epoch).unwrap()),
            fork: Lsn(0),
            xid: xid.map(Xid),
            lost: helios_api::control::LostCommits::None,
        });
        Topology {
            epoch: Epoch(epoch),
            timeline: Timeline(u32::try_from(epoch).unwrap()),
            primary: Backend {
                name: "a".parse().unwrap(),
                endpoint: Endpoint {
                    host: Host::Tcp("x".into()),
                    port: 1,
                },
            },
            fences: fences.collect(),
        }
    }

    fn ran(epoch: u64) -> (Epoch, Timeline) {
        (Epoch(epoch), Timeline(u32::try_from(epoch).unwrap()))
    }

    #[test]
    fn the_first_fence_after_the_epoch_decides() {
        let t = topology(4, &[(2, Some(100)), (3, Some(200)), (4, Some(300))]);
        // of epoch 1: below 100 ask, at or above never committed, although id 150 exists later
        assert_eq!(by_fence(&t, ran(1), Xid(99)), None);
        assert_eq!(by_fence(&t, ran(1), Xid(100)), Some(Outcome::Aborted));
        assert_eq!(by_fence(&t, ran(2), Xid(150)), None);
        assert_eq!(by_fence(&t, ran(3), Xid(299)), None);
        assert_eq!(by_fence(&t, ran(4), Xid(1000)), None);
    }

    #[test]
    fn a_missing_fence_means_unknown() {
        assert_eq!(
            by_fence(&topology(2, &[]), ran(1), Xid(1)),
            Some(Outcome::Unknown)
        );
        let t = topology(3, &[(3, Some(9))]);
        assert_eq!(by_fence(&t, ran(1), Xid(1)), Some(Outcome::Unknown));
        let t = topology(2, &[(2, None)]);
        assert_eq!(by_fence(&t, ran(1), Xid(1)), Some(Outcome::Unknown));
    }
}
