//! Whatever comes off the network, reading it neither panics nor reads past its end, and what can
//! be read and built again comes out as it went in.
//!
//! For a minute: `cargo +nightly fuzz run wire -- -max_total_time=60`.

#![no_main]

use bytes::BytesMut;
use helios_wire::message::{error, front, read};
use helios_wire::scram::{Binding, Client, Secret, Server, Verifier};
use helios_wire::{ErrorFields, body, frontend, peek_header, startup};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // A stream of frames, as either side would send it.
    let mut rest = data;
    while let Ok(Some(header)) = peek_header(rest) {
        if header.len > rest.len() {
            break;
        }
        let (frame, after) = rest.split_at(header.len);
        look_into(header.tag, frame);
        rest = after;
    }
    let _ = startup::packet_len(data);
    let _ = startup::parse(data);
    every_reader(data);
    scram(data);
});

fn look_into(tag: u8, frame: &[u8]) {
    let content = body(frame);
    let mut out = BytesMut::new();
    match tag {
        frontend::QUERY => {
            if let Ok(sql) = read::query(content) {
                front::query(&mut out, sql).unwrap();
                assert_eq!(out, frame);
            }
        }
        frontend::PARSE => {
            if let Ok(parse) = read::parse(content) {
                let types: Vec<u32> = parse.types.iter().collect();
                front::parse(&mut out, parse.name, parse.sql, &types).unwrap();
                assert_eq!(out, frame);
            }
        }
        frontend::EXECUTE => {
            if let Ok((portal, rows)) = read::execute(content) {
                front::execute(&mut out, portal, rows).unwrap();
                assert_eq!(out, frame);
            }
        }
        frontend::DESCRIBE | frontend::CLOSE => {
            if let Ok((target, name)) = read::describe_or_close(content) {
                let build = if tag == frontend::CLOSE {
                    front::close
                } else {
                    front::describe
                };
                build(&mut out, target, name).unwrap();
                assert_eq!(out, frame);
            }
        }
        _ => every_reader(content),
    }
}

fn every_reader(data: &[u8]) {
    let _ = read::command_complete(data).map(read::tag_rows);
    let _ = read::parameter_status(data);
    let _ = read::ready_for_query(data);
    let _ = read::backend_key_data(data);
    let _ = read::authentication(data);
    let _ = read::sasl_initial_response(data);
    let _ = read::parse(data).map(|parse| parse.types.iter().count());
    if let Ok(bind) = read::bind(data) {
        assert_eq!(read::bind_names(data), Ok((bind.portal, bind.statement)));
        assert_eq!(bind.params.iter().count(), bind.params.len());
        assert_eq!(bind.param_formats.iter().count(), bind.param_formats.len());
        assert_eq!(
            bind.result_formats.iter().count(),
            bind.result_formats.len()
        );
    }
    let _ = read::function_call_response(data);
    let _ = read::data_row(data).map(|row| assert_eq!(row.iter().count(), row.len()));
    let _ = read::row_description(data).count();
    let _ = read::notification(data);
    let _ = error::sqlstate(data);
    let _ = error::error_fields(data).count();
    if let Ok(fields) = ErrorFields::parse(data) {
        let mut out = BytesMut::new();
        fields.write_error(&mut out);
        assert!(ErrorFields::parse(body(&out)).is_ok());
    }
}

fn scram(data: &[u8]) {
    let verifier = || Verifier::mock("user", &[1; 32], 4096);
    let _ = std::str::from_utf8(data).map(|text| text.parse::<Verifier>().is_ok());
    let server = || Server::new(verifier(), Some(vec![2; 32]));
    let _ = server().first(b"SCRAM-SHA-256", data);
    let _ = server().first(b"SCRAM-SHA-256-PLUS", data);
    if let Ok((server, _)) = server().first(b"SCRAM-SHA-256", b"n,,n=,r=abc") {
        assert!(server.finish(data).is_err());
    }
    // A client that has keys computes nothing that a server could make long.
    let keys = helios_wire::scram::ScramKeys {
        client_key: [3; 32],
        stored_key: [4; 32],
        server_key: [5; 32],
    };
    let client = Client::new(Secret::Keys(&keys), Binding::None);
    if let Ok((client, _)) = client.finish(data) {
        let _ = client.verify(data);
    }
}
