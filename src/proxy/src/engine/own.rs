//! Messages that the proxy sends on its own behalf.
//!
//! Pure bytes. The OIDs are of built-in functions; they are the same in PostgreSQL 13 to 18
//! (`src/include/catalog/pg_proc.dat`).

use bytes::BytesMut;
use helios_session::evidence::Gtid;
use helios_session::state::{DOMAIN, literal, snapshot_query};
use helios_session::tracker::Ask;
use helios_wire::message::BuildError;
use helios_wire::message::front::{self, Format, Target};

/// `pg_current_xact_id_if_assigned()`.
pub(super) const XACT_ID_IF_ASSIGNED: u32 = 5060;
/// `pg_current_wal_insert_lsn()`.
const WAL_INSERT_LSN: u32 = 2852;
/// Type `bytea`.
const BYTEA: u32 = 17;
/// Name of our short-lived statements and portals.
const NAME: &[u8] = b"_helios";
/// Name of the statement that sets marks, and of its portal.
const MARK: &[u8] = b"_helios_mark";
/// The function never returns NULL: no row has to be sent.
const MARK_SQL: &[u8] =
    b"SELECT WHERE pg_catalog.pg_logical_emit_message(true, 'helios', $1) IS NULL";

/// Appends the messages of a question.
pub(super) fn ask(out: &mut BytesMut, ask: Ask) {
    let built = match ask {
        Ask::ByFunctionCall => {
            call(out, XACT_ID_IF_ASSIGNED).and_then(|()| call(out, WAL_INSERT_LSN))
        }
        Ask::Inline => {
            let sql = b"SELECT pg_catalog.pg_current_xact_id_if_assigned()";
            extended(out, NAME, sql).map(|()| front::flush(out))
        }
    };
    debug_assert!(built.is_ok(), "constant messages can be built");
}

/// Appends a mark (`helios_session::evidence`): a logical message in the transaction that is to
/// follow. `pg_logical_emit_message` may be called by everybody. Its statement stays prepared for
/// the next mark; `prepare` when it is not yet, or may be gone. It returns no row.
pub(super) fn mark(out: &mut BytesMut, gtid: Gtid, prepare: bool) {
    let id = gtid.0.to_be_bytes();
    if prepare {
        let built = front::close(out, Target::Statement, MARK)
            .and_then(|()| front::parse(out, MARK, MARK_SQL, &[BYTEA]));
        debug_assert!(built.is_ok(), "constant messages can be built");
    }
    let built = front::bind(out, MARK, MARK, &[Format::Binary], &[Some(&id)], &[])
        .and_then(|()| front::execute(out, MARK, 0));
    debug_assert!(built.is_ok(), "constant messages can be built");
}

/// The statement and the unnamed portal of [`bound_mark`]; the portal is replaced by the client's.
const BOUND_MARK: &[u8] = b"_helios_mark_call";

/// What makes the domain of [`bound_mark`], in one transaction. Nobody waits for a disk or a standby:
/// it does not outlive the backend.
pub(super) fn make_domain() -> [String; 4] {
    [
        "SET TRANSACTION READ WRITE".to_owned(),
        "SELECT pg_catalog.set_config('synchronous_commit', 'off', true)".to_owned(),
        format!("DROP DOMAIN IF EXISTS pg_temp.{DOMAIN}"),
        format!(
            "CREATE DOMAIN pg_temp.{DOMAIN} AS pg_catalog.bytea CHECK \
             (pg_catalog.pg_logical_emit_message(true, 'helios', VALUE) IS NOT NULL)"
        ),
    ]
}

/// Appends a mark that is set by the value of a parameter: a Bind begins the transaction, and no
/// Execute makes an implicit transaction block of it (`exec_bind_message` in
/// `src/backend/tcop/postgres.c`; the check runs in `domain_recv`).
pub(super) fn bound_mark(out: &mut BytesMut, gtid: Gtid, prepare: bool) {
    let id = gtid.0.to_be_bytes();
    if prepare {
        let sql = format!("SELECT WHERE $1::pg_temp.{DOMAIN} IS NULL");
        let built = front::close(out, Target::Statement, BOUND_MARK)
            .and_then(|()| front::parse(out, BOUND_MARK, sql.as_bytes(), &[]));
        debug_assert!(built.is_ok(), "constant messages can be built");
    }
    let built = front::bind(out, b"", BOUND_MARK, &[Format::Binary], &[Some(&id)], &[]);
    debug_assert!(built.is_ok(), "constant messages can be built");
}

