//! What the tracker tells the engine to do with a frame: the words between the two, and no more.

use crate::TxnStatus;
use crate::evidence::Mark;
use crate::expect::Expect;
use crate::journal::SyncOwed;
use crate::script::{Script, Speaks};

/// A question that the proxy asks the server on its own behalf, in the flight of a client's
/// message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// By FunctionCall: `pg_current_xact_id_if_assigned()`, then `pg_current_wal_insert_lsn()`.
    /// Only between exchanges; disturbs neither the unnamed statement nor portals.
    ByFunctionCall,
    /// The transaction id by Parse, Bind, Execute, Close, Flush: inside an extended exchange.
    Inline,
}

/// What goes in front of a client's frame, in the same flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lead {
    /// The mark.
    pub mark: Mark,
    /// How the frame is sent.
    pub form: Form,
    /// The mark's statement has to be prepared first.
    pub prepare: bool,
    /// The mark is set by its Bind, as the value of a domain, and nothing is executed
    /// (`super::calls`).
    pub bound: bool,
    /// What the mark speaks for.
    pub speaks: Speaks,
    /// The frame holds several statements.
    pub script: Option<Script>,
    /// The key of the plain statement that the frame runs ([`crate::plain`]).
    pub plain: Option<crate::plain::Key>,
}

/// How a client's frame is sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Form {
    /// As it is.
    #[default]
    AsIs,
    /// A simple query in its extended form, as a rule with a Flush in front of the Sync: the server
    /// answers a simple query only after the commit.
    Extended,
    /// The same for COPY … FROM STDIN: Flush and Sync follow the end of the data.
    ExtendedCopy,
    /// As `Extended`, of a statement without rows whose answer can be counted: it is not described,
    /// and nothing is flushed in front of the Sync.
    ExtendedCounted,
    /// As `Extended`, but Flush and Sync follow the reply: it is looked at before the commit.
    ExtendedHeld,
}

impl Form {
    /// What the Sync behind a frame in this form waits for.
    #[must_use]
    pub fn sync_owed(self) -> SyncOwed {
        match self {
            Self::AsIs | Self::Extended | Self::ExtendedCounted => SyncOwed::No,
            Self::ExtendedCopy => SyncOwed::BehindData,
            Self::ExtendedHeld => SyncOwed::BehindReply,
        }
    }
}

/// How the answer to a simple query behind a mark is learned before it is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learns {
    /// It is flushed in front of the commit.
    ByFlush,
    /// It is compared with what the client has, in front of the commit.
    Compared,
    /// The log can tell it ([`crate::plain`]).
    Counted,
}

/// Whether a client's frame may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// Now.
    Go,
    /// Now, behind this mark, as [`super::Tracker::leads`] has it.
    Lead(Lead),
    /// Now, behind a Flush: the results are to be known before the commit begins, unless the log
    /// can tell them ([`super::Tracker::plain_key`]).
    Flush,
    /// Now, behind the question for the prepared transaction that it ends
    /// ([`super::Tracker::take_gid`]).
    AskGid,
    /// After this question has been sent and answered.
    Ask(Ask),
    /// After the backend was given the domain that its mark needs, outside of any exchange; then
    /// [`super::Tracker::domain_made`].
    MakeDomain,
    /// After the questions under way have been answered.
    Wait,
}

/// What the engine does with a client's frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClientStep {
    /// Ask this behind it.
    pub ask_after: Option<Ask>,
    /// The frame ends an exchange.
    pub closed: bool,
    /// Send Flush and Sync behind it.
    pub sync_after: bool,
}

/// What the engine does with a server's frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerStep {
    /// Forward.
    Forward,
    /// Forward, and send the Sync that the server waits for.
    ForwardThenSync,
    /// An answer to the proxy; keep it from the client.
    Own(Expect),
    /// ReadyForQuery of the proxy's own exchange; keep it from the client.
    OwnReady,
    /// ReadyForQuery that ends the client's exchange: forward it, the session stands between
    /// exchanges or goes on with the next one in flight.
    Completed {
        /// Status that the server reports.
        status: TxnStatus,
        /// The session's state may have changed and has to be asked for before the client goes on.
        touched: bool,
        /// What ran outside a transaction block.
        alone: Alone,
    },
    /// An error outside any exchange: the server ends the connection.
    Unsolicited,
    /// The server refused a mark, and skips what came behind it: nothing of the exchange in front
    /// was done. No more marks are set.
    MarkRefused,
}

/// What an exchange ran outside a transaction block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alone {
    /// Nothing.
    Nothing,
    /// What a crash leaves evidence of, or can be run again.
    Provable,
    /// What may have taken effect, and a crash would leave nobody who knows.
    InDoubt,
}
