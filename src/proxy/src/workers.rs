//! The threads that sessions live on.
//!
//! A few runtimes of a single thread; a session stays where it began. A session does little
//! between two waits: handing it from thread to thread, and waking threads to do so, would cost
//! more than the work itself. The fewer threads, the more sessions are served by one wake-up: by
//! default there is one for two processors, because an exchange costs its server and its client
//! more than it costs the proxy, and they run on the same machine or are many. The invariant: a session's sockets, its task and what it
//! spawns are on one thread.

use std::future::Future;
use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// The threads. They end when this is dropped, and what still runs on them with them.
#[derive(Debug)]
pub(crate) struct Workers {
    homes: Vec<Home>,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Home {
    runtime: Handle,
    tasks: Arc<AtomicUsize>,
}

impl Workers {
    /// Starts this many threads, or one for two processors.
    ///
    /// # Errors
    ///
    /// The system gives no more threads or descriptors.
    pub(crate) fn start(threads: Option<usize>) -> io::Result<Self> {
        let default = || {
            let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
            processors.div_ceil(2)
        };
        let count = threads.unwrap_or_else(default).max(1);
        let mut workers = Self {
            homes: Vec::with_capacity(count),
            stop: CancellationToken::new(),
        };
        for number in 0..count {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            workers.homes.push(Home {
                runtime: runtime.handle().clone(),
                tasks: Arc::default(),
            });
            let stop = workers.stop.clone();
            std::thread::Builder::new()
                .name(format!("sessions-{number}"))
                .spawn(move || runtime.block_on(stop.cancelled()))?;
        }
        Ok(workers)
    }

    /// Ends the threads when it is dropped, unless it is disarmed.
    pub(crate) fn stop_on_drop(&self) -> DropGuard {
        self.stop.clone().drop_guard()
    }

    /// Runs a task on the thread that has the fewest.
    pub(crate) fn spawn(
        &self,
        tracker: &TaskTracker,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let load = |home: &&Home| home.tasks.load(Ordering::Relaxed);
        let Some(home) = self.homes.iter().min_by_key(load) else {
            return;
        };
        let place = Place::take(&home.tasks);
        let task = tracker.track_future(task);
        home.runtime.spawn(async move {
            let _place = place;
            task.await;
        });
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Counts a task as long as it exists.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(tasks: &Arc<AtomicUsize>) -> Self {
        tasks.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(tasks))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn tasks_are_spread_and_end_with_the_threads() {
        let workers = Workers::start(Some(3)).unwrap();
        let tracker = TaskTracker::new();
        let (names, mut seen) = tokio::sync::mpsc::unbounded_channel();
        for _ in 0..workers.homes.len() * 2 {
            let names = names.clone();
            workers.spawn(&tracker, async move {
                names
                    .send(std::thread::current().name().map(str::to_owned))
                    .unwrap();
                std::future::pending().await
            });
        }
        let mut found = Vec::new();
        for _ in 0..workers.homes.len() * 2 {
            found.push(seen.recv().await.unwrap());
        }
        found.sort();
        found.dedup();
        assert_eq!(found.len(), workers.homes.len(), "{found:?}");
        drop(workers);
        tracker.close();
        let gone = tokio::time::timeout(Duration::from_secs(30), tracker.wait());
        gone.await.expect("a task outlived its thread");
    }
}
