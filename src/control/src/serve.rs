//! A control port: mutual TLS, then HTTP.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use rustls_pki_types::CertificateDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::Live;

/// How long a handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How long a connection may stay; a long poll is shorter, the longest command is not answered
/// over it but asked for again.
const CONNECTION_LIMIT: Duration = Duration::from_secs(7 * 3600);
/// Connections at a time; the rest waits.
const CONNECTIONS: usize = 64;
/// Pause after an accept that failed, for example without descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `router` to peers whose certificate carries `allowed`, until cancelled. Open requests
/// are then cut off. Each connection is taken with the certificates that are in use then.
pub fn serve(
    listener: TcpListener,
    router: Router,
    certificates: &Live,
    allowed: &'static str,
    stop: CancellationToken,
) -> tokio::task::JoinHandle<()> {
    let certificates = certificates.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, router, certificates, allowed, stop.clone()) => {}
            () = stop.cancelled() => {}
        }
    })
}

async fn accept(
    listener: TcpListener,
    router: Router,
    certificates: Live,
    allowed: &'static str,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "control port could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let acceptor = TlsAcceptor::from(certificates.server());
        let (router, stop) = (router.clone(), stop.clone());
        tokio::spawn(async move {
            let work = tokio::time::timeout(
                CONNECTION_LIMIT,
                connection(stream, router, acceptor, allowed),
            );
            tokio::select! {
                _ = work => {}
                () = stop.cancelled() => {}
            }
            drop(place);
        });
    }
}

async fn connection(
    stream: TcpStream,
    router: Router,
    acceptor: TlsAcceptor,
    allowed: &'static str,
) {
    let _ = stream.set_nodelay(true);
    let handshake = acceptor.accept(stream);
    let stream = match tokio::time::timeout(HANDSHAKE_LIMIT, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::info!(%error, "control port refused a peer");
            return;
        }
        Err(_) => return,
    };
    let peer = stream.get_ref().1.peer_certificates();
    if !peer
        .and_then(<[_]>::first)
        .is_some_and(|c| carries(c, allowed))
    {
        tracing::warn!(allowed, "control port refused a peer by its name");
        return;
    }
    let service = TowerToHyperService::new(router);
    let served = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "control connection ended");
    }
}

/// Whether a certificate's alternative names hold `name`.
fn carries(certificate: &CertificateDer<'_>, name: &str) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return false;
    };
    match parsed.subject_alternative_name() {
        Ok(Some(names)) => names
            .value
            .general_names
            .iter()
            .any(|n| matches!(n, GeneralName::DNSName(found) if *found == name)),
        _ => false,
    }
}
