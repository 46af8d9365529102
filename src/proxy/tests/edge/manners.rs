//! Clients that misbehave, or that are no clients at all; sockets that cannot be had.

use std::time::Duration;

use bytes::BytesMut;
use helios_proxy::auth::AuthMethod;
use helios_proxy::listener::{BindError, Listener};
use helios_testkit::net::free_port;
use helios_testkit::{PgOptions, PgServer};
use helios_wire::message::front;
use helios_wire::startup::startup_message;
use helios_wire::{ErrorFields, body};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{Edge, Setup};

async fn trusting_edge(login_timeout: Duration) -> (PgServer, Edge) {
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let mut setup = Setup::new(&server);
    setup.auth = AuthMethod::Trust;
    setup.login_timeout = login_timeout;
    let edge = Edge::start(setup).await;
    (server, edge)
}

/// Sends bytes and reads until the proxy closes.
async fn send(edge: &Edge, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(("127.0.0.1", edge.port)).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let read = socket.read_to_end(&mut answer);
    // A reset behind the answer is as good as a close.
    let _ = tokio::time::timeout(Duration::from_secs(10), read)
        .await
        .unwrap();
    answer
}

fn error(answer: &[u8]) -> String {
    assert_eq!(answer.first(), Some(&b'E'), "{answer:?}");
    ErrorFields::parse(body(answer)).unwrap().to_string()
}

fn startup(minor: u16, params: &[(&str, &str)]) -> Vec<u8> {
    let mut packet = BytesMut::new();
    startup_message(&mut packet, minor, params.iter().copied()).unwrap();
    packet.to_vec()
}

#[tokio::test]
async fn strangers_are_told_in_postgresqls_form() {
    let (_server, edge) = trusting_edge(Duration::from_secs(10)).await;
    let invalid = "FATAL 08P01: malformed startup message: invalid length of startup packet";
    let http = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".repeat(1000);
    assert_eq!(error(&send(&edge, &http).await), invalid);
    for length in [
        [0xFF; 4],
        [0x7F, 0xFF, 0xFF, 0xFF],
        [0, 0, 0x27, 0x11],
        [0, 0, 0, 7],
    ] {
        assert_eq!(error(&send(&edge, &length).await), invalid);
    }
    // A startup packet without its end, of another version, without a user.
    let told = error(&send(&edge, b"\0\0\0\x0C\0\x03\0\0user").await);
    assert!(told.starts_with("FATAL 08P01: malformed startup"), "{told}");
    assert_eq!(
        error(&send(&edge, b"\0\0\0\x09\0\x02\0\0\0").await),
        "FATAL 0A000: unsupported frontend protocol 2.0: server supports 3.0 to 3.2"
    );
    assert_eq!(
        error(&send(&edge, &startup(0, &[("database", "x")])).await),
        "FATAL 28000: no PostgreSQL user name specified in startup packet"
    );
    let replication = [("user", "postgres"), ("replication", "database")];
    assert_eq!(
        error(&send(&edge, &startup(0, &replication)).await),
        "FATAL 0A000: replication connections are not supported by this proxy"
    );
}

#[tokio::test]
async fn encryption_is_refused_politely_and_protocol_negotiated() {
    let (_server, edge) = trusting_edge(Duration::from_secs(10)).await;
    let mut socket = TcpStream::connect(("127.0.0.1", edge.port)).await.unwrap();
    let mut answer = [0];
    for request in [[4, 210, 22, 48], [4, 210, 22, 47]] {
        socket.write_all(&[0, 0, 0, 8]).await.unwrap();
        socket.write_all(&request).await.unwrap();
        socket.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"N");
    }
    let params = [("user", "postgres"), ("_pq_.command_tag", "x")];
    let mut packet = startup(9999, &params);
    // Pipelined behind the start-up packet, as eager clients do.
    let mut terminate = BytesMut::new();
    front::terminate(&mut terminate);
    packet.extend_from_slice(&terminate);
    socket.write_all(&packet).await.unwrap();
    let mut all = Vec::new();
    socket.read_to_end(&mut all).await.unwrap();
    let negotiated = b"v\0\0\0\x1D\0\x03\0\x02\0\0\0\x01_pq_.command_tag\0R\0\0\0\x08\0\0\0\0S";
    assert_eq!(&all[..negotiated.len()], negotiated);
}

