//! For each anomaly a history by hand that has it, and one close to it that has not.

use super::*;
use crate::chaos::history::Level;

/// `a1` appends 1 to list 0; `r:1,2` reads; list 1 is written `b3` and `s:3`.
fn op(text: &str, sent: u64) -> Op {
    let (name, rest) = text.split_at(1);
    let numbers = || rest[1..].split(',').filter(|n| !n.is_empty());
    let key = |first: &str| Key::from(name != first);
    match name {
        "a" | "b" => Op::Append {
            key: key("a"),
            value: rest.parse().unwrap(),
        },
        _ => Op::Read {
            key: key("r"),
            list: numbers().map(|n| n.parse().unwrap()).collect(),
            sent,
        },
    }
}

/// All transactions run side by side unless a test says otherwise.
fn txn(id: u64, outcome: Outcome, ops: &str) -> Txn {
    Txn {
        id,
        client: 0,
        level: Level::Serializable,
        ops: ops.split_whitespace().map(|o| op(o, 0)).collect(),
        outcome,
        began: 0,
        ended: 100,
    }
}

fn ok(id: u64, ops: &str) -> Txn {
    txn(id, Outcome::Ok, ops)
}

fn kinds(txns: &[Txn], a: &[Value], b: &[Value]) -> Vec<Anomaly> {
    let last = Final::from([(0, a.to_vec()), (1, b.to_vec())]);
    let mut kinds: Vec<_> = check(txns, &last).iter().map(|f| f.anomaly).collect();
    kinds.dedup();
    kinds
}

#[test]
fn a_serial_history_is_clean() {
    let txns = [
        ok(1, "a1 b2"),
        ok(2, "r:1 a3 r:1,3 s:2"),
        ok(3, "r:1,3 s:2"),
    ];
    assert_eq!(kinds(&txns, &[1, 3], &[2]), []);
}

#[test]
fn lost_doubled_garbage_and_torn() {
    assert_eq!(kinds(&[ok(1, "a1")], &[], &[]), [Anomaly::Lost]);
    assert_eq!(kinds(&[ok(1, "a1")], &[1, 1], &[]), [Anomaly::Duplicate]);
    assert_eq!(kinds(&[ok(1, "a1")], &[1, 9], &[]), [Anomaly::Garbage]);
    assert_eq!(kinds(&[ok(1, "a1 b2")], &[1], &[]), [Anomaly::Fractured]);
    let unknown = txn(1, Outcome::Unknown, "a1 b2");
    assert_eq!(
        kinds(std::slice::from_ref(&unknown), &[1], &[]),
        [Anomaly::Fractured]
    );
    assert_eq!(kinds(std::slice::from_ref(&unknown), &[1], &[2]), []);
    assert_eq!(kinds(&[unknown], &[], &[]), []);
}

#[test]
fn failed_but_present_and_aborted_read() {
    let failed = txn(1, Outcome::Failed, "a1");
    assert_eq!(kinds(std::slice::from_ref(&failed), &[], &[]), []);
    assert_eq!(
        kinds(std::slice::from_ref(&failed), &[1], &[]),
        [Anomaly::FailedButPresent]
    );
    assert_eq!(kinds(&[failed, ok(2, "r:1")], &[], &[]), [Anomaly::G1a]);
}

#[test]
fn an_unknown_one_that_was_read_must_stay() {
    let unknown = txn(1, Outcome::Unknown, "a1");
    assert_eq!(kinds(&[unknown.clone(), ok(2, "r:1")], &[1], &[]), []);
    assert_eq!(kinds(&[unknown, ok(2, "r:1")], &[], &[]), [Anomaly::Lost]);
}

#[test]
fn intermediate_reads() {
    let writer = ok(1, "a1 a2");
    assert_eq!(kinds(&[writer.clone(), ok(2, "r:1,2")], &[1, 2], &[]), []);
    let found = kinds(&[writer, ok(2, "r:1")], &[1, 2], &[]);
    assert!(found.contains(&Anomaly::G1b), "{found:?}");
}

#[test]
fn orders_that_do_not_agree() {
    let txns = [ok(1, "a1"), ok(2, "a2"), ok(3, "r:2,1")];
    let found = kinds(&txns, &[1, 2], &[]);
    assert!(found.contains(&Anomaly::IncompatibleOrder), "{found:?}");
    let txns = [ok(1, "a1"), ok(2, "a2"), ok(3, "r:1")];
    assert_eq!(kinds(&txns, &[1, 2], &[]), []);
}

