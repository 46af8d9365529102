//! One process of a proxy takes over from another: its listening sockets, then its sessions.
//!
//! The old process serves until the new one is ready; then the new one takes clients, and sessions
//! go over one by one, each with both its sockets, where it stands outside a transaction
//! (`engine::handover`). Pure messages here, and their way (`channel`); the old process's part is
//! `handle::giving`, the new one's `handle::taking`.
//!
//! The invariant: a session is the old process's until the new one's `ToOld::Have` is in the
//! kernel's buffer as a whole, and the new one's from then on. The new one reads nothing of it
//! before, the old one nothing while it does not know; it learns it from the message, or from the
//! end of the connection without one. A wait that is too long it ends by refusing to receive more,
//! which the kernel does not let overlap with a message that is being sent (`unix_stream_sendmsg`
//! and `unix_shutdown` in Linux's `net/unix/af_unix.c`, both under the socket's lock).

use std::path::PathBuf;

use helios_api::control::Topology;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::engine::handover::Card;
use crate::stream::Kind;

pub mod channel;

/// Version of this protocol. Processes of different versions do not take over from each other:
/// what a session is differs.
pub const VERSION: u32 = 1;

/// Messages that wait to be looked at.
const WAITING: usize = 4;

/// Where a proxy is configured to listen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listen {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) unix_socket_dir: Option<PathBuf>,
}

/// From the new process to the old one.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToOld {
    /// The first message.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// As the new one is configured: the sockets would be the same.
        listen: Listen,
    },
    /// It could serve now.
    Ready,
    /// It has the session, from now on.
    Have {
        /// Its number.
        session: u64,
    },
    /// It cannot have the session.
    Refuse {
        /// Its number.
        session: u64,
        /// Why.
        why: String,
    },
    /// A cancel request for a session of the old process's; its connection is a descriptor.
    Cancel {
        /// Process id and secret that the client was told.
        key: (i32, Vec<u8>),
        /// What the connection runs over.
        kind: Kind,
    },
}

/// From the old process to the new one.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToNew {
    /// Where the proxy stands; its listening sockets are descriptors: TCP, then Unix, then the one
    /// for metrics.
    Welcome(Box<Welcome>),
    /// The new one takes clients from now on.
    Go,
    /// A session; its client's and its backend's sockets are descriptors.
    Session(Box<Card>),
    /// All that could go has gone.
    Bye {
        /// Clients that the old process still has; it ends them.
        left: usize,
    },
    /// The take-over has failed: the old process goes on with whatever was not acknowledged.
    Abort {
        /// Why.
        why: String,
    },
}

/// Where a proxy stands.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Welcome {
    pub(crate) topology: Topology,
    /// The port that clients use.
    pub(crate) port: u16,
    /// The last number of a session.
    pub(crate) last: u64,
    /// Descriptors of TCP sockets.
    pub(crate) tcp: usize,
    /// Path of the Unix socket.
    pub(crate) unix: Option<PathBuf>,
    /// The last descriptor is the one for metrics.
    pub(crate) metrics: bool,
}

/// What arrives, from now on: read in a task of its own, so that none is lost half-way. Ends with
/// the connection.
pub(crate) fn arriving<T>(mut from: channel::Receiver) -> mpsc::Receiver<Message<T>>
where
    T: serde::de::DeserializeOwned + Send + 'static,
{
    let (to, messages) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        loop {
            match from.receive().await {
                Ok(Some((message, sockets))) => {
                    if to.send(Message { message, sockets }).await.is_err() {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => return tracing::warn!(%error, "connection of a take-over broke"),
            }
        }
    });
    messages
}

/// A message with its descriptors.
#[derive(Debug)]
pub(crate) struct Message<T> {
    pub(crate) message: T,
    pub(crate) sockets: Vec<std::os::fd::OwnedFd>,
}

/// Whether the other process is the same user's: a session's sockets and keys are nobody else's.
pub(crate) fn is_own(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own)
}
