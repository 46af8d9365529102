//! Builders of the messages that a server sends; errors and notices are in
//! [`error`](super::error).

use bytes::{BufMut, BytesMut};

use super::{framed, put_text};
use crate::frame::backend;

/// Appends AuthenticationOk.
pub fn authentication_ok(out: &mut BytesMut) {
    authentication(out, 0, |_| {});
}

/// Appends AuthenticationSASL with the mechanisms on offer, the preferred one first.
pub fn authentication_sasl(out: &mut BytesMut, mechanisms: &[&str]) {
    authentication(out, 10, |out| {
        mechanisms.iter().for_each(|name| put_text(out, name));
        out.put_u8(0);
    });
}

/// Appends AuthenticationSASLContinue.
pub fn authentication_sasl_continue(out: &mut BytesMut, data: &[u8]) {
    authentication(out, 11, |out| out.put_slice(data));
}

/// Appends AuthenticationSASLFinal.
pub fn authentication_sasl_final(out: &mut BytesMut, data: &[u8]) {
    authentication(out, 12, |out| out.put_slice(data));
}

fn authentication(out: &mut BytesMut, code: u32, data: impl FnOnce(&mut BytesMut)) {
    framed(out, backend::AUTHENTICATION, |out| {
        out.put_u32(code);
        data(out);
    });
}

/// Appends ParameterStatus.
pub fn parameter_status(out: &mut BytesMut, name: &str, value: &str) {
    framed(out, backend::PARAMETER_STATUS, |out| {
        put_text(out, name);
        put_text(out, value);
    });
}

/// Appends BackendKeyData. The secret has 4 bytes in protocol 3.0, up to 256 in 3.2.
pub fn backend_key_data(out: &mut BytesMut, pid: i32, secret: &[u8]) {
    framed(out, backend::BACKEND_KEY_DATA, |out| {
        out.put_i32(pid);
        out.put_slice(secret);
    });
}

/// Appends NotificationResponse.
pub fn notification(out: &mut BytesMut, pid: i32, channel: &str, payload: &str) {
    framed(out, backend::NOTIFICATION_RESPONSE, |out| {
        out.put_i32(pid);
        put_text(out, channel);
        put_text(out, payload);
    });
}

/// Appends ReadyForQuery with the transaction status `I`, `T` or `E`.
pub fn ready_for_query(out: &mut BytesMut, status: u8) {
    framed(out, backend::READY_FOR_QUERY, |out| out.put_u8(status));
}

/// Appends NegotiateProtocolVersion: the newest minor version that we speak, and the protocol
/// options that we do not know.
pub fn negotiate_protocol_version(out: &mut BytesMut, minor: u16, options: &[&str]) {
    framed(out, backend::NEGOTIATE_PROTOCOL_VERSION, |out| {
        out.put_u32(3 << 16 | u32::from(minor));
        out.put_u32(u32::try_from(options.len()).unwrap_or(0));
        options.iter().for_each(|name| put_text(out, name));
    });
}

/// Appends CommandComplete.
pub fn command_complete(out: &mut BytesMut, tag: &str) {
    framed(out, backend::COMMAND_COMPLETE, |out| put_text(out, tag));
}

/// Appends EmptyQueryResponse.
pub fn empty_query_response(out: &mut BytesMut) {
    framed(out, backend::EMPTY_QUERY_RESPONSE, |_| {});
}

/// Appends a RowDescription of text columns without a table.
pub fn text_row_description(out: &mut BytesMut, columns: &[&str]) {
    framed(out, backend::ROW_DESCRIPTION, |out| {
        out.put_u16(u16::try_from(columns.len()).unwrap_or(u16::MAX));
        for name in columns {
            put_text(out, name);
            out.put_u32(0); // table
            out.put_u16(0); // column
            out.put_u32(25); // type: text
            out.put_i16(-1); // type's size: variable
            out.put_i32(-1); // type's modifier
            out.put_u16(0); // format: text
        }
    });
}

/// Appends a DataRow of text values.
pub fn text_data_row(out: &mut BytesMut, values: &[Option<&str>]) {
    framed(out, backend::DATA_ROW, |out| {
        out.put_u16(u16::try_from(values.len()).unwrap_or(u16::MAX));
        for value in values {
            match value {
                None => out.put_i32(-1),
                Some(text) => {
                    out.put_u32(u32::try_from(text.len()).unwrap_or(0));
                    out.put_slice(text.as_bytes());
                }
            }
        }
    });
}
