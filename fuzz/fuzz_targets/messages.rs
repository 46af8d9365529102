//! Every reader on the same bytes: a value or an error, never a panic. What a reader takes apart
//! and a builder puts together again must be the bytes it came from.
#![no_main]

use bytes::BytesMut;
use helios_wire::message::front::{self, Format};
use helios_wire::message::{error, read};
use helios_wire::scram::{Server, Verifier};
use helios_wire::{ErrorFields, body};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    rebuilt(data);
    walked(data);
    let _ = read::ready_for_query(data);
    let _ = read::parameter_status(data);
    let _ = read::backend_key_data(data);
    let _ = read::authentication(data);
    let _ = read::function_call_response(data);
    let _ = read::notification(data);
    let _ = read::bind_names(data);
    if let Ok(tag) = read::command_complete(data) {
        let _ = read::tag_rows(tag);
    }
    let _ = error::sqlstate(data);
    let _ = ErrorFields::parse(data);
    if let Ok((mechanism, Some(message))) = read::sasl_initial_response(data) {
        let server = Server::new(Verifier::mock("nobody", &[7; 32], 4096), None);
        if let Ok((server, _)) = server.first(mechanism, message) {
            // Nobody has the password of a verifier that was made up.
            assert!(server.finish(message).is_err());
        }
    }
});

fn rebuilt(data: &[u8]) {
    let mut out = BytesMut::new();
    if let Ok(sql) = read::query(data) {
        assert!(front::query(&mut out, sql).is_ok());
        assert_eq!(body(&out.split()), data);
    }
    if let Ok(parse) = read::parse(data) {
        let types: Vec<u32> = parse.types.iter().collect();
        assert_eq!(types.len(), parse.types.len());
        assert!(front::parse(&mut out, parse.name, parse.sql, &types).is_ok());
        assert_eq!(body(&out.split()), data);
    }
    if let Ok((portal, rows)) = read::execute(data) {
        assert!(front::execute(&mut out, portal, rows).is_ok());
        assert_eq!(body(&out.split()), data);
    }
    if let Ok((target, name)) = read::describe_or_close(data) {
        assert!(front::describe(&mut out, target, name).is_ok());
        assert_eq!(body(&out.split()), data);
    }
    if let Ok(bind) = read::bind(data) {
        let formats = |codes: Vec<u16>| -> Option<Vec<Format>> {
            let known = |code| match code {
                0 => Some(Format::Text),
                1 => Some(Format::Binary),
                _ => None,
            };
            codes.into_iter().map(known).collect()
        };
        let values: Vec<Option<&[u8]>> = bind.params.iter().collect();
        assert_eq!(values.len(), bind.params.len());
        let given = formats(bind.param_formats.iter().collect());
        let wanted = formats(bind.result_formats.iter().collect());
        if let (Some(given), Some(wanted)) = (given, wanted) {
            let built = front::bind(
                &mut out,
                bind.portal,
                bind.statement,
                &given,
                &values,
                &wanted,
            );
            assert!(built.is_ok());
            assert_eq!(body(&out.split()), data);
        }
    }
}

/// Iterators end, and after no more items than the bytes can hold.
fn walked(data: &[u8]) {
    assert!(read::row_description(data).count() <= data.len() + 1);
    assert!(error::error_fields(data).count() <= data.len() + 1);
    if let Ok(row) = read::data_row(data) {
        assert_eq!(row.iter().count(), row.len());
    }
}
