//! A proxy alone, in front of servers that somebody else looks after, and its replacement by another
//! process.
//!
//! It looks for the primary among the configured instances once, when it starts. A proxy alone
//! never moves sessions to another primary: it has no evidence of what a promotion left behind.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use helios_api::control::{Backend, Topology};
use helios_api::{Epoch, Timeline};
use helios_proxy::config::ProxyConfig;
use helios_proxy::{Followed, Given, Proxy, ProxyHandle, ProxyOptions, backend, control};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::Signal;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::cli::ProxyArgs;
use crate::failure::Failure;
use crate::out;

/// How long transactions may take to end when the proxy is told to stop.
const GRACE: Duration = Duration::from_secs(10);

/// Pause when no connection can be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// Runs it until it is told to stop, or another process has taken over. With `hang_up` (SIGHUP) it
/// looks at its certificate files again.
pub(super) async fn run(
    args: &ProxyArgs,
    config: &ProxyConfig,
    told_to_stop: impl Future<Output = ()>,
    mut hang_up: Signal,
) -> Result<(), Failure> {
    let Running {
        handle,
        metrics,
        followed,
    } = begin(args, config).await?;
    let metrics = metrics.map(|socket| Metrics::serve(&handle, socket));
    let metrics = metrics.transpose()?;
    let stop = CancellationToken::new();
    let limit = Duration::from_secs(args.hand_over_limit);
    let replaced = async {
        if let Some(followed) = followed {
            heard(&handle, followed.await).await?;
        }
        match &args.take_over {
            Some(socket) => give(&handle, socket, metrics.as_ref(), limit, &stop).await,
            None => std::future::pending().await,
        }
    };
    let looking = async {
        while hang_up.recv().await.is_some() {
            handle.look_at_certificates();
        }
        // No signal comes any more.
        std::future::pending::<()>().await;
    };
    let ended = tokio::select! {
        () = looking => Ok(()),
        ended = replaced => ended,
        () = told_to_stop => {
            out::note("stopping");
            Ok(())
        }
    };
    stop.cancel();
    handle.shutdown(GRACE).await;
    ended
}

/// A proxy that takes clients.
struct Running {
    handle: ProxyHandle,
    metrics: Option<TcpListener>,
    /// Sessions are still coming.
    followed: Option<JoinHandle<Followed>>,
}

async fn begin(args: &ProxyArgs, config: &ProxyConfig) -> Result<Running, Failure> {
    let options = ProxyOptions::from_config(config).map_err(|e| Failure::usage(e.to_string()))?;
    let running = match &args.take_over {
        Some(socket) => predecessor(socket).await?,
        None => None,
    };
    match running {
        Some(stream) => take_over(stream, options, config).await,
        None => start(options, config).await,
    }
}

async fn take_over(
    stream: UnixStream,
    options: ProxyOptions,
    config: &ProxyConfig,
) -> Result<Running, Failure> {
    let host = options.host.clone();
    let taken = Proxy::take_over(stream, options).await;
    let taken = taken.map_err(|e| Failure::failed(e.to_string()))?;
    let port = taken.handle.port();
    out::note(&format!("took over: listening on {host}:{port}"));
    let metrics = match (config.observability.metrics_enabled, taken.metrics) {
        (true, Some(socket)) => Some(socket.into()),
        (true, None) => Some(bind_metrics(config).await?),
        (false, _) => None,
    };
    Ok(Running {
        handle: taken.handle,
        metrics,
        followed: Some(taken.followed),
    })
}

async fn start(options: ProxyOptions, config: &ProxyConfig) -> Result<Running, Failure> {
    let host = options.host.clone();
    let primary = find_primary(config, &options).await?;
    out::note(&format!(
        "primary: {} at {}",
        primary.name, primary.endpoint
    ));
    let topology = Topology {
        epoch: Epoch(1),
        timeline: Timeline(1),
        primary,
        fences: Vec::new(),
    };
    let handle = Proxy::start(options, topology)
        .await
        .map_err(|e| Failure::failed(e.to_string()))?;
    out::note(&format!("listening on {host}:{}", handle.port()));
    let metrics = match config.observability.metrics_enabled {
        true => Some(bind_metrics(config).await?),
        false => None,
    };
    Ok(Running {
        handle,
        metrics,
        followed: None,
    })
}

async fn bind_metrics(config: &ProxyConfig) -> Result<TcpListener, Failure> {
    let observability = &config.observability;
    let address = (
        observability.metrics_address.as_str(),
        observability.metrics_port,
    );
    let listener = super::proxy::listen(address).await?;
    let failed = |e| Failure::failed(format!("could not listen for metrics: {e}"));
    listener.into_std().map_err(failed)
}

/// The HTTP endpoints, on a socket that another process may go on with.
struct Metrics {
    socket: TcpListener,
    stop: CancellationToken,
}

