//! The new process's part of a take-over: it takes sockets and sessions of an older one.
//!
//! The invariant: nothing is read of a session before the older process cannot read it any more,
//! because the word that it is here has been sent.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Proxy, ProxyHandle, StartError};
use crate::engine::gate::Phase;
use crate::engine::handover::{Arrived, Cancels, Card, Parcel};
use crate::engine::registry::CancelKey;
use crate::engine::shared::Shared;
use crate::listener::{Admission, Listener, Sockets};
use crate::options::ProxyOptions;
use crate::stream::Stream;
use crate::takeover::channel::{Sender, channel};
use crate::takeover::{Listen, Message, ToNew, ToOld, VERSION, Welcome, arriving, is_own};
use crate::workers::Workers;

/// How long the old process may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// How long a session may take to settle on its thread.
const SETTLE: Duration = Duration::from_secs(2);

/// Clients that may have been on their way in when the old process said how many there were.
const ON_THE_WAY: u64 = 100_000;

/// Pause between two looks at what is left.
const LOOK: Duration = Duration::from_millis(100);

/// Why nothing was taken over. The old process serves as before.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// The old process refuses, in its words.
    #[error("the running proxy refuses to be replaced: {0}")]
    Refused(String),
    /// It does not answer, or with something else.
    #[error("the running proxy cannot be replaced: {0}")]
    NoAnswer(String),
    /// The proxy does not start with what it was given.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// A proxy that takes clients, and to which sessions are still coming.
#[derive(Debug)]
pub struct TakenOver {
    /// The proxy.
    pub handle: ProxyHandle,
    /// The old process's socket for metrics.
    pub metrics: Option<OwnedFd>,
    /// What came of it, once no more is coming.
    pub followed: JoinHandle<Followed>,
}

/// What came of a take-over, for the new process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Followed {
    /// The old process is done.
    Done {
        /// Sessions that are here.
        taken: u64,
        /// Clients that the old process still had, and ends.
        left: usize,
    },
    /// The old process has died. This one serves alone; what was not here yet is lost.
    Alone {
        /// Sessions that are here.
        taken: u64,
    },
    /// The old process goes on serving. This one takes no more clients, and has those that it had.
    Refused {
        /// Sessions that are here.
        taken: u64,
        /// Why, in the old process's words.
        why: String,
    },
}

/// A session on its way to its thread.
pub(super) struct Arrival {
    session: Arrived,
    ready: oneshot::Sender<()>,
    go: oneshot::Receiver<()>,
}

/// Sessions on their way to their threads.
pub(super) type Arrivals = mpsc::Receiver<Arrival>;

/// Settles sessions that arrive, until no more do, or no more are wanted.
pub(super) async fn settle(
    shared: &Arc<Shared>,
    workers: &Arc<Workers>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
    arrivals: Option<Arrivals>,
) {
    let Some(mut arrivals) = arrivals else {
        return;
    };
    let settling = async {
        while let Some(Arrival { session, ready, go }) = arrivals.recv().await {
            let (shared, keep) = (Arc::clone(shared), Arc::clone(workers));
            workers.spawn(tasks, async move {
                Box::pin(session.serve(shared, ready, go)).await;
                drop(keep);
            });
        }
    };
    tokio::select! {
        () = settling => {}
        () = stop.cancelled() => {}
    }
}

