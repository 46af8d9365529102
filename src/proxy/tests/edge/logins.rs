//! SCRAM logins, captured keys, limits, cancel requests.

use std::sync::Arc;
use std::time::Duration;

use helios_proxy::backend::{BackendError, Credentials, connect};
use helios_proxy::listener::Limits;
use helios_proxy::tls::BackendTls;
use helios_testkit::{PgOptions, PgServer};
use helios_wire::SqlState;
use helios_wire::scram::{Secret, Verifier};
use tokio_postgres::NoTls;

use crate::support::{Edge, LIMIT, PASSWORD, Setup, login, tcp};

async fn scram_server() -> PgServer {
    let options = PgOptions::default()
        .hba("local all all trust")
        .hba("host all all 127.0.0.1/32 scram-sha-256")
        .password(PASSWORD);
    let server = PgServer::start(options).await.unwrap();
    let admin = server.connect().await.unwrap();
    admin
        .batch_execute(
            "create role ann login password 'first';
             create role nopass login;
             create role late login password 'late' valid until '2001-01-01';
             set password_encryption = md5;
             create role old login password 'old';",
        )
        .await
        .unwrap();
    server
}

async fn code(edge: &Edge, user: &str, password: &str) -> String {
    match tokio_postgres::connect(&edge.conninfo(user, password), NoTls).await {
        Ok(_) => "00000".to_owned(),
        Err(error) => error.code().map(|c| c.code().to_owned()).unwrap(),
    }
}

#[tokio::test]
async fn scram_logins_and_their_captured_keys() {
    let server = scram_server().await;
    let edge = Edge::start(Setup::new(&server)).await;
    // Through the proxy: the client knows the password, the proxy only the catalog, and the
    // server asks for SCRAM: so the captured keys log in.
    for (user, password) in [("postgres", PASSWORD), ("ann", "first")] {
        let conninfo = edge.conninfo(user, password);
        let (client, connection) = tokio_postgres::connect(&conninfo, NoTls).await.unwrap();
        tokio::spawn(connection);
        let row = client.query_one("select current_user::text", &[]).await;
        assert_eq!(row.unwrap().get::<_, &str>(0), user);
    }
    for (user, password) in [
        ("postgres", "wrong"),
        ("nobody", "x"),
        ("nopass", ""),
        ("nopass", "x"),
        ("old", "old"),
        ("late", "late"),
    ] {
        if !password.is_empty() {
            assert_eq!(code(&edge, user, password).await, "28P01", "{user}");
        }
    }
    // A changed password counts at once, the old one no more.
    let admin = server.connect().await.unwrap();
    let change = "alter role ann password 'second'";
    admin.batch_execute(change).await.unwrap();
    assert_eq!(code(&edge, "ann", "first").await, "28P01");
    assert_eq!(code(&edge, "ann", "second").await, "00000");
    // The server's own refusal reaches the client as it is.
    let elsewhere = edge
        .conninfo("ann", "second")
        .replace("dbname=postgres", "dbname=nowhere");
    let refused = tokio_postgres::connect(&elsewhere, NoTls)
        .await
        .err()
        .unwrap();
    assert_eq!(refused.code().unwrap().code(), "3D000");
    assert_eq!(
        refused.as_db_error().unwrap().message(),
        "database \"nowhere\" does not exist"
    );
}

#[tokio::test]
async fn keys_work_for_any_later_login_and_no_other() {
    let server = scram_server().await;
    let (endpoint, tls) = (tcp(&server), BackendTls::disabled());
    let admin = server.connect().await.unwrap();
    let row = admin
        .query_one(
            "select rolpassword from pg_authid where rolname = 'ann'",
            &[],
        )
        .await
        .unwrap();
    let verifier: Verifier = row.get::<_, &str>(0).parse().unwrap();
    let keys = Arc::new(captured(verifier, "first"));
    for _ in 0..3 {
        let login = login("ann", Credentials::Scram(keys.clone()));
        let conn = connect(&endpoint, &tls, &login, LIMIT).await.unwrap();
        assert!(conn.pid > 0 && conn.secret.len() == 4 && conn.buf.is_empty());
        assert_eq!(conn.parameters["application_name"], "edge test");
        assert_eq!(conn.parameters["session_authorization"], "ann");
    }
    let other = login("postgres", Credentials::Scram(keys));
    match connect(&endpoint, &tls, &other, LIMIT).await {
        Err(BackendError::Refused { fields, frame, .. }) => {
            assert_eq!(fields.sqlstate, SqlState::INVALID_PASSWORD);
            assert_eq!(frame[0], b'E');
        }
        other => panic!("{other:?}"),
    }
    let nothing = login("ann", Credentials::None);
    match connect(&endpoint, &tls, &nothing, LIMIT).await {
        Err(error @ BackendError::AuthUnsupported { .. }) => assert!(!error.is_transient()),
        other => panic!("{other:?}"),
    }
}

