//! Messages that the proxy sends on its own behalf.
//!
//! Pure bytes. The OIDs are of built-in functions; they are the same in PostgreSQL 13 to 18
//! (`src/include/catalog/pg_proc.dat`).

use bytes::BytesMut;
use helios_session::state::snapshot_query;
use helios_session::tracker::Ask;
use helios_wire::message::front::{self, Format, Target};

/// `pg_current_xact_id_if_assigned()`.
pub(super) const XACT_ID_IF_ASSIGNED: u32 = 5060;
/// `pg_current_wal_insert_lsn()`.
const WAL_INSERT_LSN: u32 = 2852;
/// Name of our short-lived statements and portals.
const NAME: &[u8] = b"_helios";

/// Appends the messages of a question.
pub(super) fn ask(out: &mut BytesMut, ask: Ask) {
    let built = match ask {
        Ask::ByFunctionCall => {
            call(out, XACT_ID_IF_ASSIGNED).and_then(|()| call(out, WAL_INSERT_LSN))
        }
        Ask::Inline => {
            let sql = b"SELECT pg_catalog.pg_current_xact_id_if_assigned()";
            extended(out, sql).map(|()| front::flush(out))
        }
    };
    debug_assert!(built.is_ok(), "constant messages can be built");
}

fn call(out: &mut BytesMut, oid: u32) -> Result<(), helios_wire::message::BuildError> {
    front::function_call(out, oid, Format::Binary, &[], Format::Binary)
}

fn extended(out: &mut BytesMut, sql: &[u8]) -> Result<(), helios_wire::message::BuildError> {
    front::parse(out, NAME, sql, &[])?;
    front::bind(out, NAME, NAME, &[], &[], &[])?;
    front::execute(out, NAME, 0)?;
    front::close(out, Target::Statement, NAME)
}

/// Appends the question for the session's state; `custom` are settings that no view lists.
pub(super) fn snapshot<'a>(out: &mut BytesMut, custom: impl Iterator<Item = &'a str>) {
    let built = extended(out, snapshot_query(custom).as_bytes());
    debug_assert!(built.is_ok(), "a text without zero bytes can be sent");
    front::sync(out);
}
