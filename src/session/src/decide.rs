//! "May this be replayed, and how?": one pure function, with a table of tests (design rule 1).

use helios_api::Xid;

use crate::evidence::{Ended, Fate};
use crate::grammar::Kind;
use crate::script::{Inside, Speaks};
use crate::{ReplayMode, TxnStatus};

/// What is known of the open transaction's id when its connection broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    /// The server told its id.
    Known(Xid),
    /// The server told, after the last statement, that it has none: nothing was written.
    NothingWritten,
    /// Not known.
    Unknown,
}

/// One exchange that was sent and not completely answered, in the order sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InFlight {
    /// Its statements; `None` when its text was not kept.
    pub kinds: Option<Vec<Kind>>,
    /// The server has answered COMMIT (or PREPARE TRANSACTION) in it.
    pub commit_answered: bool,
    /// The server has answered with an error in it, which the client has.
    pub failed: bool,
    /// The server itself has cancelled it, and nothing of it lasts.
    pub undone: bool,
    /// Evidence for the transaction that a COMMIT in it would end.
    pub evidence: Evidence,
    /// All of it but the last ReadyForQuery has been answered, and the client has the answer.
    pub answered: bool,
    /// The mark of a transaction that commits by itself.
    pub mark: MarkState,
    /// How much of it the mark speaks for.
    pub speaks: Speaks,
    /// The client has ended copy data in it.
    pub copy_ended: bool,
    /// Whether it is proven that it only reads, once that was asked.
    pub only_reads: Option<bool>,
    /// Whether it has ended its prepared transaction, once that was looked for.
    pub ended: Option<Ended>,
}

/// What is known of a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkState {
    /// None was set.
    None,
    /// One was set, but the exchange may have held several transactions.
    Mixed,
    /// One was set and has not been looked for.
    Sent,
    /// It has been looked for.
    Found(Fate),
}

/// Everything that the decision rests on.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    /// The configured mode.
    pub mode: ReplayMode,
    /// Status after the last exchange that was answered completely.
    pub status: TxnStatus,
    /// Why the session or its transaction cannot be moved, if so.
    pub unprotected: Option<&'a str>,
    /// What is in flight.
    pub in_flight: &'a [InFlight],
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// Rebuild the session, replay the open transaction if there is one, send again what was in
    /// flight.
    Replay,
    /// Ask the database whether this transaction committed. If it did, exchange `at` is answered
    /// and the decision is taken again for the rest; if not, [`Plan::Replay`].
    Resolve {
        /// Index of the exchange that holds the COMMIT.
        at: usize,
        /// Its transaction.
        xid: Xid,
    },
    /// Look for the marks of all exchanges in the log, and decide again.
    FindMarks,
    /// Find out whether this exchange can have written, and decide again.
    ProveRead {
        /// Index of the exchange.
        at: usize,
    },
    /// Find out whether this exchange has ended its prepared transaction, and decide again.
    FindPrepared {
        /// Index of the exchange.
        at: usize,
    },
    /// Find out what this exchange does to transactions while it runs, and decide again.
    ProveInside {
        /// Index of the exchange.
        at: usize,
    },
    /// The first transaction of exchange 0 has committed; what followed it is not known.
    FirstCommitted,
    /// Exchange 0 is over, outside a transaction; only ReadyForQuery is missing.
    Finish,
    /// Exchange 0 has committed by itself, and its results are lost.
    ResultsLost,
    /// Exchange 0 is a COMMIT that the server has answered; only ReadyForQuery is missing.
    Complete,
    /// The transaction is lost, and the client must be told: it may be tried again (40001).
    Abort {
        /// Why.
        reason: String,
    },
    /// Exchange `at` may have taken effect, and nobody can tell (08007).
    Unknown {
        /// Index of the exchange.
        at: usize,
    },
    /// The connection ends, as it would without us (mode `none`).
    Disconnect,
}

