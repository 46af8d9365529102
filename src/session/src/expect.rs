//! The expected-reply queue: what the server still owes, in order.
//!
//! Follows <https://www.postgresql.org/docs/current/protocol-flow.html> and `PostgresMain` in
//! `src/backend/tcop/postgres.c`. Every backend message is explained by the queue's head; one that
//! nothing explains is a [`Violation`].

use std::collections::VecDeque;

use helios_wire::{backend, frontend};

/// A message that the protocol does not allow where it came.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unexpected message '{}' from the {side}", char::from(*.tag))]
pub struct Violation {
    /// The message's type byte.
    pub tag: u8,
    /// Who sent it: `server` or `client`.
    pub side: &'static str,
}

/// Most messages that may wait for a reply on one session; a client that sends more is not read.
pub const MAX_EXPECTED: usize = 64 * 1024;

/// What a message that was sent waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Simple query: anything, to ReadyForQuery.
    Query,
    /// ParseComplete.
    Parse,
    /// BindComplete.
    Bind,
    /// ParameterDescription, then RowDescription or NoData.
    DescribeStatement,
    /// RowDescription or NoData.
    DescribePortal,
    /// Rows or copy data, to CommandComplete, EmptyQueryResponse or PortalSuspended.
    Execute,
    /// CloseComplete.
    Close,
    /// The client's CopyDone or CopyFail: no reply of its own.
    CopyEnd,
    /// ReadyForQuery.
    Sync,
    /// FunctionCallResponse, then ReadyForQuery.
    FunctionCall,
}

impl Expect {
    /// Whether the request is about a statement's name that the tracker follows.
    #[must_use]
    pub fn is_named(self) -> bool {
        matches!(self, Self::Parse | Self::DescribeStatement | Self::Close)
    }
}

/// Whose request it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The client's: replies are forwarded.
    Client,
    /// The proxy's own: replies are kept from the client.
    Proxy,
    /// The proxy's question for a prepared transaction that the client is about to end.
    Gid,
    /// The mark that the proxy puts in front of an autocommit statement: kept from the client.
    Mark,
    /// A client's simple query in the extended form that the proxy gave it: what the simple form
    /// does not have is kept from the client.
    Converted,
}

/// What a backend message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Explained {
    /// Notice, notification or parameter status: may come at any time.
    Asynchronous,
    /// An error that no request explains: the server ends the connection.
    Unsolicited,
    /// Part of the reply to the request at the head.
    Reply {
        /// Whose reply it is.
        owner: Owner,
        /// The request that it answers.
        to: Expect,
        /// The message ends what the request waits for.
        last: bool,
    },
    /// ReadyForQuery: the end of a request cycle.
    Ready {
        /// Whose it is.
        owner: Owner,
    },
}

/// The queue.
#[derive(Debug, Default)]
pub struct ExpectQueue {
    queue: VecDeque<(Expect, Owner)>,
    /// The server discards everything up to the next Sync (after an error in an extended query).
    skipping: bool,
    /// The server reads copy data for the request in front, and its end has not been sent.
    copying: bool,
    /// ReadyForQuery messages that will not come, because the server read their Sync in copy mode.
    dropped_syncs: u32,
    /// Client requests of kinds Parse, DescribeStatement and Close that an error took off.
    dropped_named: u32,
    /// Questions of the proxy's own inside an extended exchange that an error took off.
    dropped_own: u32,
}

impl ExpectQueue {
    /// Whether nothing is owed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether the head, the request that the server is at, is the proxy's own.
    #[must_use]
    pub fn head_is_own(&self) -> bool {
        matches!(
            self.queue.front(),
            Some((_, Owner::Proxy | Owner::Mark | Owner::Gid))
        )
    }

    /// Everything before the Sync in front has been answered.
    #[must_use]
    pub fn only_sync_is_owed(&self) -> bool {
        matches!(self.queue.front(), Some((Expect::Sync, Owner::Client)))
    }

    /// Number of requests that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether the server is discarding messages up to a Sync that has not been sent yet.
    #[must_use]
    pub fn awaits_sync(&self) -> bool {
        self.skipping
    }

    /// Whether a Sync that is sent now is ignored, as PostgreSQL does in copy mode.
    #[must_use]
    pub fn ignores_sync(&self) -> bool {
        self.copying
    }

