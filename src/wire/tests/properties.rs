//! Random input: nothing panics, and what was built is read back as it was.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests are tests

use bytes::BytesMut;
use helios_wire::message::front::{Format, Target};
use helios_wire::message::{BuildError, back, error, front, read};
use helios_wire::scram::{Server, Verifier, build_verifier};
use helios_wire::startup::{self, CancelKey, FirstPacket};
use helios_wire::{ErrorFields, Severity, SqlState, body, frontend, peek_header};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, proptest};

/// Text as the protocol can carry it.
fn text() -> impl Strategy<Value = Vec<u8>> {
    vec(1..=u8::MAX, 0..40)
}

fn word() -> impl Strategy<Value = String> {
    "[^\0]{1,20}"
}

fn values() -> impl Strategy<Value = Vec<Option<Vec<u8>>>> {
    vec(option::of(vec(any::<u8>(), 0..20)), 0..8)
}

fn borrowed(values: &[Option<Vec<u8>>]) -> Vec<Option<&[u8]>> {
    values.iter().map(Option::as_deref).collect()
}

fn one_frame(out: &BytesMut, tag: u8) -> &[u8] {
    let header = peek_header(out).unwrap().unwrap();
    assert_eq!((header.tag, header.len), (tag, out.len()));
    body(out)
}

proptest! {
    #[test]
    fn garbage_is_an_error_and_no_panic(data in vec(any::<u8>(), 0..200)) {
        let _ = peek_header(&data);
        let _ = startup::parse(&data);
        let _ = read::command_complete(&data).map(read::tag_rows);
        let _ = read::parameter_status(&data);
        let _ = read::ready_for_query(&data);
        let _ = read::backend_key_data(&data);
        let _ = read::authentication(&data);
        let _ = read::sasl_initial_response(&data);
        let _ = read::query(&data);
        let _ = read::parse(&data);
        let _ = read::bind(&data);
        let _ = read::bind_names(&data);
        let _ = read::describe_or_close(&data);
        let _ = read::execute(&data);
        let _ = read::function_call_response(&data);
        let _ = read::data_row(&data);
        let _ = read::row_description(&data).count();
        let _ = read::notification(&data);
        let _ = error::sqlstate(&data);
        let _ = ErrorFields::parse(&data);
        let server = Server::new(Verifier::mock("u", &[0; 32], 4096), None);
        let _ = server.first(b"SCRAM-SHA-256", &data);
    }

    /// Every prefix of a good message is an error, and so is a good message with a byte too many.
    #[test]
    fn cut_messages_are_errors(portal in text(), statement in text(), params in values()) {
        let mut out = BytesMut::new();
        let formats = [Format::Text, Format::Binary];
        front::bind(&mut out, &portal, &statement, &formats, &borrowed(&params), &formats).unwrap();
        let whole = body(&out);
        for end in 0..whole.len() {
            prop_assert!(read::bind(&whole[..end]).is_err());
        }
        let long = [whole, &[0]].concat();
        prop_assert!(read::bind(&long).is_err());
    }

    #[test]
    fn extended_protocol_round_trips(
        name in text(),
        sql in text(),
        types in vec(any::<u32>(), 0..8),
        params in values(),
        rows in any::<i32>(),
    ) {
        let mut out = BytesMut::new();
        front::parse(&mut out, &name, &sql, &types).unwrap();
        let parse = read::parse(one_frame(&out, frontend::PARSE)).unwrap();
        prop_assert_eq!((parse.name, parse.sql), (&name[..], &sql[..]));
        prop_assert_eq!(parse.types.iter().collect::<Vec<_>>(), types);

        out.clear();
        front::bind(&mut out, &name, &sql, &[Format::Binary], &borrowed(&params), &[]).unwrap();
        let bind = read::bind(one_frame(&out, frontend::BIND)).unwrap();
        prop_assert_eq!((bind.portal, bind.statement), (&name[..], &sql[..]));
        prop_assert_eq!(bind.param_formats.iter().collect::<Vec<_>>(), [1]);
        prop_assert_eq!(bind.params.iter().collect::<Vec<_>>(), borrowed(&params));
        prop_assert!(bind.result_formats.is_empty());

        out.clear();
        front::execute(&mut out, &name, rows).unwrap();
        prop_assert_eq!(read::execute(one_frame(&out, frontend::EXECUTE)), Ok((&name[..], rows)));

        out.clear();
        front::describe(&mut out, Target::Portal, &name).unwrap();
        let described = read::describe_or_close(one_frame(&out, frontend::DESCRIBE));
        prop_assert_eq!(described, Ok((Target::Portal, &name[..])));

        out.clear();
        front::query(&mut out, &sql).unwrap();
        prop_assert_eq!(read::query(one_frame(&out, frontend::QUERY)), Ok(&sql[..]));
    }

    #[test]
    fn errors_round_trip(
        message in word(),
        detail in option::of(word()),
        hint in option::of(word()),
    ) {
        let mut fields = ErrorFields::new(Severity::Fatal, SqlState::SERIALIZATION_FAILURE, message);
        (fields.detail, fields.hint) = (detail, hint);
        let mut out = BytesMut::new();
        fields.write_error(&mut out);
        prop_assert_eq!(error::sqlstate(body(&out)), Ok(SqlState::SERIALIZATION_FAILURE));
        prop_assert_eq!(ErrorFields::parse(body(&out)), Ok(fields));
    }

    #[test]
    fn first_packets_round_trip(
        params in vec((word(), word()), 0..10),
        minor in any::<u16>(),
        pid in any::<i32>(),
        secret in vec(any::<u8>(), 4..=256),
    ) {
        let mut out = BytesMut::new();
        let pairs = params.iter().map(|(n, v)| (n.as_str(), v.as_str()));
        startup::startup_message(&mut out, minor, pairs).unwrap();
        prop_assert_eq!(startup::packet_len(&out), Ok(Some(out.len())));
        let FirstPacket::Startup(startup) = startup::parse(&out).unwrap() else {
            panic!("no startup packet");
        };
        prop_assert_eq!((startup.major, startup.minor, startup.params), (3, minor, params));

        out.clear();
        let key = CancelKey { pid, secret: secret.into() };
        startup::cancel_request(&mut out, &key).unwrap();
        prop_assert_eq!(startup::parse(&out), Ok(FirstPacket::Cancel(key)));
    }
}