/// Decides.
#[must_use]
pub fn decide(s: &Situation<'_>) -> Plan {
    if s.mode == ReplayMode::None {
        return Plan::Disconnect;
    }
    let mut open = s.status != TxnStatus::Idle;
    let mut failed = s.status == TxnStatus::Failed;
    for (at, exchange) in s.in_flight.iter().enumerate() {
        if !open && let Some(plan) = by_mark(at, exchange).or_else(|| by_proof(at, exchange)) {
            match plan {
                Plan::Replay => continue,
                plan => return plan,
            }
        }
        match step(&mut open, &mut failed, exchange) {
            Step::Safe => {}
            Step::Committed if at == 0 => return Plan::Complete,
            Step::Committed | Step::InDoubt => return Plan::Unknown { at },
            Step::Ask(xid) => return Plan::Resolve { at, xid },
            Step::AskPrepared => return Plan::FindPrepared { at },
        }
    }
    replay_or_abort(s)
}

/// What a mark says of an exchange outside a transaction block; [`Plan::Replay`]: nothing of it has
/// committed, `None`: there is no mark that would speak for it.
fn by_mark(at: usize, exchange: &InFlight) -> Option<Plan> {
    let marked = exchange.mark != MarkState::None;
    if at == 0 && marked && exchange.answered && exchange.failed {
        // The server rolled back and said so.
        return Some(Plan::Finish);
    }
    if exchange.undone {
        return None;
    }
    Some(match exchange.mark {
        MarkState::None => return None,
        // The server still waits for data.
        MarkState::Sent if is_copy(exchange) && !exchange.copy_ended => Plan::Replay,
        MarkState::Sent => Plan::FindMarks,
        MarkState::Found(fate) => by_fate(at, exchange, fate),
        MarkState::Mixed => Plan::Unknown { at },
    })
}

/// What the fate of the transaction with the mark says of the exchange.
fn by_fate(at: usize, exchange: &InFlight, fate: Fate) -> Plan {
    use Inside::{Commits, Nothing, Unknown};
    match (fate, exchange.speaks) {
        (Fate::Unknown, _) => Plan::Unknown { at },
        (Fate::Committed, _) if at > 0 => Plan::Unknown { at },
        (_, Speaks::Calls(None)) => Plan::ProveInside { at },
        // It may have rolled back what was marked, and committed what followed.
        (Fate::NotCommitted, Speaks::Calls(Some(Unknown))) => Plan::Unknown { at },
        (Fate::NotCommitted, _) => Plan::Replay,
        // Its answer came in front of the last commit.
        (Fate::Committed, Speaks::Calls(Some(Commits | Unknown))) => Plan::FirstCommitted,
        (Fate::Committed, _) if exchange.answered => Plan::Finish,
        (Fate::Committed, Speaks::All | Speaks::Calls(Some(Nothing))) => Plan::ResultsLost,
        (Fate::Committed, Speaks::First) => Plan::FirstCommitted,
    }
}

/// Nothing in flight can have committed: whether what was open can be had again.
#[must_use]
pub fn replay_or_abort(s: &Situation<'_>) -> Plan {
    if let Some(reason) = s.unprotected {
        return Plan::Abort {
            reason: reason.to_owned(),
        };
    }
    let open = s.status != TxnStatus::Idle;
    if open && !s.mode.replays() {
        return Plan::Abort {
            reason: "replay of transactions is switched off".into(),
        };
    }
    if s.in_flight.iter().any(|e| e.kinds.is_none()) {
        return Plan::Abort {
            reason: "the statement in flight was too large to keep".into(),
        };
    }
    Plan::Replay
}

enum Step {
    /// Cannot have committed anything.
    Safe,
    /// Has committed, and said so.
    Committed,
    /// May have committed; evidence exists.
    Ask(Xid),
    /// May have ended a prepared transaction; there may be evidence.
    AskPrepared,
    /// May have committed; no evidence.
    InDoubt,
}