    /// Takes everything off up to the end of so many of the client's request cycles: they are over,
    /// and their server is gone.
    pub fn drop_cycles(&mut self, cycles: u32) {
        let mut left = cycles;
        while left > 0
            && let Some((expect, owner)) = self.queue.pop_front()
        {
            let ends = matches!(expect, Expect::Query | Expect::Sync | Expect::FunctionCall);
            left -= u32::from(ends && owner == Owner::Client);
        }
    }

    /// Takes the Syncs off that the server swallowed in copy mode since the last call.
    pub fn take_dropped_syncs(&mut self) -> u32 {
        std::mem::take(&mut self.dropped_syncs)
    }

    /// The number of client requests about named objects (Parse, Describe, Close) that an error
    /// took off since the last call.
    pub fn take_dropped_named(&mut self) -> u32 {
        std::mem::take(&mut self.dropped_named)
    }

    /// The number of questions of the proxy's own that an error took off since the last call.
    pub fn take_dropped_own(&mut self) -> u32 {
        std::mem::take(&mut self.dropped_own)
    }

    /// Notes a request that is being sent; `false` when the server will skip it.
    pub fn push(&mut self, expect: Expect, owner: Owner) -> bool {
        if self.skipping && expect != Expect::Sync {
            return false;
        }
        self.skipping = false;
        self.copying &= expect != Expect::CopyEnd;
        // The copy may have failed already: the server then ignores its end.
        if expect != Expect::CopyEnd || !self.queue.is_empty() {
            self.queue.push_back((expect, owner));
        }
        true
    }

    /// The end of a copy is answered with the copy itself.
    fn drop_copy_ends(&mut self) {
        while matches!(self.queue.front(), Some((Expect::CopyEnd, _))) {
            self.queue.pop_front();
        }
    }

    /// The request that a client message makes, `None` for those without a reply.
    ///
    /// # Errors
    /// For a type byte that no client may send here.
    pub fn of_client(tag: u8, kind: u8) -> Result<Option<Expect>, Violation> {
        Ok(Some(match tag {
            frontend::QUERY => Expect::Query,
            frontend::PARSE => Expect::Parse,
            frontend::BIND => Expect::Bind,
            frontend::DESCRIBE if kind == b'S' => Expect::DescribeStatement,
            frontend::DESCRIBE => Expect::DescribePortal,
            frontend::EXECUTE => Expect::Execute,
            frontend::CLOSE => Expect::Close,
            frontend::SYNC => Expect::Sync,
            frontend::FUNCTION_CALL => Expect::FunctionCall,
            frontend::COPY_DONE | frontend::COPY_FAIL => Expect::CopyEnd,
            frontend::COPY_DATA | frontend::FLUSH | frontend::TERMINATE => return Ok(None),
            _ => {
                return Err(Violation {
                    tag,
                    side: "client",
                });
            }
        }))
    }

    /// Explains a backend message and moves the queue on.
    ///
    /// # Errors
    /// [`Violation`] when nothing explains it.
    pub fn explain(&mut self, tag: u8) -> Result<Explained, Violation> {
        if matches!(
            tag,
            backend::NOTICE_RESPONSE | backend::NOTIFICATION_RESPONSE | backend::PARAMETER_STATUS
        ) {
            return Ok(Explained::Asynchronous);
        }
        self.drop_copy_ends();
        let Some((head, owner)) = self.queue.front().copied() else {
            return if tag == backend::ERROR_RESPONSE {
                Ok(Explained::Unsolicited)
            } else {
                Err(Violation {
                    tag,
                    side: "server",
                })
            };
        };
        if tag == backend::ERROR_RESPONSE {
            self.fail(head);
            return Ok(Explained::Reply {
                owner,
                to: head,
                last: false,
            });
        }
        self.answer(head, owner, tag).ok_or(Violation {
            tag,
            side: "server",
        })
    }