#[tokio::test]
async fn encryption_may_be_asked_for_once() {
    let (_server, edge) = trusting_edge(Duration::from_secs(10)).await;
    let twice = [0, 0, 0, 8, 4, 210, 22, 47].repeat(2);
    let answer = send(&edge, &twice).await;
    assert_eq!(answer[0], b'N');
    assert!(error(&answer[1..]).starts_with("FATAL 08P01"));
}

#[tokio::test]
async fn a_trickle_ends_at_the_login_timeout() {
    let (_server, edge) = trusting_edge(Duration::from_millis(300)).await;
    let mut socket = TcpStream::connect(("127.0.0.1", edge.port)).await.unwrap();
    let begun = std::time::Instant::now();
    let packet = startup(0, &[("user", "postgres")]);
    let mut told = Vec::new();
    for byte in packet {
        let _ = socket.write_all(&[byte]).await;
        let mut answer = [0; 512];
        let wait = Duration::from_millis(40);
        if let Ok(Ok(n)) = tokio::time::timeout(wait, socket.read(&mut answer)).await {
            told.extend_from_slice(&answer[..n]);
            if n == 0 {
                break;
            }
        }
    }
    let too_late = "FATAL 57014: canceling authentication due to timeout";
    assert_eq!(error(&told), too_late);
    assert!(begun.elapsed() < Duration::from_secs(5));
    // One that says nothing, and one that stops behind its request for encryption.
    assert_eq!(error(&send(&edge, b"").await), too_late);
    let answer = send(&edge, &[0, 0, 0, 8, 4, 210, 22, 47]).await;
    assert_eq!((answer[0], error(&answer[1..]).as_str()), (b'N', too_late));
    // A slow one within the limit is served: byte by byte.
    let (_server, edge) = trusting_edge(Duration::from_secs(10)).await;
    let mut socket = TcpStream::connect(("127.0.0.1", edge.port)).await.unwrap();
    for byte in startup(0, &[("user", "postgres")]) {
        socket.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut ok = [0; 9];
    socket.read_exact(&mut ok).await.unwrap();
    assert_eq!(&ok, b"R\0\0\0\x08\0\0\0\0");
}

#[tokio::test]
async fn a_port_in_use_is_said() {
    let first = Listener::bind("127.0.0.1", 0, None).await.unwrap();
    let port = first.port();
    let error = Listener::bind("127.0.0.1", port, None).await.unwrap_err();
    let said = format!("could not listen on 127.0.0.1:{port}: it is already in use");
    assert_eq!(error.to_string(), said);
    assert!(error.hint().unwrap().contains(&format!("port {port}")));
    assert!(matches!(error, BindError::InUse { .. }));
    let error = Listener::bind("192.0.2.1", 0, None).await.unwrap_err();
    assert!(matches!(error, BindError::Io { .. }), "{error}");
}

#[tokio::test]
async fn unix_sockets_are_served_and_cleaned_up() {
    let dir = tempfile::tempdir().unwrap();
    let server = PgServer::start(PgOptions::default()).await.unwrap();
    let mut setup = Setup::new(&server);
    setup.auth = AuthMethod::Trust;
    setup.unix_dir = Some(dir.path().to_owned());
    let edge = Edge::start(setup).await;
    let path = dir.path().join(format!(".s.PGSQL.{}", edge.port));
    let conninfo = format!(
        "host={} port={} user=postgres",
        dir.path().display(),
        edge.port
    );
    let client = server.connect_as(&conninfo).await.unwrap();
    client.simple_query("select 1").await.unwrap();
    // One that is in use is not stolen, one that is left over from a crash is replaced.
    let taken = Listener::bind("127.0.0.2", edge.port, Some(dir.path())).await;
    let taken = taken.unwrap_err().to_string();
    assert!(
        taken.contains(".s.PGSQL.") && taken.contains("already in use"),
        "{taken}"
    );
    let port = free_port().unwrap();
    let left_over = dir.path().join(format!(".s.PGSQL.{port}"));
    drop(std::os::unix::net::UnixListener::bind(&left_over).unwrap());
    let listener = Listener::bind("127.0.0.1", port, Some(dir.path()))
        .await
        .unwrap();
    assert!(left_over.exists());
    drop(listener);
    assert!(!left_over.exists());
    assert!(path.exists());
    drop(edge);
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while path.exists() {
        assert!(std::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
