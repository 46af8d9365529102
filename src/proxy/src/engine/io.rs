//! Waiting: for bytes, for the gate, for the clock.
//!
//! The invariant: a session sleeps only when every socket would block and nothing that it could do
//! is left.

use std::future::poll_fn;
use std::task::{Context, Poll};

use tokio::sync::watch;

use super::gate::GateState;
use super::link::{HIGH_WATER, READ};
use super::session::{End, Event, Session};

/// Bytes of results up to which a client gets them with the outcome of their commit.
const WITHHELD: usize = 8 * 1024;

/// Whether the gate has taken a step that the session has not seen, or has gone.
fn has_moved(gate: &watch::Receiver<GateState>) -> bool {
    !matches!(gate.has_changed(), Ok(false))
}

impl Session {
    /// Moves bytes until something else happens.
    pub(super) async fn until_event(&mut self, gate: &watch::Receiver<GateState>) -> Event {
        let timer = self.next_timer();
        self.timer_at = timer;
        let Some(at) = timer else {
            return poll_fn(|cx| self.poll_event(cx, gate)).await;
        };
        let sleep = tokio::time::sleep_until(at);
        tokio::pin!(sleep);
        poll_fn(|cx| {
            // A step of the gate comes first: what a timer begins is void once the gate has moved
            // on, and a timer that is due at once would begin it again and again.
            if !has_moved(gate) && sleep.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Event::Timer);
            }
            self.poll_event(cx, gate)
        })
        .await
    }

    /// Two atomic loads beside the sockets: this runs on every wake-up.
    fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
        gate: &watch::Receiver<GateState>,
    ) -> Poll<Event> {
        // First to be heard, then to look: whoever changes something changes it first and rings
        // then, so one of the two is always noticed (see `bell`).
        let bell = &self.entry().bell;
        bell.listen(cx.waker());
        let rung = bell.rung();
        if has_moved(gate) {
            return Poll::Ready(Event::Gate);
        }
        if rung {
            return Poll::Ready(Event::Cancel);
        }
        self.poll_io(cx)
    }

    /// Reads, pumps and writes until every socket would block.
    pub(super) fn poll_io(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        loop {
            match self.pump() {
                Ok(()) => {}
                Err(event) => return Poll::Ready(event),
            }
            self.acknowledge();
            if self.leaves_with_proxy() {
                return Poll::Ready(Event::End(self.ended_with_proxy()));
            }
            if self.needs_server_now() || self.keeps_unarmed() {
                return Poll::Ready(Event::Timer);
            }
            let full = self.has_full_output();
            if let Err(event) = self.poll_write(cx) {
                return Poll::Ready(event);
            }
            // What had to wait for room has been read already: nobody would wake us for it.
            let mut moved = full && !self.has_full_output();
            match self.poll_read(cx) {
                Ok(read) => moved |= read,
                Err(event) => return Poll::Ready(event),
            }
            if !moved {
                self.rest();
                if self.goes_over() {
                    return Poll::Ready(Event::HandOver);
                }
                return Poll::Pending;
            }
        }
    }

    /// Nothing is left to do: an idle session holds no large buffers.
    fn rest(&mut self) {
        if self.tracker.is_between() {
            self.client.release();
            if let Some(server) = &mut self.server {
                server.link.release();
            }
        }
    }

    /// Something that was read waits for room in an output.
    fn has_full_output(&self) -> bool {
        let server = self.server.as_ref().map_or(0, |s| s.link.output.len());
        self.client.output.len().max(server) >= HIGH_WATER
    }

    /// The results are here and the commit is under way: the client gets them with the outcome, as
    /// it would without us, and is woken once.
    fn withholds(&self) -> bool {
        self.client.output.len() < WITHHELD && self.tracker.awaits_commit()
    }

    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<(), Event> {
        let writes = !self.client.output.is_empty() && !self.withholds();
        if writes {
            self.tracker.shows();
        }
        if writes && let Poll::Ready(Err(_)) = self.client.poll_write(cx) {
            return Err(Event::End(End::ClientLeft));
        }
        if let Some(server) = &mut self.server
            && !server.link.output.is_empty()
            && let Poll::Ready(Err(_)) = server.link.poll_write(cx)
        {
            // What the server sent before it went away still counts.
            while let Poll::Ready(Ok(())) = server.link.poll_read(cx) {
                if server.link.ended {
                    break;
                }
            }
            server.link.ended = true;
            server.link.output.clear();
        }
        Ok(())
    }

    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Result<bool, Event> {
        let mut moved = false;
        if self.client.output.len() < HIGH_WATER
            && let Some(server) = &mut self.server
        {
            if server.link.ended {
                return Err(Event::ServerLost);
            }
            match server.link.poll_read(cx) {
                Poll::Ready(Ok(())) => moved = true,
                Poll::Ready(Err(_)) => {
                    server.link.ended = true;
                    moved = true;
                }
                Poll::Pending => {}
            }
        }
        let backlog = self.server.as_ref().map_or(0, |s| s.link.output.len());
        if !self.client.ended && backlog < HIGH_WATER && self.client.input.len() < self.read_limit()
        {
            match self.client.poll_read(cx) {
                Poll::Ready(Ok(())) => moved = true,
                Poll::Ready(Err(_)) => return Err(Event::End(End::ClientLeft)),
                Poll::Pending => {}
            }
        }
        Ok(moved)
    }

    /// Bytes of input to hold: a corked client is read up to one buffer, to notice that it leaves.
    pub(super) fn read_limit(&self) -> usize {
        match helios_wire::peek_header(&self.client.input) {
            Ok(Some(header)) if self.server.is_some() => {
                header.len.clamp(READ, super::pump::MAX_WHOLE)
            }
            _ => READ,
        }
    }
}