    fn answer(&mut self, head: Expect, owner: Owner, tag: u8) -> Option<Explained> {
        use backend as b;
        let reply = |last| {
            Some(Explained::Reply {
                owner,
                to: head,
                last,
            })
        };
        let step = match (head, tag) {
            (Expect::Query | Expect::Sync | Expect::FunctionCall, b::READY_FOR_QUERY) => {
                self.queue.pop_front();
                self.drop_copy_ends();
                return Some(Explained::Ready { owner });
            }
            (
                Expect::Query,
                b::ROW_DESCRIPTION
                | b::DATA_ROW
                | b::COMMAND_COMPLETE
                | b::EMPTY_QUERY_RESPONSE
                | b::COPY_IN_RESPONSE
                | b::COPY_OUT_RESPONSE
                | b::COPY_DATA
                | b::COPY_DONE,
            )
            | (Expect::FunctionCall, b::FUNCTION_CALL_RESPONSE)
            | (Expect::DescribeStatement, b::PARAMETER_DESCRIPTION)
            | (Expect::Execute, b::DATA_ROW | b::COPY_OUT_RESPONSE | b::COPY_DATA | b::COPY_DONE) =>
            {
                return reply(false);
            }
            (Expect::Execute, b::COPY_IN_RESPONSE) => {
                self.copy_in();
                return reply(false);
            }
            (Expect::Parse, b::PARSE_COMPLETE)
            | (Expect::Bind, b::BIND_COMPLETE)
            | (
                Expect::DescribeStatement | Expect::DescribePortal,
                b::ROW_DESCRIPTION | b::NO_DATA,
            )
            | (
                Expect::Execute,
                b::COMMAND_COMPLETE | b::EMPTY_QUERY_RESPONSE | b::PORTAL_SUSPENDED,
            )
            | (Expect::Close, b::CLOSE_COMPLETE) => reply(true),
            _ => None,
        };
        if step.is_some() {
            self.queue.pop_front();
            self.copying = false;
        }
        step
    }

    /// In copy mode the server ignores Flush and Sync until CopyDone or CopyFail.
    fn copy_in(&mut self) {
        let end = self
            .queue
            .iter()
            .position(|(e, _)| *e == Expect::CopyEnd)
            .unwrap_or(self.queue.len());
        self.copying = end == self.queue.len();
        let mut at = 1;
        for _ in 1..end {
            if self.queue.get(at).is_some_and(|(e, _)| *e == Expect::Sync) {
                self.queue.remove(at);
                self.dropped_syncs += 1;
            } else {
                at += 1;
            }
        }
    }

