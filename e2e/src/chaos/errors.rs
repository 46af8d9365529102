//! The list of what a client may be told, in one place. Everything else is a violation: any other
//! error, a closed socket, a hang past the limit.
//!
//! | SQLSTATE | from | when |
//! |---|---|---|
//! | 40001 | PostgreSQL | a serialisation failure of its own |
//! | 40P01 | PostgreSQL | a deadlock |
//! | 40001 | us | the transaction may not be replayed, or its replay differed |
//! | 08007 | us | a COMMIT or autocommit statement (also a SELECT: it may call a function that writes) whose outcome cannot be known |
//! | 57P03, 08006 | us | no primary within the limit; ends the connection |
//!
//! A fault may add states that PostgreSQL itself answers it with (disk full: 53100).

use super::wire::Trouble;

/// Where a client was when it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// In an explicit transaction, before COMMIT was sent: nothing can have committed.
    Statement,
    /// COMMIT or PREPARE TRANSACTION of an explicit transaction was sent.
    Commit,
    /// A request that commits by itself was sent.
    Autocommit,
    /// A read outside of a transaction.
    Read,
    /// Logging in.
    Connect,
}

/// What to make of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Allowed: nothing has committed.
    Aborted,
    /// Allowed: 08007.
    Unknown,
    /// Allowed: 08007 that says that it has committed, only the result is lost. It must have.
    Committed,
    /// Allowed: no primary within the limit. Whether something in flight has committed is open.
    NoPrimary,
    /// Not allowed.
    Violation,
}

/// Our own words for a transaction that could not be moved.
const NOT_MOVED: &str = "the transaction was aborted, because it could not be moved";

/// Our own words for a statement whose commit is proven and whose result nobody has.
const COMMITTED: &str = "the statement was committed";

/// Judges what a client was told. `extra`: states that the fault allows.
#[must_use]
pub fn judge(trouble: &Trouble, at: At, extra: &[&str]) -> Verdict {
    let Trouble::Sql { fatal, state, text } = trouble else {
        return Verdict::Violation;
    };
    let ours = text.starts_with(NOT_MOVED) || text.starts_with("could not serialize access");
    match (state.as_str(), fatal) {
        ("40001", false) if ours && at != At::Connect => Verdict::Aborted,
        ("40P01", false) if matches!(at, At::Statement | At::Autocommit) => Verdict::Aborted,
        ("08007", false) if text.starts_with(COMMITTED) && at != At::Statement => {
            Verdict::Committed
        }
        ("08007", false) if matches!(at, At::Commit | At::Autocommit | At::Read) => {
            Verdict::Unknown
        }
        ("57P03", true) if text.starts_with("no primary is available") => Verdict::NoPrimary,
        ("08006", _) => Verdict::NoPrimary,
        (state, _) if extra.contains(&state) => Verdict::Aborted,
        _ => Verdict::Violation,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sql(state: &str, fatal: bool, text: &str) -> Trouble {
        Trouble::Sql {
            fatal,
            state: state.into(),
            text: text.into(),
        }
    }

    #[test]
    fn the_list() {
        let judged = |state, fatal, text, at| judge(&sql(state, fatal, text), at, &[]);
        let conflict = "could not serialize access due to concurrent update";
        assert_eq!(
            judged("40001", false, conflict, At::Statement),
            Verdict::Aborted
        );
        assert_eq!(
            judged("40001", false, NOT_MOVED, At::Commit),
            Verdict::Aborted
        );
        assert_eq!(judged("08007", false, "", At::Commit), Verdict::Unknown);
        assert_eq!(judged("08007", false, "", At::Autocommit), Verdict::Unknown);
        let text = "the statement was committed, but its result was lost";
        assert_eq!(
            judged("08007", false, text, At::Autocommit),
            Verdict::Committed
        );
        let text = "no primary is available; detail: x";
        assert_eq!(judged("57P03", true, text, At::Commit), Verdict::NoPrimary);
    }

    #[test]
    fn everything_else_is_a_violation() {
        for (state, text) in [
            (
                "57P01",
                "terminating connection due to administrator command",
            ),
            (
                "57P02",
                "terminating connection because of crash of another server process",
            ),
            ("57P03", "the database system is starting up"),
            ("57014", "canceling statement due to user request"),
            ("25006", "cannot execute INSERT in a read-only transaction"),
            ("25P02", "current transaction is aborted"),
            ("23505", "duplicate key value violates unique constraint"),
            ("40001", "something else"),
            ("53100", "could not extend file: No space left on device"),
        ] {
            for at in [At::Statement, At::Commit, At::Autocommit, At::Connect] {
                let trouble = sql(state, state.starts_with("57P0"), text);
                assert_eq!(judge(&trouble, at, &[]), Verdict::Violation, "{state}");
            }
        }
        // A statement in a transaction cannot have an unknown outcome.
        assert_eq!(
            judge(&sql("08007", false, ""), At::Statement, &[]),
            Verdict::Violation
        );
        for trouble in [
            Trouble::Closed(String::new()),
            Trouble::Timeout(std::time::Duration::ZERO),
            Trouble::Protocol(String::new()),
        ] {
            assert_eq!(judge(&trouble, At::Commit, &["53100"]), Verdict::Violation);
        }
    }

    #[test]
    fn a_fault_may_add_states() {
        let full = sql("53100", false, "could not extend file");
        assert_eq!(judge(&full, At::Statement, &["53100"]), Verdict::Aborted);
    }
}
