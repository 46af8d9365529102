use super::*;

fn name(n: &str) -> InstanceName {
    n.parse().unwrap()
}

fn set(names: &[&str]) -> BTreeSet<InstanceName> {
    names.iter().map(|n| name(n)).collect()
}

fn terms(version: u64, rule: Rule) -> Terms {
    Terms {
        version,
        rule,
        hold_ms: 3_000,
    }
}

#[test]
fn a_grant_counts_from_its_ask_however_late_it_comes() {
    let mut lease = Tenancy::default();
    assert!(!lease.expired(0), "one that never had a lease is free");
    lease.ask(7, 1_000);
    assert!(lease.grant(&terms(1, Rule::Any(set(&["b"]))), 7, 2_900));
    assert!(!lease.expired(3_999));
    assert!(lease.expired(4_000));
    // The same again, and one that was never asked for, change nothing.
    assert!(!lease.grant(&terms(1, Rule::Free), 7, 4_000));
    assert!(!lease.grant(&terms(1, Rule::Free), 8, 3_000));
    assert!(lease.expired(4_000));
}

#[test]
fn terms_are_never_gone_back_to() {
    let mut lease = Tenancy::default();
    lease.ask(1, 0);
    lease.grant(&terms(2, Rule::Any(set(&["b"]))), 1, 10);
    lease.grant(&terms(1, Rule::Free), 1, 20);
    assert_eq!(lease.version(), Some(2));
    assert!(lease.expired(3_000));
    lease.ask(2, 4_000);
    lease.grant(&terms(3, Rule::Free), 2, 4_010);
    assert!(!lease.expired(1 << 40));
}

#[test]
fn who_has_to_confirm_is_in_the_terms() {
    // (rule, what b and c confirmed, until when it holds)
    let cases = [
        (Rule::Any(set(&["b", "c"])), vec![("b", 2_000)], 5_000),
        (Rule::All(set(&["b", "c"])), vec![("b", 2_000)], 3_000),
        (
            Rule::All(set(&["b", "c"])),
            vec![("c", 1_000), ("b", 2_000)],
            4_000,
        ),
        (Rule::Any(set(&["b"])), vec![("c", 2_000)], 3_000),
    ];
    for (rule, confirmed, until) in cases {
        let mut lease = Tenancy::default();
        lease.ask(1, 0);
        lease.grant(&terms(1, rule.clone()), 1, 0);
        for (number, (standby, at)) in (1..).zip(confirmed) {
            lease.written(Lsn(number), at);
            lease.flushed(&name(standby), Lsn(number));
        }
        assert!(!lease.expired(until - 1), "{rule:?}");
        assert!(lease.expired(until), "{rule:?}");
    }
}

#[test]
fn what_was_flushed_before_the_record_proves_nothing() {
    let mut lease = Tenancy::default();
    lease.ask(1, 0);
    lease.grant(&terms(1, Rule::Any(set(&["b"]))), 1, 0);
    assert!(!lease.wants_proof(1_000));
    assert!(lease.wants_proof(1_001));
    lease.written(Lsn(100), 1_500);
    lease.flushed(&name("b"), Lsn(99));
    assert!(lease.expired(3_000));
    lease.flushed(&name("b"), Lsn(100));
    assert!(!lease.expired(4_499));
    assert!(lease.expired(4_500));
}

#[test]
fn every_margin_covers_a_guard_and_two_clocks() {
    for hold in [1_000, 3_000, 60_000, 600_000] {
        let margin = wait_ms(hold) - hold;
        // A clock that is slow by a thousandth, and 100 ms for the guard.
        assert!(margin > hold / 1_000 + 100, "{hold}");
    }
}