    fn fail(&mut self, head: Expect) {
        self.copying = false;
        if matches!(head, Expect::Query | Expect::Sync | Expect::FunctionCall) {
            return;
        }
        while let Some((expect, owner)) = self.queue.front().copied() {
            if expect == Expect::Sync {
                break;
            }
            if owner == Owner::Client && expect.is_named() {
                self.dropped_named += 1;
            }
            if owner == Owner::Proxy && expect == Expect::Close {
                self.dropped_own += 1;
            }
            self.queue.pop_front();
        }
        self.skipping = self.queue.is_empty();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(requests: &[Expect], replies: &[u8]) -> Result<usize, Violation> {
        let mut queue = ExpectQueue::default();
        for request in requests {
            queue.push(*request, Owner::Client);
        }
        for reply in replies {
            queue.explain(*reply)?;
        }
        Ok(queue.len())
    }

    #[test]
    fn a_sync_behind_the_beginning_of_a_copy_is_ignored() {
        use Expect::{Bind, CopyEnd, Execute, Sync};
        let mut queue = ExpectQueue::default();
        for request in [Bind, Execute] {
            queue.push(request, Owner::Client);
        }
        assert!(!queue.ignores_sync());
        queue.explain(b'2').unwrap();
        queue.explain(b'G').unwrap();
        assert!(queue.ignores_sync());
        queue.push(CopyEnd, Owner::Client);
        assert!(!queue.ignores_sync());
        queue.push(Sync, Owner::Client);
        queue.explain(b'C').unwrap();
        queue.explain(b'Z').unwrap();
        assert!(queue.is_empty());
        for request in [Bind, Execute] {
            queue.push(request, Owner::Client);
        }
        for reply in b"2GE" {
            queue.explain(*reply).unwrap();
        }
        assert!(
            !queue.ignores_sync(),
            "it failed: the server waits for Sync"
        );
    }

    #[test]
    fn cycles_that_are_over_are_owed_nothing() {
        use Expect::{Bind, Execute, FunctionCall, Sync};
        let mut queue = ExpectQueue::default();
        for _ in 0..2 {
            queue.push(Bind, Owner::Mark);
            queue.push(Execute, Owner::Converted);
            queue.push(Sync, Owner::Client);
            queue.push(FunctionCall, Owner::Proxy);
        }
        queue.drop_cycles(1);
        assert!(queue.head_is_own() && queue.len() == 5);
        queue.drop_cycles(1);
        assert_eq!(queue.len(), 1);
        queue.drop_cycles(1);
        assert!(queue.is_empty());
    }

    #[test]
    fn recorded_sequences() {
        use Expect::{
            Bind, Close, CopyEnd, DescribePortal, DescribeStatement, Execute, FunctionCall, Parse,
            Query, Sync,
        };
        let cases: &[(&[Expect], &[u8])] = &[
            (&[Query], b"TDDCZ"),
            (&[Query], b"CTDCEZ"),
            (&[Query], b"IZ"),
            (&[Query], b"NGSCZ"),
            (&[Query], b"HdddcCZ"),
            (&[Parse, Bind, DescribePortal, Execute, Sync], b"12TDDCZ"),
            (&[Parse, DescribeStatement, Sync], b"1tnZ"),
            (&[Bind, Execute, Sync], b"2DsZ"),
            (&[Bind, Execute, Execute, Close, Sync], b"2DsDC3Z"),
            (
                &[Parse, Bind, Execute, Sync, Bind, Execute, Sync],
                b"1EZ2CZ",
            ),
            (&[Parse, Bind, Execute, Sync], b"12DCEZ"),
            (&[Query, CopyEnd], b"GCZ"),
            (&[Query, CopyEnd, CopyEnd], b"GCGCZ"),
            (&[Query, CopyEnd, Query], b"GEZCZ"),
            (&[Bind, Execute, Sync, CopyEnd, Sync], b"2GCZ"),
            (&[Bind, Execute, CopyEnd, Sync], b"2GCZ"),
            (&[Bind, Execute, CopyEnd, Sync], b"2GEZ"),
            (&[FunctionCall], b"VZ"),
            (&[FunctionCall], b"EZ"),
        ];
        for (requests, replies) in cases {
            let got = run(requests, replies);
            assert_eq!(
                got,
                Ok(0),
                "{requests:?} {:?}",
                String::from_utf8_lossy(replies)
            );
        }
    }

    #[test]
    fn the_end_of_a_copy_that_has_failed_is_owed_nothing() {
        let mut queue = ExpectQueue::default();
        queue.push(Expect::Query, Owner::Client);
        for tag in b"GEZ" {
            assert!(queue.explain(*tag).is_ok());
        }
        queue.push(Expect::CopyEnd, Owner::Client);
        assert!(queue.is_empty());
    }

    #[test]
    fn what_nothing_explains_is_a_violation() {
        for (requests, replies) in [
            (&[][..], &b"Z"[..]),
            (&[Expect::Query], b"1"),
            (&[Expect::Parse, Expect::Sync], b"2"),
            (&[Expect::Parse, Expect::Sync], b"Z"),
            (&[Expect::Execute, Expect::Sync], b"T"),
            (&[Expect::Sync], b"ZZ"),
        ] {
            assert!(run(requests, replies).is_err(), "{requests:?}");
        }
    }

    #[test]
    fn after_an_error_everything_to_the_next_sync_is_skipped() {
        let mut queue = ExpectQueue::default();
        queue.push(Expect::Parse, Owner::Client);
        assert!(queue.explain(b'E').is_ok());
        assert!(queue.awaits_sync());
        queue.push(Expect::Bind, Owner::Client);
        queue.push(Expect::Execute, Owner::Client);
        assert!(queue.is_empty());
        queue.push(Expect::Sync, Owner::Client);
        assert_eq!(
            queue.explain(b'Z'),
            Ok(Explained::Ready {
                owner: Owner::Client
            })
        );
    }

    #[test]
    fn an_error_nobody_asked_for_is_told_apart() {
        let mut queue = ExpectQueue::default();
        assert_eq!(queue.explain(b'E'), Ok(Explained::Unsolicited));
        assert_eq!(queue.explain(b'S'), Ok(Explained::Asynchronous));
    }
}