/// Appends the question for a prepared transaction.
pub(super) fn prepared(out: &mut BytesMut, gid: &str) {
    let sql = format!(
        "SELECT transaction FROM pg_catalog.pg_prepared_xacts \
         WHERE gid OPERATOR(pg_catalog.=) {}",
        literal(gid)
    );
    let built = extended(out, NAME, sql.as_bytes());
    debug_assert!(built.is_ok(), "a text without zero bytes can be sent");
    front::sync(out);
}

/// Appends a simple query in its extended form, without its Sync; the unnamed statement is gone
/// afterwards, as it is behind a simple query. Results are flushed before the commit begins.
///
/// # Errors
/// For a text that is too large.
pub(super) fn converted(out: &mut BytesMut, sql: &[u8]) -> Result<(), BuildError> {
    front::parse(out, b"", sql, &[])?;
    front::bind(out, b"", b"", &[], &[], &[])?;
    front::describe(out, Target::Portal, b"")?;
    front::execute(out, b"", 0)?;
    front::close(out, Target::Statement, b"")?;
    front::flush(out);
    Ok(())
}

/// Appends a statement that returns no rows in its extended form, with its Sync and without a Flush.
///
/// # Errors
/// For a text that is too large.
pub(super) fn converted_counted(out: &mut BytesMut, sql: &[u8]) -> Result<(), BuildError> {
    front::parse(out, b"", sql, &[])?;
    front::bind(out, b"", b"", &[], &[], &[])?;
    front::execute(out, b"", 0)?;
    front::close(out, Target::Statement, b"")?;
    front::sync(out);
    Ok(())
}

/// Appends a COPY … FROM STDIN in its extended form; Flush and Sync follow the end of its data.
///
/// # Errors
/// For a text that is too large.
pub(super) fn converted_copy(out: &mut BytesMut, sql: &[u8]) -> Result<(), BuildError> {
    front::parse(out, b"", sql, &[])?;
    front::bind(out, b"", b"", &[], &[], &[])?;
    front::execute(out, b"", 0)
}

/// Appends a Sync.
pub(super) fn sync(out: &mut BytesMut) {
    front::sync(out);
}

/// Appends a Sync, behind a Flush.
pub(super) fn flush_and_sync(out: &mut BytesMut) {
    front::flush(out);
    front::sync(out);
}

/// Appends a Flush.
pub(super) fn flush(out: &mut BytesMut) {
    front::flush(out);
}

fn call(out: &mut BytesMut, oid: u32) -> Result<(), BuildError> {
    front::function_call(out, oid, Format::Binary, &[], Format::Binary)
}

/// Appends a statement whose columns are described and whose rows come in binary, behind settings,
/// as one exchange.
pub(super) fn in_binary(out: &mut BytesMut, settings: &str, sql: &str) {
    let built = extended(out, b"_helios0", settings.as_bytes()).and_then(|()| {
        front::parse(out, NAME, sql.as_bytes(), &[])?;
        front::bind(out, NAME, NAME, &[], &[], &[Format::Binary])?;
        front::describe(out, Target::Portal, NAME)?;
        front::execute(out, NAME, 0)?;
        front::close(out, Target::Statement, NAME)
    });
    debug_assert!(built.is_ok(), "a text without zero bytes can be sent");
    front::sync(out);
}

/// Appends the question for the columns of a statement's rows, behind settings, as one exchange.
pub(super) fn describe(out: &mut BytesMut, settings: &str, sql: &str) {
    let built = extended(out, b"_helios0", settings.as_bytes()).and_then(|()| {
        front::parse(out, NAME, sql.as_bytes(), &[])?;
        front::describe(out, Target::Statement, NAME)?;
        front::close(out, Target::Statement, NAME)
    });
    debug_assert!(built.is_ok(), "a text without zero bytes can be sent");
    front::sync(out);
}

fn extended(out: &mut BytesMut, name: &[u8], sql: &[u8]) -> Result<(), BuildError> {
    front::parse(out, name, sql, &[])?;
    front::bind(out, name, name, &[], &[], &[])?;
    front::execute(out, name, 0)?;
    front::close(out, Target::Statement, name)
}

/// Appends the question for the session's state; `custom` are settings that no view lists.
pub(super) fn snapshot<'a>(out: &mut BytesMut, custom: impl Iterator<Item = &'a str>) {
    statements(out, &[&snapshot_query(custom)]);
}

/// Appends statements of our own as one exchange.
pub(super) fn statements(out: &mut BytesMut, all: &[&str]) {
    for (at, sql) in all.iter().enumerate() {
        // A portal stays until the end of the transaction.
        let name = format!("_helios{at}");
        let built = extended(out, name.as_bytes(), sql.as_bytes());
        debug_assert!(built.is_ok(), "a text without zero bytes can be sent");
    }
    front::sync(out);
}
