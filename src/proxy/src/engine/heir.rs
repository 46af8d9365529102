//! Backends on the standby that is to be promoted should the primary fail, for sessions whose
//! transaction has been open for a while: restored as for a planned move, and kept as long as the
//! transaction lasts, so that a crash costs its session neither a login nor the restoring of its
//! state.
//!
//! The invariants: at most [`MOST`] are kept, and none that was opened for a planned move is touched;
//! who finds the standby full leaves it alone for a while.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use helios_api::SessionId;
use helios_api::control::Backend;

use super::ahead::Warm;
use super::gate::Phase;
use super::link::READ;
use super::opening;
use super::registry::{Entry, lock};
use super::rehearsal::Rehearsals;
use super::shared::Shared;

/// How often sessions are looked at.
const EVERY: Duration = Duration::from_millis(500);

/// A transaction that has been open for so long gets a backend, in microseconds.
const LASTING: u64 = 1_000_000;

/// Most backends that are kept.
pub const MOST: usize = 100;

/// A session whose backend could not be opened is left out for so long.
const AGAIN: Duration = Duration::from_secs(10);

/// What becomes of the backend that a session has ahead of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It has what it needs, or needs nothing.
    Fine,
    /// It is of no use any more.
    Close,
    /// It needs one.
    Open,
}

/// Keeps them, as long as the proxy runs.
pub(crate) async fn keep(shared: Arc<Shared>) {
    let mut refused: HashMap<SessionId, Instant> = HashMap::new();
    loop {
        tokio::time::sleep(EVERY).await;
        refused.retain(|_, at| at.elapsed() < AGAIN);
        let now = shared.gate.now();
        if now.phase != Phase::Open {
            continue;
        }
        let heir = lock(&shared.heir).clone();
        let heir = heir.filter(|heir| heir.endpoint != now.topology.primary.endpoint);
        for entry in look(&shared, heir.as_ref()) {
            if let Some(heir) = &heir
                && !refused.contains_key(&entry.id)
                && !open(&shared, &entry, heir).await
            {
                refused.insert(entry.id, Instant::now());
            }
        }
    }
}

/// Closes what is of no use; the sessions that need one, those whose transaction is oldest first.
fn look(shared: &Shared, heir: Option<&Backend>) -> Vec<Arc<Entry>> {
    let now = shared.now_micros();
    let (mut kept, mut open) = (0, Vec::new());
    for entry in shared.registry.all() {
        let began = lasting(&entry, now);
        let mut warm = lock(&entry.warm);
        match verdict(warm.as_mut(), began, heir) {
            Verdict::Fine => kept += usize::from(warm.as_ref().is_some_and(|w| w.of.is_some())),
            Verdict::Close => *warm = None,
            Verdict::Open => {
                *warm = None;
                open.push((began, Arc::clone(&entry)));
            }
        }
    }
    open.sort_by_key(|(began, _)| *began);
    open.truncate(MOST.saturating_sub(kept));
    open.into_iter().map(|(_, entry)| entry).collect()
}

/// When the session's transaction began, if it has been open for long enough.
fn lasting(entry: &Entry, now: u64) -> Option<u64> {
    let began = entry.began.load(Ordering::Relaxed);
    (began > 0 && now.saturating_sub(began) >= LASTING).then_some(began)
}

fn verdict(warm: Option<&mut Warm>, began: Option<u64>, heir: Option<&Backend>) -> Verdict {
    let wanted = began.zip(heir);
    let Some(warm) = warm else {
        return wanted.map_or(Verdict::Fine, |_| Verdict::Open);
    };
    match (warm.of, wanted) {
        (None, _) => Verdict::Fine,
        (Some(_), None) => Verdict::Close,
        (Some(of), Some((began, heir))) => {
            let right = of == began && warm.conn.endpoint == heir.endpoint;
            if right && is_whole(warm) {
                Verdict::Fine
            } else {
                Verdict::Open
            }
        }
    }
}

/// Whether the server has not closed the connection. What it has said meanwhile is kept.
fn is_whole(warm: &mut Warm) -> bool {
    let mut cx = Context::from_waker(Waker::noop());
    let conn = &mut warm.conn;
    match conn.stream.poll_fill(&mut cx, &mut conn.buf, READ) {
        std::task::Poll::Ready(read) => read.is_ok_and(|read| read > 0),
        std::task::Poll::Pending => true,
    }
}

/// Opens one, on the session's own thread, where it will be used; whether it could be had.
async fn open(shared: &Arc<Shared>, entry: &Arc<Entry>, heir: &Backend) -> bool {
    let (shared, entry, heir) = (Arc::clone(shared), Arc::clone(entry), heir.clone());
    let home = entry.home.clone();
    let opening = home.spawn(async move {
        let Ok(_permit) = shared.logins.acquire().await else {
            return true;
        };
        let Some(began) = lasting(&entry, shared.now_micros()) else {
            return true;
        };
        let none = Rehearsals::default();
        let opened = opening::open_ahead(&shared, &entry, &heir.endpoint, &none).await;
        let Some(mut opened) = opened else {
            return false;
        };
        opened.of = Some(began);
        let mut warm = lock(&entry.warm);
        // A planned move may have opened another meanwhile, and the transaction may be over.
        if warm.is_none() && entry.began.load(Ordering::Relaxed) == began {
            *warm = Some(opened);
        }
        true
    });
    // A thread that ends takes its sessions with it.
    opening.await.unwrap_or(true)
}