fn step(open: &mut bool, failed: &mut bool, exchange: &InFlight) -> Step {
    if exchange.undone {
        return Step::Safe;
    }
    if exchange.commit_answered {
        let alone = exchange.kinds.as_deref().is_some_and(is_only_commit);
        return if alone {
            Step::Committed
        } else {
            Step::InDoubt
        };
    }
    let Some(kinds) = exchange.kinds.as_deref() else {
        return Step::InDoubt;
    };
    let began_open = *open;
    for kind in kinds {
        match kind {
            Kind::Empty | Kind::Harmless => {}
            Kind::Begin => *open = true,
            // A failed transaction cannot commit, whatever is said to it.
            Kind::Commit if *failed => *open = false,
            Kind::Commit if *open => return commit(exchange, began_open, kinds),
            Kind::Rollback => {
                *open = false;
                *failed = false;
            }
            Kind::Commit => {}
            // The next transaction has nothing in it yet.
            Kind::Chain => *failed = false,
            Kind::CommitAndChain if *failed => *failed = false,
            Kind::CommitAndChain if *open => return commit(exchange, began_open, kinds),
            Kind::CommitAndChain => {}
            Kind::EndPrepared if kinds.len() == 1 && !*open => return ended(exchange),
            // Refused inside a transaction, but for ANALYZE, which writes in it.
            Kind::Repeatable if *open || kinds.len() == 1 => {}
            Kind::Read | Kind::LockingRead | Kind::Write | Kind::CopyIn | Kind::Other if *open => {}
            // The server still waits for data.
            Kind::CopyIn if kinds.len() == 1 && !exchange.copy_ended => {}
            Kind::Opaque if *open && kinds.len() == 1 && began_open => {}
            _ => return Step::InDoubt,
        }
        // An error that was answered ends the exchange's effects inside a transaction.
        if exchange.failed && *open {
            *failed = true;
        }
    }
    Step::Safe
}

/// COMMIT PREPARED and ROLLBACK PREPARED.
fn ended(exchange: &InFlight) -> Step {
    match exchange.ended {
        // The server has refused it.
        _ if exchange.failed => Step::Safe,
        Some(Ended::Yes) => Step::Committed,
        Some(Ended::No) => Step::Safe,
        None => Step::AskPrepared,
        Some(Ended::Unknown) => Step::InDoubt,
    }
}

/// What reads outside a transaction block, without a mark, has to be proven to do only that.
fn by_proof(at: usize, exchange: &InFlight) -> Option<Plan> {
    let kinds = exchange.kinds.as_deref().filter(|_| !exchange.undone)?;
    let reads = |k: &Kind| matches!(k, Kind::Read | Kind::LockingRead);
    let other = |k: &Kind| matches!(k, Kind::Harmless | Kind::Empty);
    if !kinds.iter().any(reads) || !kinds.iter().all(|k| reads(k) || other(k)) {
        return None;
    }
    if at == 0 && exchange.failed {
        return exchange.answered.then_some(Plan::Finish);
    }
    Some(match exchange.only_reads {
        None => Plan::ProveRead { at },
        Some(true) => Plan::Replay,
        Some(false) => Plan::Unknown { at },
    })
}

fn is_copy(exchange: &InFlight) -> bool {
    exchange.kinds.as_deref() == Some(&[Kind::CopyIn])
}

fn is_only_commit(kinds: &[Kind]) -> bool {
    kinds
        .iter()
        .filter(|k| **k != Kind::Empty)
        .all(|k| matches!(k, Kind::Commit | Kind::CommitAndChain))
}

