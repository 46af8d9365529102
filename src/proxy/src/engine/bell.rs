//! Waking a session from outside.
//!
//! Cheaper than a future that has to be polled on every wake-up of the session's. The invariant:
//! a session that listens first and looks afterwards, and a caller that changes first and rings
//! afterwards, never miss each other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;

use futures_util::task::AtomicWaker;

/// Wakes one session. Rings are not counted: several may be heard as one.
#[derive(Debug, Default)]
pub struct Bell {
    waker: AtomicWaker,
    rung: AtomicBool,
}

impl Bell {
    /// Rings: whoever listens looks at what has changed.
    pub fn ring(&self) {
        self.rung.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// From now on rings wake this task. To be called before every look, also when the task was
    /// woken by something else: a ring uses the waker up.
    pub fn listen(&self, waker: &Waker) {
        self.waker.register(waker);
    }

    /// Whether it rang since the last call.
    pub fn rung(&self) -> bool {
        // A load alone in the common case: this is asked on every wake-up.
        self.rung.load(Ordering::SeqCst) && self.rung.swap(false, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::task::Poll;

    /// Two threads; the listener is also woken by things of no interest, as a session is by its
    /// sockets.
    #[test]
    fn no_ring_is_missed() {
        const RINGS: u64 = 20_000;
        let (bell, count) = (Arc::new(Bell::default()), Arc::new(AtomicU64::new(0)));
        let heard = Arc::new(AtomicU64::new(0));
        let ringer = {
            let (bell, count, heard) = (bell.clone(), count.clone(), heard.clone());
            std::thread::spawn(move || {
                for n in 1..=RINGS {
                    count.store(n, Ordering::SeqCst);
                    bell.ring();
                    while heard.load(Ordering::SeqCst) < n {
                        std::hint::spin_loop();
                        std::thread::yield_now();
                    }
                }
            })
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let listening = poll_fn(|cx| {
            bell.listen(cx.waker());
            if bell.rung() {
                let seen = count.load(Ordering::SeqCst);
                heard.store(seen, Ordering::SeqCst);
                if seen == RINGS {
                    return Poll::Ready(());
                }
                // A ring between the look and here must still wake.
                if seen % 3 == 0 {
                    cx.waker().wake_by_ref();
                }
                return if bell.rung() {
                    cx.waker().wake_by_ref();
                    heard.store(count.load(Ordering::SeqCst), Ordering::SeqCst);
                    if heard.load(Ordering::SeqCst) == RINGS {
                        Poll::Ready(())
                    } else {
                        Poll::Pending
                    }
                } else {
                    Poll::Pending
                };
            }
            Poll::Pending
        });
        let limit = std::time::Duration::from_secs(60);
        runtime
            .block_on(async { tokio::time::timeout(limit, listening).await })
            .expect("a ring was missed");
        ringer.join().unwrap();
    }
}