impl Proxy {
    /// Takes over from the process at the other end of `stream`. When this returns, clients are
    /// taken here; sessions are still coming.
    ///
    /// # Errors
    /// The old process refuses, does not answer, or this one does not start; the old one serves as
    /// before.
    pub async fn take_over(
        stream: UnixStream,
        options: ProxyOptions,
    ) -> Result<TakenOver, TakeOverError> {
        let broken = |e: std::io::Error| TakeOverError::NoAnswer(e.to_string());
        if !is_own(&stream) {
            let why = "it is another user's process".to_owned();
            return Err(TakeOverError::NoAnswer(why));
        }
        let (mut to, from) = channel(stream);
        let mut messages = arriving::<ToNew>(from);
        let listen = Listen {
            host: options.host.clone(),
            port: options.port,
            unix_socket_dir: options.unix_socket_dir.clone(),
        };
        let version = VERSION;
        let hello = ToOld::Hello { version, listen };
        to.send(&hello, &[]).await.map_err(broken)?;
        let (welcome, sockets) = welcomed(&mut messages).await?;
        let Welcome {
            topology,
            port,
            last,
            tcp,
            unix,
            metrics,
        } = *welcome;
        let (sockets, metrics) = sorted(sockets, tcp, unix, metrics)?;
        let listener = Listener::received(sockets, port).map_err(broken)?;
        let (settling, arrivals) = mpsc::channel(1);
        let handle = Proxy::start_on(options, topology, Phase::Open, listener, Some(arrivals))?;
        handle.0.shared.registry.begin_behind(last + ON_THE_WAY);
        // From here on: before anybody is let in who may want to cancel what is there still.
        let cancels = handle.0.shared.kin.follow();
        if let Err(error) = begin(&mut to, &mut messages).await {
            handle.shutdown(Duration::ZERO).await;
            return Err(error);
        }
        handle.0.place.doors.leave(false);
        handle.0.place.doors.set_open(true);
        let taking = Taking {
            proxy: handle.clone(),
            to,
            messages,
            cancels,
            settling,
            taken: 0,
        };
        Ok(TakenOver {
            handle,
            metrics,
            followed: tokio::spawn(taking.follow()),
        })
    }
}

