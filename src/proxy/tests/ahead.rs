//! Backends that are opened ahead of a planned move: what they are warmed up with, and that none of
//! it is left in the session that goes on with one.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // helpers of tests are tests

use bytes::BytesMut;
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_wire::message::front;
use helios_wire::startup::startup_message;
use helios_wire::{ErrorFields, backend, peek_header};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_postgres::NoTls;

/// A client that says what it likes.
struct Plain(TcpStream, BytesMut);

impl Plain {
    async fn connect(bench: &Bench) -> Self {
        let socket = TcpStream::connect(("127.0.0.1", bench.proxy.port())).await;
        let mut plain = Self(socket.unwrap(), BytesMut::new());
        let mut packet = BytesMut::new();
        let who = [("user", "postgres"), ("database", "postgres")];
        startup_message(&mut packet, 0, who).unwrap();
        plain.ask(&packet).await;
        plain
    }

    /// The answer up to ReadyForQuery: the first error, if there is one.
    async fn ask(&mut self, bytes: &[u8]) -> Option<ErrorFields> {
        self.0.write_all(bytes).await.unwrap();
        let mut error = None;
        loop {
            while let Some(header) = peek_header(&self.1).unwrap()
                && self.1.len() >= header.len
            {
                let frame = self.1.split_to(header.len);
                match header.tag {
                    backend::READY_FOR_QUERY => return error,
                    backend::ERROR_RESPONSE => {
                        error = error.or(Some(ErrorFields::parse(&frame[5..]).unwrap()));
                    }
                    _ => {}
                }
            }
            assert_ne!(self.0.read_buf(&mut self.1).await.unwrap(), 0, "closed");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_opened_ahead_has_planned_what_clients_run() {
    let schema = "CREATE TABLE accounts (id int PRIMARY KEY, balance int);
                  INSERT INTO accounts VALUES (1, 10), (2, 20);
                  CREATE ROLE stranger LOGIN;
                  CREATE FUNCTION note(n int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT n'";
    let mut bench = Bench::start(EngineOptions::default(), schema)
        .await
        .unwrap();
    let (pays, calls, odd) = tokio::join!(bench.client(), bench.client(), bench.client());
    let (pays, calls, odd) = (pays.unwrap(), calls.unwrap(), odd.unwrap());
    let mut plain = Plain::connect(&bench).await;
    // With a parameter, with a function of the user's, and one that nobody could plan.
    let pay = "UPDATE accounts SET balance = balance - 1 WHERE id = $1";
    pays.execute(pay, &[&1_i32]).await.unwrap();
    calls.batch_execute("SELECT note(7)").await.unwrap();
    // Twice, so it comes first: the last one is what the server shows.
    let again = bench.client().await.unwrap();
    // Another user's is not shown to this one, in a backend of its own.
    let stranger = format!("{} user=stranger", bench.conninfo());
    let (stranger, connection) = tokio_postgres::connect(&stranger, NoTls).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..2 {
        let secret = "SELECT 1 WHERE 'secret' = 'secret'";
        stranger.batch_execute(secret).await.unwrap();
    }
    again.batch_execute("SELECT note(8)").await.unwrap();
    odd.batch_execute("SELECT 1 FROM missing")
        .await
        .unwrap_err();
    let candidate = bench.candidate().unwrap();
    bench.proxy.prepare(&candidate).await;
    bench.switchover().await.unwrap();
    let asked = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle' AND query IN \
                 ('EXPLAIN UPDATE accounts SET balance = balance - 1 WHERE id = $1', \
                  'EXPLAIN SELECT 1 FROM missing')";
    // One for each session: none of them has needed it yet.
    assert_eq!(bench.column(asked).await.unwrap(), ["5"]);
    let shown = "SELECT usename FROM pg_stat_activity WHERE query LIKE '%secret%' \
                 AND query NOT LIKE '%usename%' AND query LIKE 'EXPLAIN%'";
    assert_eq!(bench.column(shown).await.unwrap(), ["stranger"]);
    // Nothing was executed, and the unnamed statement is not there.
    let balance = "SELECT balance FROM accounts WHERE id = 1";
    assert_eq!(bench.column(balance).await.unwrap(), ["9"]);
    let mut bind = BytesMut::new();
    front::bind(&mut bind, b"", b"", &[], &[Some(b"1")], &[]).unwrap();
    front::execute(&mut bind, b"", 0).unwrap();
    front::sync(&mut bind);
    let error = plain.ask(&bind).await.unwrap();
    assert_eq!(error.sqlstate.as_str(), "26000", "{error}");
    pays.execute(pay, &[&1_i32]).await.unwrap();
    assert_eq!(bench.column(balance).await.unwrap(), ["8"]);
}