impl Metrics {
    fn serve(handle: &ProxyHandle, socket: TcpListener) -> Result<Self, Failure> {
        let failed = |e| Failure::failed(format!("could not serve metrics: {e}"));
        socket.set_nonblocking(true).map_err(failed)?;
        let listener = socket
            .try_clone()
            .and_then(tokio::net::TcpListener::from_std);
        let (listener, router) = (listener.map_err(failed)?, control::router(handle.clone()));
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        tokio::spawn(async move {
            let serving = axum::serve(listener, router).with_graceful_shutdown(stopped);
            if let Err(error) = serving.await {
                tracing::error!(%error, "HTTP endpoints of the proxy ended");
            }
        });
        Ok(Self { socket, stop })
    }

    fn copy(&self) -> Option<OwnedFd> {
        self.socket.try_clone().ok().map(OwnedFd::from)
    }
}

/// The proxy that is to be replaced; `None` where none runs.
async fn predecessor(socket: &Path) -> Result<Option<UnixStream>, Failure> {
    match UnixStream::connect(socket).await {
        Ok(stream) => Ok(Some(stream)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            Ok(None)
        }
        Err(e) => {
            let socket = socket.display();
            Err(Failure::failed(format!("could not reach {socket}: {e}")))
        }
    }
}

/// What came of the take-over that this process began with. An error where it was refused in the
/// end, once the clients that are here have left.
async fn heard(handle: &ProxyHandle, followed: Result<Followed, JoinError>) -> Result<(), Failure> {
    match followed {
        Ok(Followed::Done { taken, left }) => {
            out::note(&format!(
                "sessions taken over: {taken}; clients that stayed behind: {left}"
            ));
            Ok(())
        }
        Ok(Followed::Alone { taken }) => {
            out::note(&format!(
                "the proxy before this one has died; sessions taken over: {taken}"
            ));
            Ok(())
        }
        Ok(Followed::Refused { taken, why }) => {
            out::note(&format!(
                "the proxy before this one goes on: {why}; sessions that end here: {taken}"
            ));
            handle.emptied().await;
            Err(Failure::failed(format!("the take-over failed: {why}")))
        }
        Err(error) => Err(Failure::failed(format!("the take-over broke off: {error}"))),
    }
}

/// Waits for a process that takes over, and gives everything to it.
async fn give(
    handle: &ProxyHandle,
    socket: &Path,
    metrics: Option<&Metrics>,
    limit: Duration,
    stop: &CancellationToken,
) -> Result<(), Failure> {
    let listener = listen(socket).map_err(|e| {
        let socket = socket.display();
        Failure::failed(format!("could not listen on {socket}: {e}"))
    })?;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "could not take a connection of a new process");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let (to, copy) = (handle.clone(), metrics.and_then(Metrics::copy));
        let stop = stop.clone();
        // In a task of its own: it must not be dropped half-way.
        let giving = tokio::spawn(async move { to.give(stream, copy, limit, stop).await });
        match giving.await {
            Ok(Given::Done { handed, left }) => {
                if let Some(metrics) = metrics {
                    metrics.stop.cancel();
                }
                out::note(&format!(
                    "another process has taken over; sessions handed over: {handed}; clients that \
                     are still here: {left}"
                ));
                return Ok(());
            }
            Ok(Given::Failed { handed, why }) => out::note(&format!(
                "another process did not take over: {why}; sessions handed over: {handed}"
            )),
            Err(error) => out::note(&format!("a take-over broke off: {error}")),
        }
    }
}

/// Listens under a name of its own first: nobody connects before the rights are right, and what was
/// there before is replaced in one step.
fn listen(socket: &Path) -> std::io::Result<UnixListener> {
    let mut name = socket.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let own = Path::new(&name);
    if let Err(e) = std::fs::remove_file(own)
        && e.kind() != ErrorKind::NotFound
    {
        return Err(e);
    }
    let listener = UnixListener::bind(own)?;
    std::fs::set_permissions(own, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(own, socket)?;
    Ok(listener)
}

/// The instance, by priority, that is not in recovery.
async fn find_primary(config: &ProxyConfig, options: &ProxyOptions) -> Result<Backend, Failure> {
    let mut instances = config.backends.instances.clone();
    instances.sort_by_key(|i| i.priority);
    let mut problems = Vec::new();
    for instance in instances {
        let (at, limit) = (&instance.backend.endpoint, config.backends.connect_timeout);
        match backend::connect(at, &options.backend_tls, &options.service, limit).await {
            Ok(conn)
                if conn
                    .parameters
                    .get("in_hot_standby")
                    .is_none_or(|v| v == "off") =>
            {
                return Ok(instance.backend);
            }
            Ok(_) => problems.push(format!("{} is in recovery", instance.backend.name)),
            Err(e) => problems.push(e.to_string()),
        }
    }
    if problems.is_empty() {
        problems.push("no [[backends.instances]] is configured".to_owned());
    }
    Err(Failure::failed(format!(
        "no primary was found: {}",
        problems.join("; ")
    )))
}
