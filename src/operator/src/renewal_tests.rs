//! The table of what is renewed, when, and in which order.

use super::*;

const NOW: i64 = 1_900_000_000;
const TERMS: Terms = Terms {
    life: 90 * DAY,
    before: None,
};
/// As certificates were made before any was renewed: 2020 to 2049.
const OLD: Span = Span {
    from: 1_577_836_800,
    until: 2_524_521_600,
};

/// Made so many days ago, valid for so many in all.
fn span(ago: i64, days: i64) -> Span {
    Span {
        from: NOW - ago * DAY,
        until: NOW + (days - ago) * DAY,
    }
}

fn authority(valid: Span) -> Authority {
    Authority {
        valid,
        ours: true,
        issues: true,
        next: None,
        former: Vec::new(),
        asked: false,
        stuck: false,
    }
}

fn announced(valid: Span, trusted: Option<i64>) -> Authority {
    let next = Next {
        valid: span(2, 3650),
        trusted,
        believed: None,
    };
    Authority {
        next: Some(next),
        ..authority(valid)
    }
}

/// The same when all programs were asked.
fn believes(mut authority: Authority, believed: bool) -> Authority {
    if let Some(next) = &mut authority.next {
        next.believed = Some(believed);
    }
    authority
}

fn leaf(valid: Span) -> Holder {
    holder(Leaf::Held {
        valid,
        current: true,
    })
}

fn holder(leaf: Leaf) -> Holder {
    Holder {
        leaf,
        believes: Believes::Same,
        ours: true,
        reloads: true,
        asked: false,
        stuck: false,
    }
}

fn fresh() -> Holder {
    leaf(span(0, 90))
}

#[track_caller]
fn decides(what: &str, authority: &Authority, holders: &[Holder], expected: Option<Step>) {
    let done = match decide(TERMS, authority, holders, NOW) {
        Decision::Do(step) => Some(step),
        Decision::Rest { .. } => None,
    };
    assert_eq!(done, expected, "{what}");
}

#[test]
fn a_certificate_is_renewed_when_its_end_is_near() {
    let young = authority(span(0, 3650));
    let old_program = |valid| Holder {
        reloads: false,
        ..leaf(valid)
    };
    let issue = |why| Some(Step::Issue(1, why));
    let replaced = Leaf::Held {
        valid: span(0, 90),
        current: false,
    };
    let others = Holder {
        ours: false,
        ..leaf(span(89, 90))
    };
    let asked = Holder {
        asked: true,
        ..fresh()
    };
    let asked_in_vain = Holder {
        asked: true,
        ..old_program(OLD)
    };
    let stuck = Holder {
        stuck: true,
        ..leaf(span(89, 90))
    };
    for (what, second, expected) in [
        ("fresh", fresh(), None),
        ("a day before its time", leaf(span(59, 90)), None),
        ("a third is left", leaf(span(60, 90)), issue(Why::Ends)),
        ("ended", leaf(span(95, 90)), issue(Why::Ends)),
        ("none", holder(Leaf::Missing), issue(Why::Missing)),
        ("broken", holder(Leaf::Broken), issue(Why::Broken)),
        (
            "another authority's",
            holder(replaced),
            issue(Why::Replaced),
        ),
        ("asked for", asked, issue(Why::Asked)),
        ("asked for, and not read again", asked_in_vain, None),
        ("valid for too long", leaf(OLD), issue(Why::TooLong)),
        ("too long, and not read again", old_program(OLD), None),
        (
            "not read again, but at its end",
            old_program(span(80, 90)),
            issue(Why::Ends),
        ),
        ("somebody else's", others, None),
        ("could not be written", stuck, None),
    ] {
        decides(what, &young, &[fresh(), second], expected);
    }
}

#[test]
fn the_spec_says_when_its_end_is_near() {
    let young = authority(span(0, 3650));
    let terms = Terms {
        life: 30 * DAY,
        before: Some(10 * DAY),
    };
    for (age, step) in [
        (19, None),
        (20, Some(Step::Issue(0, Why::Ends))),
        (29, Some(Step::Issue(0, Why::Ends))),
    ] {
        let done = decide(terms, &young, &[leaf(span(age, 30))], NOW);
        match (done, step) {
            (Decision::Do(done), Some(step)) => assert_eq!(done, step, "{age}"),
            (Decision::Rest { again, .. }, None) => assert_eq!(again, NOW + DAY, "{age}"),
            other => panic!("{age}: {other:?}"),
        }
    }
    // A spec with a shorter life counts at once.
    let done = decide(terms, &young, &[fresh()], NOW);
    assert_eq!(done, Decision::Do(Step::Issue(0, Why::TooLong)));
    let spec = Certificates {
        duration_days: 30,
        renew_before_days: Some(10),
    };
    assert_eq!(Terms::of(&spec), terms);
}

