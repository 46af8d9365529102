//! The expected-reply queue against generated message sequences.
//!
//! A small model of `PostgresMain` answers random requests with random outcomes. Whatever it says,
//! sent ahead or one at a time, the queue must explain all of it and owe nothing at the end; and no
//! bytes from a server, however wrong, may do more than be refused.

use helios_session::expect::{Expect, ExpectQueue, Explained, Owner};
use proptest::prelude::*;

#[derive(Debug, Clone, Copy)]
struct Request {
    expect: Expect,
    rows: u8,
    outcome: Outcome,
}

#[derive(Debug, Clone, Copy)]
enum Outcome {
    Good,
    Suspended,
    Empty,
    Error,
}

/// What the server answers to one request, and whether it skips to the next Sync afterwards.
fn answer(request: Request, skipping: bool) -> (Vec<u8>, bool) {
    use Expect as E;
    let failed = matches!(request.outcome, Outcome::Error);
    let rows = || std::iter::repeat_n(b'D', request.rows.into());
    let mut out = Vec::new();
    if skipping && request.expect != E::Sync {
        return (out, true);
    }
    match request.expect {
        E::Query => {
            match request.outcome {
                Outcome::Empty => out.push(b'I'),
                Outcome::Good | Outcome::Suspended => {
                    out.push(b'T');
                    out.extend(rows());
                    out.push(b'C');
                }
                Outcome::Error => out.extend(rows().chain([b'E'])),
            }
            out.push(b'Z');
        }
        E::FunctionCall => out.extend([if failed { b'E' } else { b'V' }, b'Z']),
        E::Sync => {
            // A deferred constraint can fail here.
            if failed && !skipping {
                out.push(b'E');
            }
            out.push(b'Z');
        }
        _ if failed => {
            out.push(b'E');
            return (out, true);
        }
        E::Parse => out.push(b'1'),
        E::Bind => out.push(b'2'),
        E::Close => out.push(b'3'),
        E::DescribeStatement => out.extend(*b"tT"),
        E::DescribePortal => out.push(b'n'),
        E::Execute => {
            out.extend(rows());
            out.push(match request.outcome {
                Outcome::Suspended => b's',
                Outcome::Empty => b'I',
                _ => b'C',
            });
        }
        E::CopyEnd => {}
    }
    (out, false)
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    let expect = prop_oneof![
        Just(Expect::Parse),
        Just(Expect::Bind),
        Just(Expect::DescribeStatement),
        Just(Expect::DescribePortal),
        Just(Expect::Execute),
        Just(Expect::Close),
        Just(Expect::Sync),
        Just(Expect::Query),
        Just(Expect::FunctionCall),
    ];
    let outcome = prop_oneof![
        4 => Just(Outcome::Good),
        1 => Just(Outcome::Suspended),
        1 => Just(Outcome::Empty),
        1 => Just(Outcome::Error),
    ];
    let request = (expect, 0_u8..4, outcome).prop_map(|(expect, rows, outcome)| Request {
        expect,
        rows,
        outcome,
    });
    // A client ends with Sync, whatever it sent before.
    prop::collection::vec(request, 0..60).prop_map(|mut all| {
        all.push(Request {
            expect: Expect::Sync,
            rows: 0,
            outcome: Outcome::Good,
        });
        all
    })
}

fn take(queue: &mut ExpectQueue, replies: &[u8], ready: &mut usize) {
    for tag in replies {
        let explained = queue.explain(*tag);
        assert!(explained.is_ok(), "{} is not explained", char::from(*tag));
        *ready += usize::from(
            explained
                == Ok(Explained::Ready {
                    owner: Owner::Client,
                }),
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_a_server_answers_is_explained(requests in requests()) {
        let (mut ahead, mut one_by_one) = (ExpectQueue::default(), ExpectQueue::default());
        let mut skipping = false;
        let mut all = Vec::new();
        let (mut ready_ahead, mut ready_one) = (0, 0);
        for request in &requests {
            ahead.push(request.expect, Owner::Client);
            let (replies, skips) = answer(*request, skipping);
            skipping = skips;
            one_by_one.push(request.expect, Owner::Client);
            take(&mut one_by_one, &replies, &mut ready_one);
            prop_assert_eq!(one_by_one.awaits_sync(), skipping);
            all.extend(replies);
        }
        take(&mut ahead, &all, &mut ready_ahead);
        prop_assert!(ahead.is_empty() && one_by_one.is_empty());
        let cycles = all.iter().filter(|t| **t == b'Z').count();
        prop_assert_eq!((ready_ahead, ready_one), (cycles, cycles));
    }

    #[test]
    fn nonsense_is_refused_and_nothing_else(
        requests in requests(),
        replies in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut queue = ExpectQueue::default();
        for request in &requests {
            queue.push(request.expect, Owner::Client);
        }
        let before = queue.len();
        for tag in replies {
            let _ = queue.explain(tag);
        }
        prop_assert!(queue.len() <= before);
    }
}
