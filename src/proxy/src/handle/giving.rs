//! The old process's part of a take-over: it gives its sockets and sessions away.
//!
//! The invariant: whatever the new process does or does not do, each session and the listening
//! sockets are served by one of the two; until the take-over is done, by this one when it fails.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ProxyHandle;
use crate::engine::gate::{Ending, Phase};
use crate::engine::handover::{Offer, Parcel, Verdict};
use crate::engine::registry::{CancelKey, lock};
use crate::listener::{Doors, Listener, Sockets};
use crate::options::ProxyOptions;
use crate::stream::Detached;
use crate::takeover::channel::{Sender, channel};
use crate::takeover::{Listen, Message, ToNew, ToOld, VERSION, Welcome, arriving, is_own};

/// How long the new process may take to say who it is.
const HELLO: Duration = Duration::from_secs(5);

/// How long it may take to start.
const START: Duration = Duration::from_secs(30);

/// How long it may take to say that it has a session, or that it has not.
const VERDICT: Duration = Duration::from_secs(5);

/// How long it may take to hang up when it is not heard any more.
const HANG_UP: Duration = Duration::from_secs(5);

/// Pause between two looks at what is left.
const LOOK: Duration = Duration::from_millis(20);

/// Where a proxy listens.
#[derive(Debug)]
pub(super) struct Place {
    listen: Listen,
    pub(super) doors: Arc<Doors>,
    /// Copies for another process, as long as clients are taken.
    sockets: Mutex<Option<Sockets>>,
}

impl Place {
    pub(super) fn of(options: &ProxyOptions, listener: &Listener) -> io::Result<Self> {
        Ok(Self {
            listen: Listen {
                host: options.host.clone(),
                port: options.port,
                unix_socket_dir: options.unix_socket_dir.clone(),
            },
            doors: listener.doors(),
            sockets: Mutex::new(Some(listener.sockets()?)),
        })
    }

    /// No more clients are taken.
    pub(super) fn close(&self) {
        *lock(&self.sockets) = None;
    }
}

/// What came of a take-over, for the old process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Given {
    /// The new process serves. This one has nothing left, or what it has is to be ended.
    Done {
        /// Sessions that the new one has.
        handed: u64,
        /// Clients that are still here: over TLS, in a transaction, or with state that cannot go.
        left: usize,
    },
    /// This process goes on as before, without the sessions that the new one had taken by then.
    Failed {
        /// Those.
        handed: u64,
        /// Why.
        why: String,
    },
}

/// What is said of a session that was sent.
struct Sent {
    session: u64,
    verdict: oneshot::Sender<Verdict>,
    until: Instant,
}

/// A take-over under way.
struct Giving<'a> {
    proxy: &'a ProxyHandle,
    to: Sender,
    messages: mpsc::Receiver<Message<ToOld>>,
    sent: Option<Sent>,
    handed: u64,
}

/// How the giving ends.
enum Over {
    /// Nothing is left, or time is up.
    Done,
    Failed(String),
}

impl ProxyHandle {
    /// Gives everything to the process at the other end of `stream`, which has connected to take
    /// over; `metrics` is a further listening socket for it. What is not free to go within `limit`,
    /// or until `stop`, stays and is to be ended. Never to be dropped half-way.
    pub async fn give(
        &self,
        stream: UnixStream,
        metrics: Option<OwnedFd>,
        limit: Duration,
        stop: CancellationToken,
    ) -> Given {
        let refused = |why: &str| Given::Failed {
            handed: 0,
            why: why.to_owned(),
        };
        if !is_own(&stream) {
            return refused("it is another user's process");
        }
        let (to, from) = channel(stream);
        let mut giving = Giving {
            proxy: self,
            to,
            messages: arriving(from),
            sent: None,
            handed: 0,
        };
        let Ok(_one) = self.0.moving.try_lock() else {
            let why = "a move of the primary, or another take-over, is under way";
            giving.abort(why).await;
            return refused(why);
        };
        if let Err(why) = giving.welcome(metrics).await {
            giving.abort(&why).await;
            return refused(&why);
        }
        giving.hand_over(Instant::now() + limit, stop).await
    }
}