/// No certificate outlives its authority: near its end nothing is issued again and again.
#[test]
fn what_brings_no_time_is_not_done() {
    let ends = Authority {
        ours: false,
        ..authority(span(3640, 3650))
    };
    let until = ends.valid.until;
    let capped = Span {
        from: NOW - 50 * DAY,
        until,
    };
    decides("it ends with its authority", &ends, &[leaf(capped)], None);
    let shorter = Span {
        from: NOW - 50 * DAY,
        until: until - 2 * DAY,
    };
    let step = Step::Issue(0, Why::Ends);
    decides("two more days", &ends, &[leaf(shorter)], Some(step));
}

#[test]
fn an_authority_is_replaced_in_steps() {
    let less = Holder {
        believes: Believes::Less,
        ..fresh()
    };
    let more = Holder {
        believes: Believes::More,
        ..fresh()
    };
    let others = Holder {
        ours: false,
        ..less.clone()
    };
    let near_end = span(2434, 3650);
    let all = || vec![fresh(), fresh()];
    let told = |days: i64| announced(near_end, Some(NOW - days * DAY));
    let seen = |believed| believes(told(1), believed);
    for (what, authority, holders, expected) in [
        ("young", authority(span(2400, 3650)), all(), None),
        (
            "a third is left",
            authority(near_end),
            all(),
            Some(Step::Announce(Why::Ends)),
        ),
        (
            "announced, but one does not know",
            announced(near_end, None),
            vec![fresh(), less.clone()],
            Some(Step::Tell(1)),
        ),
        (
            "everybody has been told",
            announced(near_end, None),
            all(),
            Some(Step::Trusted),
        ),
        ("not for long enough", told(0), all(), None),
        ("for a day", told(1), all(), Some(Step::Ask)),
        ("all believe it", seen(true), all(), Some(Step::Promote)),
        ("one does not", seen(false), all(), None),
        (
            "for a day, but one has been told less since",
            told(1),
            vec![fresh(), less],
            Some(Step::Tell(1)),
        ),
        (
            "somebody else's Secret does not believe it",
            announced(near_end, None),
            vec![fresh(), others],
            None,
        ),
        (
            "more than there is to believe",
            authority(span(0, 3650)),
            vec![more],
            Some(Step::Tell(0)),
        ),
    ] {
        decides(what, &authority, &holders, expected);
    }
    let former = |end| Authority {
        former: vec![end],
        ..authority(span(0, 3650))
    };
    decides("still valid", &former(NOW + 1), &all(), None);
    decides("ended", &former(NOW), &all(), Some(Step::Forget));
}

#[test]
fn an_authority_is_replaced_for_other_reasons_too() {
    let asked = Authority {
        asked: true,
        ..authority(span(0, 3650))
    };
    let others = Authority {
        ours: false,
        ..authority(span(3640, 3650))
    };
    let stuck = Authority {
        stuck: true,
        ..authority(span(3640, 3650))
    };
    // It lay there for years, because no operator was there.
    let forgotten = Authority {
        next: Some(Next {
            valid: span(3000, 3650),
            trusted: None,
            believed: None,
        }),
        ..authority(span(3640, 3650))
    };
    let ended = announced(span(3660, 3650), Some(NOW));
    let keyless = Authority {
        issues: false,
        ..authority(span(0, 3650))
    };
    let announce = |why| Some(Step::Announce(why));
    for (what, authority, expected) in [
        ("asked for", &asked, announce(Why::Asked)),
        ("somebody else's", &others, None),
        ("could not be written", &stuck, None),
        ("it has another one's key", &keyless, announce(Why::Broken)),
        ("old before it was used", &forgotten, announce(Why::Ends)),
        ("ended: nothing to wait for", &ended, Some(Step::Promote)),
    ] {
        decides(what, authority, &[fresh()], expected);
    }
}

/// Nothing is made that nobody would believe.
#[test]
fn an_authority_without_its_key_issues_nothing() {
    let keyless = Authority {
        issues: false,
        stuck: true,
        ..authority(span(0, 3650))
    };
    for due in [leaf(span(80, 90)), holder(Leaf::Broken)] {
        decides("it cannot", &keyless, &[due], None);
    }
    let step = Step::Issue(0, Why::Missing);
    let missing = [holder(Leaf::Missing)];
    decides("said when it is tried", &keyless, &missing, Some(step));
}

