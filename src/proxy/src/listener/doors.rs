//! Whether clients are let in here, while another process listens on the same sockets.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

/// Copies of the sockets that a proxy listens on.
#[derive(Debug)]
pub struct Sockets {
    /// TCP.
    pub tcp: Vec<OwnedFd>,
    /// The Unix socket with its path.
    pub unix: Option<(OwnedFd, PathBuf)>,
}

/// Opens and closes a listener, whose sockets stay as they are.
#[derive(Debug)]
pub struct Doors {
    open: watch::Sender<bool>,
    left: AtomicBool,
}

impl Doors {
    pub(super) fn new(open: bool) -> Self {
        Self {
            open: watch::Sender::new(open),
            left: AtomicBool::new(false),
        }
    }

    /// Takes clients, or leaves them to whoever else listens.
    pub fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }

    /// The Unix socket's path is another process's, from now on, or is not any more.
    pub fn leave(&self, left: bool) {
        self.left.store(left, Ordering::SeqCst);
    }

    pub(super) fn are_left(&self) -> bool {
        self.left.load(Ordering::SeqCst)
    }

    pub(super) fn watch(&self) -> watch::Receiver<bool> {
        self.open.subscribe()
    }
}