/// What a server learns from a client that knows the password.
fn captured(verifier: Verifier, password: &str) -> helios_wire::scram::ScramKeys {
    use helios_wire::scram::{Binding, Client, Server};
    let client = Client::new(Secret::Password(password), Binding::None);
    let mechanism = client.mechanism().as_bytes();
    let server = Server::new(verifier, None);
    let (server, answer) = server.first(mechanism, client.first().as_bytes()).unwrap();
    let (_, proof) = client.finish(answer.as_bytes()).unwrap();
    server.finish(proof.as_bytes()).unwrap().0
}

#[tokio::test]
async fn clear_and_md5_passwords_are_not_sent() {
    for method in ["password", "md5"] {
        let options = PgOptions::default()
            .hba("local all all trust")
            .hba(format!("host all all 127.0.0.1/32 {method}"))
            .password(PASSWORD);
        let server = PgServer::start(options).await.unwrap();
        let admin = server.connect().await.unwrap();
        // Method md5 is SCRAM for those whose password is stored so.
        let role = "set password_encryption = md5; create role old login password 'old'";
        admin.batch_execute(role).await.unwrap();
        let login = login("old", Credentials::Password("old".into()));
        let tls = BackendTls::disabled();
        match connect(&tcp(&server), &tls, &login, LIMIT).await {
            Err(BackendError::AuthUnsupported { why, .. }) => {
                assert!(why.contains("scram-sha-256"), "{why}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn logins_survive_the_absence_of_a_primary() {
    let mut server = scram_server().await;
    let edge = Edge::start(Setup::new(&server)).await;
    assert_eq!(code(&edge, "ann", "first").await, "00000");
    server.crash();
    let verifiers = &edge.context.verifiers;
    // Ann is remembered; of Bob nothing is known, and he is told so when patience ends.
    assert!(verifiers.lookup("ann").await.is_ok());
    assert!(verifiers.lookup("bob").await.is_err());
    assert_eq!(code(&edge, "bob", "x").await, "57P03");
    verifiers.set_endpoint(None);
    assert!(verifiers.lookup("ann").await.is_ok());
    server.boot().await.unwrap();
    verifiers.set_endpoint(Some(tcp(&server)));
    assert_eq!(code(&edge, "ann", "first").await, "00000");
}

#[tokio::test]
async fn names_are_cut_where_postgresql_cuts_them() {
    let server = scram_server().await;
    let edge = Edge::start(Setup::new(&server)).await;
    let (long, wide) = ("n".repeat(70), "ö".repeat(40));
    let admin = server.connect().await.unwrap();
    for (name, length) in [(&long, 63), (&wide, 31)] {
        let role = format!("create role \"{name}\" login password 'long'");
        admin.batch_execute(&role).await.unwrap();
        let database = format!("create database \"{name}\" owner \"{name}\"");
        admin.batch_execute(&database).await.unwrap();
        let conninfo = edge
            .conninfo(name, "long")
            .replace("dbname=postgres", &format!("dbname={name}"));
        let (client, connection) = tokio_postgres::connect(&conninfo, NoTls).await.unwrap();
        tokio::spawn(connection);
        let sql = "select current_user::text = current_database()::text, length(current_user)";
        let row = client.query_one(sql, &[]).await.unwrap();
        assert_eq!((row.get(0), row.get(1)), (true, length));
    }
    assert_eq!(code(&edge, &long, "wrong").await, "28P01");
}

/// What a client is asked for that wants to log in as `user` with a password.
async fn challenge(edge: &Edge, user: &str) -> String {
    use bytes::BytesMut;
    use helios_wire::message::front;
    use helios_wire::scram::{Binding, Client};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", edge.port))
        .await
        .unwrap();
    let mut out = BytesMut::new();
    let params = [("user", user), ("database", "postgres")];
    helios_wire::startup::startup_message(&mut out, 0, params).unwrap();
    let client = Client::new(Secret::Password("x"), Binding::None);
    let first = client.first();
    front::sasl_initial_response(&mut out, client.mechanism(), first.as_bytes()).unwrap();
    socket.write_all(&out).await.unwrap();
    let mut body = Vec::new();
    for _ in 0..2 {
        let mut header = [0; 5];
        socket.read_exact(&mut header).await.unwrap();
        assert_eq!(header[0], b'R');
        let length = u32::from_be_bytes(header[1..].try_into().unwrap());
        body = vec![0; length as usize - 4];
        socket.read_exact(&mut body).await.unwrap();
    }
    String::from_utf8(body[4..].to_vec()).unwrap()
}

#[tokio::test]
async fn unknown_users_are_asked_like_known_ones() {
    let server = scram_server().await;
    let admin = server.connect().await.unwrap();
    let version = "select current_setting('server_version_num')::int";
    let version: i32 = admin.query_one(version, &[]).await.unwrap().get(0);
    if version >= 160_000 {
        let change = "alter system set scram_iterations = 1000";
        admin.batch_execute(change).await.unwrap();
        admin
            .batch_execute("select pg_reload_conf()")
            .await
            .unwrap();
        let deadline = tokio::time::Instant::now() + LIMIT;
        let iterations = "show scram_iterations";
        while admin
            .query_one(iterations, &[])
            .await
            .unwrap()
            .get::<_, &str>(0)
            != "1000"
        {
            assert!(tokio::time::Instant::now() < deadline);
        }
    }
    let role = "create role new login password 'new'";
    admin.batch_execute(role).await.unwrap();
    let edge = Edge::start(Setup::new(&server)).await;
    let iterations = async |user: &str| {
        let asked = challenge(&edge, user).await;
        asked.rsplit(",i=").next().map(str::to_owned).unwrap()
    };
    let known = iterations("new").await;
    assert_eq!(known, if version >= 160_000 { "1000" } else { "4096" });
    assert_eq!(iterations("nobody").await, known);
    assert_eq!(iterations("nopass").await, known);
}

#[tokio::test]
async fn a_login_that_stops_halfway_is_told_so() {
    let server = scram_server().await;
    let mut setup = Setup::new(&server);
    setup.login_timeout = Duration::from_millis(700);
    let edge = Edge::start(setup).await;
    let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", edge.port))
        .await
        .unwrap();
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut out = bytes::BytesMut::new();
    helios_wire::startup::startup_message(&mut out, 0, [("user", "ann")]).unwrap();
    socket.write_all(&out).await.unwrap();
    let mut answer = Vec::new();
    let read = socket.read_to_end(&mut answer);
    tokio::time::timeout(LIMIT, read).await.unwrap().unwrap();
    let asked = 1 + u32::from_be_bytes(answer[1..5].try_into().unwrap()) as usize;
    assert_eq!(answer[0], b'R');
    let told = helios_wire::ErrorFields::parse(helios_wire::body(&answer[asked..])).unwrap();
    assert_eq!(
        told.to_string(),
        "FATAL 57014: canceling authentication due to timeout"
    );
}

#[tokio::test]
async fn connections_are_limited() {
    let server = scram_server().await;
    let mut setup = Setup::new(&server);
    setup.limits = Limits::new(3, Some(2));
    let limits = setup.limits.clone();
    let edge = Edge::start(setup).await;
    let connect = async |user: &str, password: &str| {
        let conninfo = edge.conninfo(user, password);
        let (client, connection) = tokio_postgres::connect(&conninfo, NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    };
    let first = connect("ann", "first").await;
    let second = connect("ann", "first").await;
    let conninfo = edge.conninfo("ann", "first");
    let refused = tokio_postgres::connect(&conninfo, NoTls)
        .await
        .err()
        .unwrap();
    let refused = refused.as_db_error().unwrap();
    assert_eq!(refused.code().code(), "53300");
    assert_eq!(refused.message(), "too many connections for role \"ann\"");
    let third = connect("postgres", PASSWORD).await;
    // All places are taken: the next one is told, and a cancel request still gets through.
    let refused = tokio_postgres::connect(&conninfo, NoTls)
        .await
        .err()
        .unwrap();
    let refused = refused.as_db_error().unwrap();
    assert_eq!(refused.message(), "sorry, too many clients already");
    let cancel = third.cancel_token();
    let sleep = tokio::spawn(async move { third.simple_query("select pg_sleep(30)").await });
    let admin = server.connect().await.unwrap();
    let busy = "select count(*) from pg_stat_activity where query ~ '^select pg_sleep' \
                and wait_event = 'PgSleep'";
    let deadline = tokio::time::Instant::now() + LIMIT;
    while admin.query_one(busy, &[]).await.unwrap().get::<_, i64>(0) == 0 {
        assert!(tokio::time::Instant::now() < deadline);
    }
    cancel.cancel_query(NoTls).await.unwrap();
    let error = sleep.await.unwrap().err().unwrap();
    assert_eq!(error.code().unwrap().code(), "57014");
    // Places are given back.
    drop((first, second));
    let deadline = tokio::time::Instant::now() + LIMIT;
    while limits.open() > 0 {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    connect("ann", "first").await;
}
