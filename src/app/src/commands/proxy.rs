//! `helios proxy`: a proxy that an operator commands, or one alone, in front of servers that
//! somebody else looks after (`alone`).

use std::time::Duration;

use helios_api::v1alpha1::names;
use helios_control::{LOOK_EVERY, Live, TlsFiles};
use helios_proxy::ProxyOptions;
use helios_proxy::config::ProxyConfig;
use helios_proxy::managed::Managed;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::ProxyArgs;
use crate::failure::Failure;
use crate::out;

/// In a Pod: how long clients still come, because nodes do not know yet that it is on its way out;
/// and how long transactions may then take. Together with what is ended at last (5 s) within the
/// Pod's `terminationGracePeriodSeconds`.
const NOTICE: Duration = Duration::from_secs(3);
const POD_GRACE: Duration = Duration::from_secs(20);

fn load(args: &ProxyArgs) -> Result<ProxyConfig, Failure> {
    ProxyConfig::load(&args.config).map_err(|e| Failure::usage(e.to_string()))
}

/// `--check`.
pub(crate) fn check(args: &ProxyArgs) -> Result<(), Failure> {
    load(args)?;
    out::note(&format!("{} is valid", args.config.display()));
    Ok(())
}

/// Runs it until it is told to stop.
pub(crate) async fn run(args: &ProxyArgs) -> Result<(), Failure> {
    let config = load(args)?;
    let failed = |e| Failure::failed(format!("could not listen for signals: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(failed)?;
    if let (Some(control), Some(dir)) = (args.control, &args.tls_dir) {
        let managed = managed(config, control, dir).await?;
        if let Some(address) = args.inspect {
            let listener = listen(address).await?;
            let router = managed.inspection();
            tokio::spawn(async move { axum::serve(listener, router).await });
        }
        if let Some(file) = &args.topology_file {
            managed.keep_in(file.clone());
        }
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hang_up.recv() => managed.look_at_certificates(),
            }
        }
        out::note("stopping");
        managed.shutdown(NOTICE, POD_GRACE).await;
        return Ok(());
    }
    let told_to_stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    super::alone::run(args, &config, told_to_stop, hang_up).await
}

/// A proxy that the operator commands, from now on.
async fn managed(
    config: ProxyConfig,
    control: std::net::SocketAddr,
    dir: &std::path::Path,
) -> Result<Managed, Failure> {
    ProxyOptions::from_config(&config).map_err(|e| Failure::usage(e.to_string()))?;
    let observability = config.observability.clone();
    let managed = Managed::new(config);
    let files = TlsFiles {
        ca: dir.join("ca.crt"),
        certificate: dir.join("tls.crt"),
        key: dir.join("tls.key"),
    };
    let certificates = Live::follow(&files, LOOK_EVERY, managed.stopped())
        .map_err(|e| Failure::usage(e.to_string()))?;
    managed.follow_certificates(LOOK_EVERY);
    let orders = listen(control).await?;
    helios_control::serve(
        orders,
        managed.orders(),
        &certificates,
        names::OPERATOR_IDENTITY,
        managed.stopped(),
    );
    let probes = listen((
        observability.metrics_address.as_str(),
        observability.metrics_port,
    ))
    .await?;
    let router = managed.probes();
    tokio::spawn(async move { axum::serve(probes, router).await });
    out::note(&format!("waiting for orders on {control}"));
    Ok(managed)
}

pub(super) async fn listen(
    address: impl tokio::net::ToSocketAddrs + std::fmt::Debug,
) -> Result<tokio::net::TcpListener, Failure> {
    let text = format!("{address:?}");
    tokio::net::TcpListener::bind(address)
        .await
        .map_err(|e| Failure::failed(format!("could not listen on {text}: {e}")))
}