/// A COMMIT in an open transaction: the transaction's id decides. Statements behind the COMMIT in
/// the same exchange would stay unknown.
fn commit(exchange: &InFlight, began_open: bool, kinds: &[Kind]) -> Step {
    let ends = |k: &&Kind| matches!(k, Kind::Commit | Kind::CommitAndChain);
    let last = kinds.iter().rev().find(|k| **k != Kind::Empty);
    if last.filter(ends).is_none() || kinds.iter().filter(ends).count() != 1 {
        return Step::InDoubt;
    }
    match exchange.evidence {
        // What runs in the same exchange was not asked about.
        _ if !began_open => Step::InDoubt,
        Evidence::NothingWritten => Step::Safe,
        Evidence::Known(xid) => Step::Ask(xid),
        Evidence::Unknown => Step::InDoubt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Kind::{
        Begin, Chain, Commit, CommitAndChain, CopyIn, EndPrepared, Harmless, Opaque, Other, Read,
        Repeatable, Rollback, Unread, Write,
    };

    fn flight(kinds: &[Kind], evidence: Evidence) -> InFlight {
        InFlight {
            kinds: Some(kinds.to_vec()),
            commit_answered: false,
            failed: false,
            undone: false,
            evidence,
            answered: false,
            mark: MarkState::None,
            speaks: Speaks::All,
            copy_ended: false,
            only_reads: None,
            ended: None,
        }
    }

    fn plan(status: TxnStatus, in_flight: &[InFlight]) -> Plan {
        decide(&Situation {
            mode: ReplayMode::Transaction,
            status,
            unprotected: None,
            in_flight,
        })
    }

    #[test]
    fn table() {
        use TxnStatus::{Failed, Idle, Open};
        let x = Evidence::Known(Xid(7));
        let none = Evidence::NothingWritten;
        let unknown = Evidence::Unknown;
        let ask = |at| Plan::Resolve { at, xid: Xid(7) };
        let doubt = |at| Plan::Unknown { at };
        type Case<'a> = (TxnStatus, &'a [(&'a [Kind], Evidence)], Plan);
        let cases: &[Case<'_>] = &[
            // idle
            (Idle, &[], Plan::Replay),
            (Idle, &[(&[Begin], unknown)], Plan::Replay),
            (Idle, &[(&[Harmless], unknown)], Plan::Replay),
            (Idle, &[(&[Read], unknown)], Plan::ProveRead { at: 0 }),
            (Idle, &[(&[Read, Write], unknown)], doubt(0)),
            (Idle, &[(&[Write], unknown)], doubt(0)),
            (Idle, &[(&[Opaque], unknown)], doubt(0)),
            (Idle, &[(&[Commit], unknown)], Plan::Replay),
            // open
            (Open, &[], Plan::Replay),
            (Open, &[(&[Write], unknown)], Plan::Replay),
            (Open, &[(&[Opaque], unknown)], Plan::Replay),
            (Open, &[(&[Opaque, Opaque], unknown)], doubt(0)),
            (Open, &[(&[Unread], unknown)], doubt(0)),
            (Open, &[(&[Rollback], unknown)], Plan::Replay),
            (Open, &[(&[Commit], x)], ask(0)),
            (Open, &[(&[Commit], none)], Plan::Replay),
            (Open, &[(&[Commit], unknown)], doubt(0)),
            (Open, &[(&[CommitAndChain], x)], ask(0)),
            (Open, &[(&[CommitAndChain], unknown)], doubt(0)),
            (Failed, &[(&[CommitAndChain], unknown)], Plan::Replay),
            (Open, &[(&[Chain], x)], Plan::Replay),
            (Idle, &[(&[Repeatable], unknown)], Plan::Replay),
            (Idle, &[(&[Repeatable, Write], unknown)], doubt(0)),
            (
                Idle,
                &[(&[EndPrepared], unknown)],
                Plan::FindPrepared { at: 0 },
            ),
            (Idle, &[(&[EndPrepared, Write], unknown)], doubt(0)),
            (Open, &[(&[Write, Commit], x)], ask(0)),
            (Idle, &[(&[Begin, Write, Commit], none)], doubt(0)),
            (Idle, &[(&[Begin, Write, Commit], x)], doubt(0)),
            (Open, &[(&[Commit, Write], x)], doubt(0)),
            (Failed, &[(&[Commit], unknown)], Plan::Replay),
            (
                Failed,
                &[(&[Commit], unknown), (&[Write], unknown)],
                doubt(1),
            ),
            // pipelines
            (
                Idle,
                &[(&[Begin], unknown), (&[Write], unknown)],
                Plan::Replay,
            ),
            (
                Idle,
                &[(&[Begin], unknown), (&[Write], unknown), (&[Commit], x)],
                ask(2),
            ),
            (Open, &[(&[Other], unknown), (&[Commit], x)], ask(1)),
            (
                Open,
                &[(&[Rollback], unknown), (&[Write], unknown)],
                doubt(1),
            ),
        ];
        for (status, in_flight, want) in cases {
            let in_flight: Vec<_> = in_flight.iter().map(|(k, e)| flight(k, *e)).collect();
            let got = plan(*status, &in_flight);
            assert_eq!(&got, want, "{status:?} {in_flight:?}");
        }
    }

    #[test]
    fn an_answered_commit_is_complete_and_nothing_else_is() {
        let mut exchange = flight(&[Commit], Evidence::Unknown);
        exchange.commit_answered = true;
        assert_eq!(
            plan(TxnStatus::Open, std::slice::from_ref(&exchange)),
            Plan::Complete
        );
        exchange.kinds = Some(vec![Commit, Write]);
        assert_eq!(plan(TxnStatus::Open, &[exchange]), Plan::Unknown { at: 0 });
    }

    #[test]
    fn the_end_of_a_prepared_transaction() {
        let asked = |ended| InFlight {
            ended,
            ..flight(&[EndPrepared], Evidence::Unknown)
        };
        for (ended, want) in [
            (None, Plan::FindPrepared { at: 0 }),
            (Some(Ended::Yes), Plan::Complete),
            (Some(Ended::No), Plan::Replay),
            (Some(Ended::Unknown), Plan::Unknown { at: 0 }),
        ] {
            assert_eq!(plan(TxnStatus::Idle, &[asked(ended)]), want, "{ended:?}");
        }
        let refused = InFlight {
            failed: true,
            ..asked(None)
        };
        assert_eq!(plan(TxnStatus::Idle, &[refused]), Plan::Replay);
    }

    #[test]
    fn an_undone_statement_may_run_again() {
        let mut exchange = flight(&[Write], Evidence::Unknown);
        exchange.undone = true;
        assert_eq!(plan(TxnStatus::Idle, &[exchange]), Plan::Replay);
    }

    #[test]
    fn what_was_not_kept_is_not_replayed() {
        let mut exchange = flight(&[], Evidence::Unknown);
        exchange.kinds = None;
        assert_eq!(
            plan(TxnStatus::Idle, &[exchange.clone()]),
            Plan::Unknown { at: 0 }
        );
        exchange.undone = true;
        assert!(matches!(
            plan(TxnStatus::Open, &[exchange]),
            Plan::Abort { .. }
        ));
    }

    #[test]
    fn marks() {
        use MarkState::{Found, Mixed, Sent};
        let marked = |mark, answered, failed| InFlight {
            mark,
            answered,
            failed,
            ..flight(&[Write], Evidence::Unknown)
        };
        let (yes, no) = (Found(Fate::Committed), Found(Fate::NotCommitted));
        let doubt = |at| Plan::Unknown { at };
        let cases: &[(&[InFlight], Plan)] = &[
            (&[marked(Sent, false, false)], Plan::FindMarks),
            (&[marked(no, false, false)], Plan::Replay),
            (&[marked(no, true, false)], Plan::Replay),
            (&[marked(yes, true, false)], Plan::Finish),
            (&[marked(yes, false, false)], Plan::ResultsLost),
            (&[marked(Found(Fate::Unknown), true, false)], doubt(0)),
            (&[marked(Mixed, false, false)], doubt(0)),
            (&[marked(Sent, true, true)], Plan::Finish),
            (
                &[marked(no, false, false), marked(yes, false, false)],
                doubt(1),
            ),
            (
                &[
                    marked(no, false, false),
                    flight(&[Write], Evidence::Unknown),
                ],
                doubt(1),
            ),
            (
                &[marked(no, false, false), marked(no, false, false)],
                Plan::Replay,
            ),
        ];
        for (in_flight, want) in cases {
            assert_eq!(&plan(TxnStatus::Idle, in_flight), want, "{in_flight:?}");
        }
        let copy = flight(&[CopyIn], Evidence::Unknown);
        assert_eq!(
            plan(TxnStatus::Idle, std::slice::from_ref(&copy)),
            Plan::Replay
        );
        let ended = InFlight {
            copy_ended: true,
            ..copy
        };
        assert_eq!(plan(TxnStatus::Idle, &[ended]), doubt(0));
        let read = |only_reads| InFlight {
            only_reads,
            ..flight(&[Harmless, Read], Evidence::Unknown)
        };
        assert_eq!(plan(TxnStatus::Idle, &[read(Some(true))]), Plan::Replay);
        assert_eq!(plan(TxnStatus::Idle, &[read(Some(false))]), doubt(0));
        assert_eq!(
            plan(TxnStatus::Idle, &[read(Some(true)), read(None)]),
            Plan::ProveRead { at: 1 }
        );
        // inside a block nothing commits by itself
        assert_eq!(
            plan(TxnStatus::Open, &[marked(yes, false, false)]),
            Plan::Replay
        );
    }

    #[test]
    fn marks_of_several_transactions() {
        use Inside::{Commits, Nothing, Unknown};
        use MarkState::{Found, Sent};
        use Speaks::{All, Calls, First};
        let (yes, no) = (Found(Fate::Committed), Found(Fate::NotCommitted));
        let doubt = Plan::Unknown { at: 0 };
        let prove = Plan::ProveInside { at: 0 };
        let cases = [
            (First, Sent, false, Plan::FindMarks),
            (First, no, false, Plan::Replay),
            (First, yes, false, Plan::FirstCommitted),
            (First, yes, true, Plan::Finish),
            (All, yes, false, Plan::ResultsLost),
            (Calls(None), Sent, true, Plan::FindMarks),
            (Calls(None), no, false, prove.clone()),
            (Calls(None), yes, true, prove),
            (Calls(Some(Nothing)), no, false, Plan::Replay),
            (Calls(Some(Nothing)), yes, false, Plan::ResultsLost),
            (Calls(Some(Nothing)), yes, true, Plan::Finish),
            (Calls(Some(Commits)), no, false, Plan::Replay),
            (Calls(Some(Commits)), yes, true, Plan::FirstCommitted),
            (Calls(Some(Unknown)), no, false, doubt.clone()),
            (Calls(Some(Unknown)), yes, false, Plan::FirstCommitted),
            (Calls(None), Found(Fate::Unknown), false, doubt),
        ];
        for (speaks, mark, answered, want) in cases {
            let exchange = InFlight {
                mark,
                speaks,
                answered,
                ..flight(&[Opaque], Evidence::Unknown)
            };
            let got = plan(TxnStatus::Idle, &[exchange]);
            assert_eq!(got, want, "{speaks:?} {mark:?} {answered}");
        }
    }

    #[test]
    fn unprotected_and_modes() {
        let mut s = Situation {
            mode: ReplayMode::Transaction,
            status: TxnStatus::Open,
            unprotected: Some("temporary table"),
            in_flight: &[],
        };
        assert!(matches!(decide(&s), Plan::Abort { reason } if reason == "temporary table"));
        s.unprotected = None;
        s.mode = ReplayMode::Session;
        assert!(matches!(decide(&s), Plan::Abort { .. }));
        s.status = TxnStatus::Idle;
        assert_eq!(decide(&s), Plan::Replay);
        s.mode = ReplayMode::None;
        assert_eq!(decide(&s), Plan::Disconnect);
    }

    #[test]
    fn evidence_counts_before_protection() {
        let in_flight = [flight(&[Commit], Evidence::Known(Xid(9)))];
        let s = Situation {
            mode: ReplayMode::Transaction,
            status: TxnStatus::Open,
            unprotected: Some("journal over its limit"),
            in_flight: &in_flight,
        };
        assert_eq!(decide(&s), Plan::Resolve { at: 0, xid: Xid(9) });
    }
}
