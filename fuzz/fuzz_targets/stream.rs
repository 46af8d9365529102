//! A connection's bytes as a server gets them: a first packet, then frames. Sizes stay in bounds
//! before anything of that size is read, and each step goes forward.
#![no_main]

use bytes::BytesMut;
use helios_wire::frame::MAX_LENGTH_WORD;
use helios_wire::startup::{self, FirstPacket, MAX_STARTUP_PACKET};
use helios_wire::{body, peek_header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let rest = first_packet(data).unwrap_or(data);
    frames(rest);
});

/// What follows the first packet, when there is a whole one.
fn first_packet(data: &[u8]) -> Option<&[u8]> {
    let length = startup::packet_len(data).ok().flatten()?;
    assert!((8..=MAX_STARTUP_PACKET).contains(&length));
    let (packet, rest) = data.split_at_checked(length)?;
    match startup::parse(packet) {
        Ok(FirstPacket::Cancel(key)) => {
            let mut out = BytesMut::new();
            assert!(startup::cancel_request(&mut out, &key).is_ok());
            assert_eq!(out, packet);
        }
        Ok(FirstPacket::Startup(start)) => {
            for (name, value) in &start.params {
                assert!(!name.is_empty() && !value.contains('\0'));
            }
        }
        Ok(FirstPacket::SslRequest | FirstPacket::GssEncRequest) => assert_eq!(length, 8),
        Err(_) => {}
    }
    Some(rest)
}

fn frames(mut data: &[u8]) {
    while let Ok(Some(header)) = peek_header(data) {
        assert!(header.len >= 5 && header.len <= MAX_LENGTH_WORD + 1);
        let Some((frame, rest)) = data.split_at_checked(header.len) else {
            return;
        };
        assert_eq!(body(frame).len() + 5, header.len);
        data = rest;
    }
}