impl Giving<'_> {
    /// Up to the moment in which the new process could serve; nothing has changed until then.
    async fn welcome(&mut self, metrics: Option<OwnedFd>) -> Result<(), String> {
        let inner = &self.proxy.0;
        match self.next(HELLO).await? {
            ToOld::Hello { version, .. } if version != VERSION => {
                return Err(format!("it speaks version {version}, not {VERSION}"));
            }
            ToOld::Hello { listen, .. } if listen != inner.place.listen => {
                return Err("it is configured to listen elsewhere".to_owned());
            }
            ToOld::Hello { .. } => {}
            _ => return Err("it does not say who it is".to_owned()),
        }
        let gate = inner.shared.gate.now();
        if gate.phase != Phase::Open || lock(&inner.waiting).is_some() {
            return Err("a move of the primary is under way".to_owned());
        }
        if inner.shared.gate.ending() != Ending::No || inner.closed.is_cancelled() {
            return Err("this proxy shuts down".to_owned());
        }
        let copies = copies_of(&lock(&inner.place.sockets)).map_err(|e| e.to_string())?;
        let (mut sockets, tcp, unix) = copies.ok_or("this proxy does not listen any more")?;
        let metrics_too = metrics.is_some();
        sockets.extend(metrics);
        let sockets: Vec<BorrowedFd<'_>> = sockets.iter().map(OwnedFd::as_fd).collect();
        let welcome = ToNew::Welcome(Box::new(Welcome {
            topology: (*gate.topology).clone(),
            port: inner.port,
            last: inner.shared.registry.last(),
            tcp,
            unix,
            metrics: metrics_too,
        }));
        let sent = self.to.send(&welcome, &sockets).await;
        sent.map_err(|e| format!("it could not be welcomed: {e}"))?;
        match self.next(START).await? {
            ToOld::Ready => Ok(()),
            _ => Err("it does not say that it is ready".to_owned()),
        }
    }

    async fn next(&mut self, limit: Duration) -> Result<ToOld, String> {
        match tokio::time::timeout(limit, self.messages.recv()).await {
            Ok(Some(Message { message, .. })) => Ok(message),
            Ok(None) => Err("it has gone".to_owned()),
            Err(_) => Err(format!("it said nothing for {limit:?}")),
        }
    }

    async fn abort(&mut self, why: &str) {
        let why = why.to_owned();
        // One that has gone needs not be told.
        let _ = self.to.send(&ToNew::Abort { why }, &[]).await;
    }

    /// From the moment in which the new process takes clients.
    async fn hand_over(mut self, until: Instant, stop: CancellationToken) -> Given {
        let inner = Arc::clone(&self.proxy.0);
        inner.place.doors.set_open(false);
        // The path of the socket is the new process's.
        inner.place.doors.leave(true);
        // A client that was let in at this very moment is counted by then.
        tokio::time::sleep(LOOK).await;
        let offers = inner.shared.kin.begin();
        inner.shared.gate.end(Ending::HandOver);
        let over = match self.to.send(&ToNew::Go, &[]).await {
            Ok(()) => self.give_all(offers, until, stop).await,
            Err(error) => {
                drop(offers);
                Over::Failed(format!("it could not be told to go on: {error}"))
            }
        };
        inner.shared.kin.end();
        let (handed, left) = (self.handed, inner.limits.open());
        match over {
            Over::Done => {
                if self.to.send(&ToNew::Bye { left }, &[]).await.is_err() {
                    tracing::warn!("the new process does not hear that this one is done");
                }
                Given::Done { handed, left }
            }
            Over::Failed(why) => {
                self.hear_out().await;
                if inner.shared.gate.ending() == Ending::HandOver {
                    inner.shared.gate.end(Ending::No);
                }
                inner.place.doors.leave(false);
                inner.place.doors.set_open(true);
                self.abort(&why).await;
                Given::Failed { handed, why }
            }
        }
    }

    /// Hands over whatever stands ready, one session after the other.
    async fn give_all(
        &mut self,
        mut offers: mpsc::Receiver<Offer>,
        until: Instant,
        stop: CancellationToken,
    ) -> Over {
        let limits = Arc::clone(&self.proxy.0.limits);
        loop {
            let between = self.sent.is_none();
            if between && limits.open() == 0 {
                return Over::Done;
            }
            if between && (Instant::now() >= until || stop.is_cancelled()) {
                return Over::Done;
            }
            let overdue = self.sent.as_ref().map_or(until, |sent| sent.until);
            tokio::select! {
                offer = offers.recv(), if between => {
                    if let Some(offer) = offer
                        && let Err(error) = self.send(offer).await
                    {
                        return Over::Failed(format!("it takes no session: {error}"));
                    }
                }
                message = self.messages.recv() => match message {
                    None => return Over::Failed("it has gone".to_owned()),
                    Some(message) => if let Err(why) = self.heard(message) {
                        return Over::Failed(why);
                    },
                },
                () = tokio::time::sleep_until(overdue), if !between => {
                    return Over::Failed(format!("it said nothing for {VERDICT:?}"));
                }
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// What is heard before the other end has hung up still counts; from now on the other end says
    /// no more, and is told so when it tries.
    async fn hear_out(&mut self) {
        if let Err(error) = self.to.refuse_more() {
            tracing::debug!(%error, "nothing to refuse");
        }
        let rest = async {
            while let Some(message) = self.messages.recv().await {
                if let Err(why) = self.heard(message) {
                    tracing::warn!(why, "the new process broke the protocol");
                }
            }
        };
        // What is in the buffer is there at once.
        if tokio::time::timeout(HANG_UP, rest).await.is_err() {
            tracing::error!("the connection to the new process does not end");
        }
        if let Some(sent) = self.sent.take() {
            let _ = sent.verdict.send(Verdict::Stays);
        }
    }

    async fn send(&mut self, offer: Offer) -> io::Result<()> {
        let Offer { parcel, verdict } = offer;
        let Parcel {
            card,
            client,
            server,
        } = parcel;
        self.sent = Some(Sent {
            session: card.session,
            verdict,
            until: Instant::now() + VERDICT,
        });
        let message = ToNew::Session(card);
        self.to
            .send(&message, &[client.as_fd(), server.as_fd()])
            .await
    }

    fn heard(&mut self, message: Message<ToOld>) -> Result<(), String> {
        let Message {
            message,
            mut sockets,
        } = message;
        let of = |session| move |sent: &mut Sent| sent.session == session;
        match message {
            ToOld::Have { session } => {
                let sent = self.sent.take_if(of(session));
                let sent = sent.ok_or("it has a session that it was not given")?;
                self.handed += 1;
                let _ = sent.verdict.send(Verdict::Taken);
            }
            ToOld::Refuse { session, why } => {
                let sent = self.sent.take_if(of(session));
                let sent = sent.ok_or("it refuses a session that it was not given")?;
                tracing::info!(session, why, "session stays with this process");
                let _ = sent.verdict.send(Verdict::Stays);
            }
            ToOld::Cancel { key, kind } => {
                let (pid, secret) = key;
                let socket = sockets
                    .pop()
                    .ok_or("a cancel request without its connection")?;
                let stream = Detached::received(kind, socket).and_then(Detached::attach);
                if let Ok(stream) = stream {
                    let registry = &self.proxy.0.shared.registry;
                    let _ = registry.cancel(&CancelKey { pid, secret }, stream);
                }
            }
            ToOld::Hello { .. } | ToOld::Ready => return Err("it begins anew".to_owned()),
        }
        Ok(())
    }
}

type Copies = (Vec<OwnedFd>, usize, Option<PathBuf>);

/// Copies of the sockets; how many are TCP, and the path of the Unix socket.
fn copies_of(sockets: &Option<Sockets>) -> io::Result<Option<Copies>> {
    let Some(Sockets { tcp, unix }) = sockets else {
        return Ok(None);
    };
    let fds = tcp.iter().chain(unix.iter().map(|(socket, _)| socket));
    let copies: io::Result<Vec<OwnedFd>> = fds.map(|s| s.try_clone()).collect();
    let path = unix.as_ref().map(|(_, path)| path.clone());
    Ok(Some((copies?, tcp.len(), path)))
}