impl ProxyHandle {
    /// Waits until no client is left.
    pub async fn emptied(&self) {
        while self.0.limits.open() > 0 {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Says that this process could serve, and is told to.
async fn begin(
    to: &mut Sender,
    messages: &mut mpsc::Receiver<Message<ToNew>>,
) -> Result<(), TakeOverError> {
    let sent = to.send(&ToOld::Ready, &[]).await;
    sent.map_err(|e| TakeOverError::NoAnswer(e.to_string()))?;
    match next(messages).await? {
        (ToNew::Go, _) => Ok(()),
        _ => Err(TakeOverError::NoAnswer("it does not let go".to_owned())),
    }
}

async fn next(
    messages: &mut mpsc::Receiver<Message<ToNew>>,
) -> Result<(ToNew, Vec<OwnedFd>), TakeOverError> {
    match tokio::time::timeout(ANSWER, messages.recv()).await {
        Ok(Some(Message {
            message: ToNew::Abort { why },
            ..
        })) => Err(TakeOverError::Refused(why)),
        Ok(Some(Message { message, sockets })) => Ok((message, sockets)),
        Ok(None) => Err(TakeOverError::NoAnswer("it hung up".to_owned())),
        Err(_) => Err(TakeOverError::NoAnswer(format!("no answer in {ANSWER:?}"))),
    }
}

async fn welcomed(
    messages: &mut mpsc::Receiver<Message<ToNew>>,
) -> Result<(Box<Welcome>, Vec<OwnedFd>), TakeOverError> {
    match next(messages).await? {
        (ToNew::Welcome(welcome), sockets) => Ok((welcome, sockets)),
        _ => Err(TakeOverError::NoAnswer("it does not answer".to_owned())),
    }
}

/// Listening sockets, and the one for metrics.
fn sorted(
    mut sockets: Vec<OwnedFd>,
    tcp: usize,
    unix: Option<std::path::PathBuf>,
    metrics: bool,
) -> Result<(Sockets, Option<OwnedFd>), TakeOverError> {
    if sockets.len() != tcp + usize::from(unix.is_some()) + usize::from(metrics) {
        let why = "sockets are missing".to_owned();
        return Err(TakeOverError::NoAnswer(why));
    }
    let metrics = if metrics { sockets.pop() } else { None };
    let unix = unix.and_then(|path| Some((sockets.pop()?, path)));
    let tcp = sockets;
    Ok((Sockets { tcp, unix }, metrics))
}

/// Sessions are coming.
struct Taking {
    proxy: ProxyHandle,
    to: Sender,
    messages: mpsc::Receiver<Message<ToNew>>,
    cancels: Cancels,
    settling: mpsc::Sender<Arrival>,
    taken: u64,
}

impl Taking {
    /// Takes what comes until nothing more does. No move of the primary begins meanwhile.
    async fn follow(mut self) -> Followed {
        let proxy = self.proxy.clone();
        let _one = proxy.0.moving.lock().await;
        let followed = self.take_all().await;
        proxy.0.shared.kin.forget();
        if matches!(followed, Followed::Refused { .. }) {
            proxy.0.place.doors.set_open(false);
            proxy.0.place.doors.leave(true);
            proxy.0.place.close();
        }
        followed
    }

    async fn take_all(&mut self) -> Followed {
        loop {
            let message = tokio::select! {
                message = self.messages.recv() => message,
                Some((key, stream)) = self.cancels.recv() => {
                    if self.pass_on(key, stream).await.is_err() {
                        return self.last_word().await;
                    }
                    continue;
                }
            };
            let taken = self.taken;
            let (card, sockets) = match message {
                None => return Followed::Alone { taken },
                Some(Message { message, sockets }) => match message {
                    ToNew::Session(card) => (card, sockets),
                    ToNew::Bye { left } => return Followed::Done { taken, left },
                    ToNew::Abort { why } => return Followed::Refused { taken, why },
                    ToNew::Welcome(_) | ToNew::Go => continue,
                },
            };
            let session = card.session;
            let answered = match self.settled(card, sockets).await {
                Ok(go) => match self.to.send(&ToOld::Have { session }, &[]).await {
                    Ok(()) => {
                        self.taken += 1;
                        // Its thread waits for nothing else.
                        let _ = go.send(());
                        Ok(())
                    }
                    // The session is still the old process's: nothing was read of it here.
                    Err(error) => Err(error),
                },
                Err(why) => self.to.send(&ToOld::Refuse { session, why }, &[]).await,
            };
            if let Err(error) = answered {
                tracing::warn!(session, %error, "session stays with the old process");
                return self.last_word().await;
            }
        }
    }

    /// A session on its thread, that has not begun to read.
    async fn settled(
        &self,
        card: Box<Card>,
        sockets: Vec<OwnedFd>,
    ) -> Result<oneshot::Sender<()>, String> {
        let Ok([client, server]) = <[OwnedFd; 2]>::try_from(sockets) else {
            return Err("its sockets are missing".to_owned());
        };
        let limits = &self.proxy.0.limits;
        let Some(Admission::Granted(place)) = limits.admit() else {
            return Err("too many clients".to_owned());
        };
        let user_place = limits.user(&card.user).ok_or("too many of its role")?;
        let parcel = Parcel {
            card,
            client,
            server,
        };
        let session = Arrived::new(parcel, &self.proxy.0.shared, (place, user_place))?;
        let ((ready, is_ready), (go, told)) = (oneshot::channel(), oneshot::channel());
        let arrival = Arrival {
            session,
            ready,
            go: told,
        };
        let gone = |_| "this proxy shuts down".to_owned();
        self.settling.send(arrival).await.map_err(gone)?;
        match tokio::time::timeout(SETTLE, is_ready).await {
            Ok(Ok(())) => Ok(go),
            _ => Err("it cannot be settled".to_owned()),
        }
    }

    async fn pass_on(&mut self, key: CancelKey, stream: Stream) -> std::io::Result<()> {
        let CancelKey { pid, secret } = key;
        let Some((kind, socket)) = stream.plain() else {
            return Ok(());
        };
        let cancel = ToOld::Cancel {
            key: (pid, secret),
            kind,
        };
        self.to.send(&cancel, &[socket.as_fd()]).await
    }

    /// The old process hears nothing more: it has ended, or will say why.
    async fn last_word(&mut self) -> Followed {
        let taken = self.taken;
        loop {
            match tokio::time::timeout(ANSWER, self.messages.recv()).await {
                Ok(None) => return Followed::Alone { taken },
                Ok(Some(Message { message, .. })) => match message {
                    ToNew::Abort { why } => return Followed::Refused { taken, why },
                    ToNew::Bye { left } => return Followed::Done { taken, left },
                    ToNew::Welcome(_) | ToNew::Go | ToNew::Session(_) => {}
                },
                // As long as it may serve, two would.
                Err(_) => {
                    let why = "it does not answer".to_owned();
                    return Followed::Refused { taken, why };
                }
            }
        }
    }
}