#[test]
fn internal_consistency() {
    let bad = |level, ops| {
        let mut one = ok(1, ops);
        one.level = level;
        contradiction(&one, 0).is_some()
    };
    for level in Level::ALL {
        assert!(bad(level, "a1 r:"), "own write not seen, {level:?}");
        assert!(bad(level, "a1 r:1,5"), "somebody behind a lock, {level:?}");
        assert!(
            bad(level, "a1 r:1 a2 r:2"),
            "changed under a lock, {level:?}"
        );
        assert!(!bad(level, "r:7 a1 r:7,1 a2 r:7,1,2"), "{level:?}");
        // Reads may differ between statements, but not within a snapshot.
        assert_eq!(bad(level, "r:7 r:7,8"), level.is_snapshot());
        assert_eq!(bad(level, "r:7 a1 r:7,8,1"), level.is_snapshot());
    }
}

#[test]
fn stale_reads() {
    let mut writer = ok(1, "a1");
    writer.ended = 10;
    let mut reader = ok(2, "r:");
    (reader.began, reader.ended) = (11, 20);
    let found = kinds(&[writer.clone(), reader.clone()], &[1], &[]);
    assert_eq!(found, [Anomaly::StaleRead]);
    // A snapshot that was taken before may miss it, whenever the statement was sent.
    reader.began = 9;
    reader.ops = vec![op("r:", 15)];
    assert_eq!(kinds(&[writer.clone(), reader.clone()], &[1], &[]), []);
    reader.level = Level::ReadCommitted;
    assert_eq!(kinds(&[writer, reader], &[1], &[]), [Anomaly::StaleRead]);
}

#[test]
fn write_cycle() {
    let txns = [ok(1, "a1 b1"), ok(2, "a2 b2")];
    assert_eq!(kinds(&txns, &[1, 2], &[1, 2]), []);
    assert_eq!(kinds(&txns, &[1, 2], &[2, 1]), [Anomaly::G0]);
}

#[test]
fn circular_information_flow() {
    let txns = [ok(1, "a1 s:2"), ok(2, "b2 r:1")];
    assert_eq!(kinds(&txns, &[1], &[2]), [Anomaly::G1c]);
    let found = kinds(&[ok(1, "a1 s:2"), ok(2, "b2")], &[1], &[2]);
    assert_eq!(found, []);
}

#[test]
fn read_skew() {
    // The reader sees the first write of the other one and misses the second.
    let txns = [ok(1, "a1 b2"), ok(2, "r:1 s:")];
    assert_eq!(kinds(&txns, &[1], &[2]), [Anomaly::GSingle]);
    let txns = [ok(1, "a1 b2"), ok(2, "r: s:")];
    assert_eq!(kinds(&txns, &[1], &[2]), []);
}

#[test]
fn lost_update() {
    let txns = [ok(1, "r: a1"), ok(2, "r: a2")];
    assert_eq!(kinds(&txns, &[1, 2], &[]), [Anomaly::LostUpdate]);
    let txns = [ok(1, "r: a1"), ok(2, "r:1 a2")];
    assert_eq!(kinds(&txns, &[1, 2], &[]), []);
}

#[test]
fn write_skew() {
    let txns = [ok(1, "r: b1"), ok(2, "s: a2")];
    assert_eq!(kinds(&txns, &[2], &[1]), [Anomaly::G2Item]);
    let txns = [ok(1, "r: b1"), ok(2, "s:1 a2")];
    assert_eq!(kinds(&txns, &[2], &[1]), []);
}

#[test]
fn levels_forbid_what_they_should() {
    let forbidden_at = |level, mut txns: Vec<Txn>, a: &[Value], b: &[Value]| {
        txns.iter_mut().for_each(|t| t.level = level);
        let last = Final::from([(0, a.to_vec()), (1, b.to_vec())]);
        !forbidden(&txns, &last).is_empty()
    };
    for level in Level::ALL {
        let skew = vec![ok(1, "r: b1"), ok(2, "s: a2")];
        assert_eq!(
            forbidden_at(level, skew, &[2], &[1]),
            level == Level::Serializable
        );
        let lost = vec![ok(1, "r: a1"), ok(2, "r: a2")];
        assert_eq!(forbidden_at(level, lost, &[1, 2], &[]), level.is_snapshot());
        let cycle = vec![ok(1, "a1 b1"), ok(2, "a2 b2")];
        assert!(forbidden_at(level, cycle, &[1, 2], &[2, 1]));
    }
}

#[test]
fn the_history_of_a_cycle_is_shown() {
    let txns = [ok(1, "r: b1"), ok(2, "s: a2"), ok(3, "r:2")];
    let last = Final::from([(0, vec![2]), (1, vec![1])]);
    let text = check(&txns, &last)[0].to_string();
    assert!(text.contains("T1 (client 0"), "{text}");
    assert!(
        text.contains("T1 read list 0 without what T2 appended next"),
        "{text}"
    );
    assert!(!text.contains("T3 ("), "{text}");
}