/// Programs that read their certificates once go on with what they have read.
#[test]
fn an_old_cluster_comes_along_when_its_programs_do() {
    let old_program = Holder {
        reloads: false,
        ..leaf(OLD)
    };
    let mixed = [leaf(span(0, 90)), old_program.clone()];
    decides("one is old", &authority(OLD), &mixed, None);
    let announced = announced(OLD, Some(NOW - 2 * DAY));
    decides("one is old, announced before", &announced, &mixed, None);
    let all_new = [fresh(), fresh()];
    let step = Some(Step::Announce(Why::TooLong));
    decides("all are new", &authority(OLD), &all_new, step);
    decides("for a day", &announced, &all_new, Some(Step::Ask));
    // Those that are new get short certificates of the old authority until then.
    let first = [leaf(OLD), old_program];
    let step = Some(Step::Issue(0, Why::TooLong));
    decides("the new ones first", &authority(OLD), &first, step);
}

#[test]
fn it_looks_again_when_the_next_thing_is_due() {
    let rest =
        |authority: &Authority, holders: &[Holder]| match decide(TERMS, authority, holders, NOW) {
            Decision::Rest { again, first_end } => ((again - NOW), (first_end - NOW) / DAY),
            other => panic!("{other:?}"),
        };
    let young = authority(span(0, 3650));
    assert_eq!(
        rest(&young, &[leaf(span(0, 90)), leaf(span(50, 90))]),
        (10 * DAY, 40)
    );
    let former = Authority {
        former: vec![NOW + 5],
        ..young.clone()
    };
    assert_eq!(rest(&former, &[fresh()]), (5, 90));
    let waits = announced(span(2500, 3650), Some(NOW - 3600));
    assert_eq!(rest(&waits, &[fresh()]), (DAY - 3600, 90));
    let doubted = announced(span(2500, 3650), Some(NOW - DAY));
    let doubted = believes(doubted, false);
    assert_eq!(rest(&doubted, &[fresh()]), (60, 90));
    let stuck = Holder {
        stuck: true,
        ..leaf(span(80, 90))
    };
    assert_eq!(rest(&young, &[stuck]), (60, 10));
}

/// From a young cluster on, through three authorities: a certificate is never issued by one that was
/// not believed by all for a day, and nothing ends before it is replaced.
#[test]
fn many_years_pass() {
    let mut authority = authority(Span::of(NOW, AUTHORITY_LIFE));
    let mut holders = vec![fresh(), fresh(), fresh()];
    let (mut now, mut promoted, mut steps) = (NOW, 0, 0);
    while now < NOW + 29 * 365 * DAY {
        match decide(TERMS, &authority, &holders, now) {
            Decision::Rest { again, first_end } => {
                assert!(again > now && first_end > now, "{authority:?}");
                // A third of its life at the least.
                assert!(first_end >= now + 29 * DAY, "{authority:?} {holders:?}");
                now = again;
            }
            Decision::Do(step) => {
                steps += 1;
                promoted += u32::from(step == Step::Promote);
                carry_out(step, &mut authority, &mut holders, now);
            }
        }
        assert!(steps < 5_000, "it never rests");
    }
    assert_eq!(promoted, 4);
    // The last one is still believed, beside the one in use.
    assert_eq!(authority.former.len(), 1);
}

fn carry_out(step: Step, authority: &mut Authority, holders: &mut [Holder], now: i64) {
    match step {
        Step::Forget => authority.former.retain(|end| *end > now),
        Step::Announce(_) => {
            authority.next = Some(Next {
                valid: Span::of(now, AUTHORITY_LIFE),
                trusted: None,
                believed: None,
            });
        }
        Step::Trusted => {
            assert!(holders.iter().all(|h| h.believes == Believes::Same));
            authority.next.as_mut().unwrap().trusted = Some(now);
        }
        Step::Ask => authority.next.as_mut().unwrap().believed = Some(true),
        Step::Promote => {
            let next = authority.next.take().unwrap();
            assert_eq!(next.believed, Some(true));
            assert!(now >= next.trusted.unwrap() + TRUST_FIRST);
            authority.former.push(authority.valid.until);
            authority.valid = next.valid;
            for holder in holders.iter_mut() {
                if let Leaf::Held { current, .. } = &mut holder.leaf {
                    *current = false;
                }
            }
        }
        Step::Tell(number) => holders[number].believes = Believes::Same,
        Step::Issue(number, _) => {
            holders[number].leaf = Leaf::Held {
                valid: Span::of(now, TERMS.life).within(authority.valid),
                current: true,
            };
            holders[number].believes = Believes::Same;
        }
    }
    if matches!(step, Step::Announce(_)) {
        holders.iter_mut().for_each(|h| h.believes = Believes::Less);
    }
    if step == Step::Forget {
        holders.iter_mut().for_each(|h| h.believes = Believes::More);
    }
}