#[test]
fn a_zero_byte_cannot_be_smuggled_in() {
    let mut out = BytesMut::from(&b"before"[..]);
    assert_eq!(front::query(&mut out, b"a\0b"), Err(BuildError::ZeroByte));
    assert_eq!(
        front::parse(&mut out, b"", b"a\0b", &[]),
        Err(BuildError::ZeroByte)
    );
    assert_eq!(out, &b"before"[..], "what failed leaves nothing behind");
    let many = vec![None; 65_536];
    let bind = front::bind(&mut out, b"", b"", &[], &many, &[]);
    assert_eq!(bind, Err(BuildError::TooLong));
    let mut out = BytesMut::new();
    ErrorFields::error(SqlState::INTERNAL_ERROR, "a\0Hb").write_error(&mut out);
    assert_eq!(ErrorFields::parse(body(&out)).unwrap().message, "aHb");
}

#[test]
fn startup_packets_have_postgresqls_limits() {
    let mut out = BytesMut::new();
    let long = "x".repeat(startup::MAX_STARTUP_PACKET);
    let done = startup::startup_message(&mut out, 0, [("user", long.as_str())]);
    assert_eq!(done, Err(BuildError::TooLong));
    for bad in [0_u32, 7, 10_001, u32::MAX] {
        assert!(startup::packet_len(&bad.to_be_bytes()).is_err(), "{bad}");
    }
    assert_eq!(
        startup::packet_len(&10_000_u32.to_be_bytes()),
        Ok(Some(10_000))
    );
    assert_eq!(startup::packet_len(&[0, 0, 0]), Ok(None));
}

#[test]
fn server_messages_are_read_as_they_are_built() {
    let mut out = BytesMut::new();
    back::command_complete(&mut out, "INSERT 0 17");
    let tag = read::command_complete(body(&out)).unwrap();
    assert_eq!((tag, read::tag_rows(tag)), (&b"INSERT 0 17"[..], Some(17)));
    assert_eq!(read::tag_rows(b"CREATE TABLE"), None);
    assert_eq!(read::tag_rows(b"SELECT 99999999999999999999"), None);

    out.clear();
    back::text_row_description(&mut out, &["a", "b"]);
    let columns: Vec<_> = read::row_description(body(&out))
        .map(Result::unwrap)
        .collect();
    assert_eq!(columns.len(), 2);
    assert_eq!((columns[1].name, columns[1].type_oid), (&b"b"[..], 25));

    out.clear();
    back::text_data_row(&mut out, &[Some("x"), None]);
    let row = read::data_row(body(&out)).unwrap();
    assert_eq!(row.iter().collect::<Vec<_>>(), [Some(&b"x"[..]), None]);

    out.clear();
    back::authentication_sasl(&mut out, &["SCRAM-SHA-256"]);
    let read::Authentication::Sasl(offer) = read::authentication(body(&out)).unwrap() else {
        panic!("no SASL");
    };
    assert!(offer.offers("SCRAM-SHA-256") && !offer.offers("SCRAM-SHA-256-PLUS"));
    assert!(build_verifier("p", b"salt", 1).parse::<Verifier>().is_ok());
}
