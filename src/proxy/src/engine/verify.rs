//! Whether a replay gave what the client has seen, and the questions about a transaction that are
//! asked inside it.
//!
//! Asked by function calls: a query would end the unnamed portal that the client may still be
//! reading from. The invariant: a difference that the client could act on is an error.

use helios_session::grammar::Kind;
use helios_session::sequences::drawing;
use helios_session::tracker::Tracker;
use helios_session::verify::{Isolation, Verdict, compare, may_have_written};
use helios_wire::backend;
use helios_wire::message::{front, read};

use super::link::Link;
use super::own;
use super::replay::{ReplayError, next_frame};

/// Compares the replies of the journal's records.
///
/// Where the change of primary may have lost acknowledged commits (`lossy`), rows of a plain read
/// that differ are no mere change by others: the client has perhaps seen, and may act on, what is
/// not there any more.
///
/// # Errors
/// [`ReplayError::Different`], or the connection's.
pub(super) async fn verify(
    link: &mut Link,
    old: &Tracker,
    new: &mut Tracker,
    lossy: bool,
) -> Result<(), ReplayError> {
    let (mut soft, mut has_id) = (None, None);
    let (mut kinds_of_all, mut draws) = (None, None);
    let pairs = old.journal().records().iter().zip(new.journal().records());
    for (index, (seen, again)) in pairs.enumerate() {
        if old.journal().answer_bytes(seen) == new.journal().answer_bytes(again) {
            continue;
        }
        let (seen, again) = (old.journal().reply(seen), new.journal().reply(again));
        if seen == again {
            continue;
        }
        let kinds = kinds_of_all.get_or_insert_with(|| kinds_by_record(old));
        let locking = kinds.iter().flatten().any(|k| *k == Kind::LockingRead);
        let of_this = kinds.get(index).map(Vec::as_slice).unwrap_or_default();
        match compare(&seen, &again, of_this, locking, old.mode()) {
            Verdict::Same => {}
            Verdict::RowsDiffer if lossy => {
                return Err(ReplayError::Different {
                    statement: index + 1,
                    what: "rows of a result differ".into(),
                });
            }
            Verdict::RowsDiffer if draws.get_or_insert_with(|| drawing(old)).contains(&index) => {
                return Err(ReplayError::Different {
                    statement: index + 1,
                    what: "values of a sequence differ".into(),
                });
            }
            Verdict::RowsDiffer => {
                let has_id = match has_id {
                    Some(known) => known,
                    None => *has_id.insert(transaction_id(link).await?.is_some()),
                };
                if may_have_written(kinds, index, has_id) {
                    return Err(ReplayError::Different {
                        statement: index + 1,
                        what: "rows of a result differ behind a write".into(),
                    });
                }
                soft = soft.or(Some(index + 1));
            }
            Verdict::Different(what) => {
                return Err(ReplayError::Different {
                    statement: index + 1,
                    what,
                });
            }
        }
    }
    let Some(statement) = soft else { return Ok(()) };
    // The replayed transaction runs at the level of the original: it was begun by the same words.
    let level = isolation(link).await?;
    match Isolation::from_setting(&level) {
        Isolation::ReadCommitted => Ok(()),
        Isolation::Snapshot => Err(ReplayError::Different {
            statement,
            what: format!("rows of a result differ under {level}"),
        }),
    }
}

/// `current_setting(text)`.
const CURRENT_SETTING: u32 = 2077;

/// Asks for the level inside the transaction, by a function call: a query would end the unnamed
/// portal that the client may still be reading from.
async fn isolation(link: &mut Link) -> Result<String, ReplayError> {
    let value = call(link, CURRENT_SETTING, &[Some(b"transaction_isolation")]).await?;
    Ok(String::from_utf8_lossy(&value.unwrap_or_default()).into_owned())
}

/// `to_regclass(text)`.
const TO_REGCLASS: u32 = 3495;

/// The OID of a relation, by the name under which the session knows it where it stands.
///
/// # Errors
/// The connection's.
pub(super) async fn regclass(link: &mut Link, name: &str) -> Result<Option<u32>, ReplayError> {
    let value = call(link, TO_REGCLASS, &[Some(name.as_bytes())]).await?;
    Ok(value.and_then(|v| v.try_into().ok().map(u32::from_be_bytes)))
}

/// The id of the transaction, if it has one.
async fn transaction_id(link: &mut Link) -> Result<Option<Vec<u8>>, ReplayError> {
    call(link, own::XACT_ID_IF_ASSIGNED, &[]).await
}

/// Calls a function with text arguments; its result in binary, `None` for NULL or an error.
///
/// # Errors
/// The connection's.
pub(super) async fn call(
    link: &mut Link,
    function: u32,
    arguments: &[Option<&[u8]>],
) -> Result<Option<Vec<u8>>, ReplayError> {
    let (text, binary) = (front::Format::Text, front::Format::Binary);
    front::function_call(&mut link.output, function, text, arguments, binary)
        .map_err(|e| ReplayError::State(e.to_string()))?;
    link.flush().await?;
    let mut result = None;
    loop {
        let (tag, frame) = next_frame(link).await?;
        let body = frame.get(5..).unwrap_or_default();
        match tag {
            backend::READY_FOR_QUERY => return Ok(result),
            backend::FUNCTION_CALL_RESPONSE => {
                let value = read::function_call_response(body).ok().flatten();
                result = value.map(<[u8]>::to_vec);
            }
            _ => {}
        }
    }
}

fn kinds_by_record(old: &Tracker) -> Vec<Vec<Kind>> {
    let journal = old.journal();
    journal
        .records()
        .iter()
        .map(|r| old.kinds_of(journal.record_bytes(r)))
        .collect()
}
