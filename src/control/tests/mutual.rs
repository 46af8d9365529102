//! A control port over real sockets: who is let in, and who is not.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use helios_control::{CallError, ControlClient, Live, Material, serve};
use hyper::{Method, StatusCode};
use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(10);

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    fn issue(&self, name: &str) -> Live {
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let ca = self.0.pem();
        let material = Material::from_pem(
            ca.as_bytes(),
            certificate.pem().as_bytes(),
            key.serialize_pem().as_bytes(),
        );
        Live::new(&material.unwrap()).unwrap()
    }
}

async fn server(material: &Live, stop: &CancellationToken) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/v1/ping", get(|| async { "pong" }));
    serve(listener, router, material, "operator.helios", stop.clone());
    address
}

async fn ping(address: SocketAddr, name: &str, material: &Live) -> Result<String, CallError> {
    let client = ControlClient::new(address, name, material).unwrap();
    let (status, body) = client
        .call(Method::GET, "/v1/ping", Vec::new(), LIMIT)
        .await?;
    assert_eq!(status, StatusCode::OK);
    Ok(String::from_utf8_lossy(&body).into_owned())
}

#[tokio::test]
async fn only_the_operator_of_the_same_authority_is_served() {
    let stop = CancellationToken::new();
    let ours = Authority::new();
    let address = server(&ours.issue("pg-1"), &stop).await;
    let operator = ours.issue("operator.helios");

    assert_eq!(ping(address, "pg-1", &operator).await.unwrap(), "pong");

    // The same name from another authority, and another name from ours.
    let stranger = Authority::new().issue("operator.helios");
    for (who, material) in [
        ("stranger", &stranger),
        ("neighbour", &ours.issue("pg-2")),
        ("proxy", &ours.issue("proxy.helios")),
    ] {
        let refused = ping(address, "pg-1", material).await;
        assert!(
            matches!(
                refused,
                Err(CallError::Unreachable { .. } | CallError::Broken { .. })
            ),
            "{who}: {refused:?}"
        );
    }
    // A server that is not the instance that was meant.
    let other = ping(address, "pg-2", &operator).await;
    assert!(
        matches!(
            other,
            Err(CallError::Unreachable { .. } | CallError::Broken { .. })
        ),
        "{other:?}"
    );
    stop.cancel();
}

#[tokio::test]
async fn a_peer_without_a_certificate_gets_nothing() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let stop = CancellationToken::new();
    let address = server(&Authority::new().issue("pg-1"), &stop).await;
    let mut plain = tokio::net::TcpStream::connect(address).await.unwrap();
    plain
        .write_all(b"GET /v1/ping HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(LIMIT, plain.read_to_end(&mut answer)).await;
    assert!(read.is_ok(), "the connection was left open");
    assert!(
        !String::from_utf8_lossy(&answer).contains("pong"),
        "{answer:?}"
    );
    stop.cancel();
}
