//! Orders by hand, then many proxies with many fates, judged by what they would do to sequences.

use super::*;

const STANDS: Answer = Answer::Gathered(Gathered {
    wants_turn: false,
    has_worked: false,
});
const WANTS: Answer = Answer::Gathered(Gathered {
    wants_turn: true,
    has_worked: false,
});
const WORKED: Answer = Answer::Gathered(Gathered {
    wants_turn: true,
    has_worked: true,
});

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

fn at(millis: u64) -> Time {
    Time(0).plus_millis(millis)
}

fn to(proxies: &[&str], order: Order) -> Orders {
    proxies.iter().map(|p| ((*p).to_owned(), order)).collect()
}

fn advance(proxies: &[&str], stage: Stage) -> Orders {
    to(proxies, Order::Advance(stage))
}

#[test]
fn nobody_goes_on_before_all_have_come_as_far() {
    let (mut barrier, orders) = Barrier::begin(names(&["a", "b"]), true, at(0));
    assert_eq!(orders, to(&["a", "b"], Order::Gather));
    assert_eq!(barrier.answered("b", Order::Gather, STANDS, at(1)), []);
    let mut orders = barrier.answered("a", Order::Gather, STANDS, at(2));
    for (now, stage) in [Stage::Replayed, Stage::Sent, Stage::Open]
        .into_iter()
        .enumerate()
    {
        assert_eq!(orders, advance(&["a", "b"], stage));
        let order = Order::Advance(stage);
        let now = at(10 + now as u64);
        assert_eq!(barrier.answered("a", order, Answer::Done, now), []);
        orders = barrier.answered("b", order, Answer::Done, now);
    }
    assert_eq!(orders, []);
    assert!(barrier.is_over());
}

#[test]
fn turns_come_one_after_the_other_and_before_all_replays() {
    let (mut barrier, _) = Barrier::begin(names(&["a", "b", "c"]), true, at(0));
    barrier.answered("c", Order::Gather, WANTS, at(1));
    barrier.answered("b", Order::Gather, STANDS, at(1));
    let turn = Order::Advance(Stage::Turn);
    assert_eq!(
        barrier.answered("a", Order::Gather, WANTS, at(2)),
        advance(&["c"], Stage::Turn)
    );
    assert_eq!(
        barrier.answered("c", turn, Answer::Done, at(3)),
        advance(&["a"], Stage::Turn)
    );
    assert_eq!(
        barrier.answered("a", turn, Answer::Done, at(4)),
        advance(&["a", "b", "c"], Stage::Replayed)
    );
}

#[test]
fn who_has_a_turn_and_is_lost_is_waited_for_until_it_must_be_over() {
    for answer in [None, Some(Answer::Failed)] {
        let (mut barrier, _) = Barrier::begin(names(&["a", "b"]), true, at(0));
        barrier.answered("a", Order::Gather, WANTS, at(1));
        barrier.answered("b", Order::Gather, WANTS, at(5));
        if let Some(answer) = answer {
            let order = Order::Advance(Stage::Turn);
            assert_eq!(barrier.answered("a", order, answer, at(6)), []);
        }
        assert_eq!(barrier.look(at(5 + TURNS_MS - 1)), []);
        // Nobody is given one behind that.
        assert_eq!(
            barrier.look(at(5 + TURNS_MS)),
            advance(&["b"], Stage::Replayed)
        );
    }
}

#[test]
fn nobody_has_a_turn_beside_work() {
    // One has let work in already; or there is another one, of which nothing is known here.
    for (answer, all) in [(WORKED, true), (WANTS, false)] {
        let (mut barrier, _) = Barrier::begin(names(&["a", "b"]), all, at(0));
        barrier.answered("a", Order::Gather, WANTS, at(1));
        assert_eq!(
            barrier.answered("b", Order::Gather, answer, at(2)),
            advance(&["a", "b"], Stage::Replayed)
        );
    }
}

#[test]
fn who_stands_too_late_goes_on_alone_and_without_a_turn() {
    let (mut barrier, _) = Barrier::begin(names(&["a", "b"]), true, at(0));
    barrier.answered("a", Order::Gather, STANDS, at(1));
    assert_eq!(barrier.look(at(GATHER_MS - 1)), []);
    assert_eq!(
        barrier.look(at(GATHER_MS)),
        advance(&["a"], Stage::Replayed)
    );
    assert_eq!(
        barrier.answered("b", Order::Gather, WANTS, at(GATHER_MS + 1)),
        advance(&["b"], Stage::Open)
    );
    let open = Order::Advance(Stage::Open);
    barrier.answered("b", open, Answer::Done, at(GATHER_MS + 9));
    assert!(!barrier.is_over());
    assert_eq!(barrier.stage(), Stage::Replayed);
}

#[test]
fn who_replays_for_too_long_holds_nobody_up_beyond_the_limit() {
    let (mut barrier, _) = Barrier::begin(names(&["a", "b"]), true, at(0));
    barrier.answered("a", Order::Gather, STANDS, at(1));
    barrier.answered("b", Order::Gather, STANDS, at(1));
    let replayed = Order::Advance(Stage::Replayed);
    barrier.answered("a", replayed, Answer::Done, at(2));
    assert_eq!(
        barrier.look(at(1 + REPLAY_MS)),
        advance(&["a"], Stage::Sent)
    );
    // When it is through it goes on by itself.
    assert_eq!(
        barrier.answered("b", replayed, Answer::Done, at(2 + REPLAY_MS)),
        advance(&["b"], Stage::Open)
    );
}

/// A proxy of the model.
#[derive(Debug, Clone, Copy, Default)]
struct Proxy {
    gathered: Option<u64>,
    /// Until when it may set sequences back.
    turn_until: Option<u64>,
    replays: bool,
}

/// What a seed makes of everything.
struct Seed(u64);

impl Seed {
    fn below(&mut self, limit: u64) -> u64 {
        // xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Commands and answers are late or lost, proxies go on by themselves; whoever has a turn is alone.
fn run(seed: u64) -> usize {
    let mut seed = Seed(seed);
    let count = 2 + seed.below(3);
    let all: Vec<String> = (0..count).map(|n| n.to_string()).collect();
    let mut proxies = vec![Proxy::default(); all.len()];
    let (mut barrier, orders) = Barrier::begin(all, true, at(0));
    // (when, proxy, order, `None`: on its way to the proxy).
    let mut post: Vec<(u64, String, Order, Option<Answer>)> = Vec::new();
    let late = |seed: &mut Seed| match seed.below(8) {
        0 => seed.below(9_000),
        _ => 1 + seed.below(20),
    };
    let send = |post: &mut Vec<_>, seed: &mut Seed, now: u64, orders: Orders| {
        for (proxy, order) in orders {
            post.push((now + late(seed), proxy, order, None));
        }
    };
    send(&mut post, &mut seed, 0, orders);
    let mut turns = 0;
    for now in 0..40_000_u64 {
        let (due, rest) = post.into_iter().partition(|(at, ..)| *at <= now);
        post = rest;
        let due: Vec<_> = due;
        for (_, name, order, answer) in due {
            if let Some(answer) = answer {
                let orders = barrier.answered(&name, order, answer, at(now));
                send(&mut post, &mut seed, now, orders);
                continue;
            }
            let proxy = &mut proxies[name.parse::<usize>().unwrap()];
            let mut took = 1 + seed.below(30);
            let answer = match order {
                Order::Gather => {
                    proxy.gathered = Some(now);
                    let wants_turn = seed.below(2) == 0;
                    Answer::Gathered(Gathered {
                        wants_turn,
                        has_worked: false,
                    })
                }
                Order::Advance(Stage::Turn) if !proxy.replays => {
                    let until = proxy.gathered.unwrap() + TURNS_MS;
                    proxy.turn_until = (until > now).then_some(until);
                    took = took.min(until.saturating_sub(now));
                    turns += usize::from(until > now);
                    Answer::Done
                }
                Order::Advance(_) => {
                    proxy.replays = true;
                    Answer::Done
                }
            };
            let lost = seed.below(12) == 0;
            let answer = if lost { Answer::Failed } else { answer };
            if !lost && order == Order::Advance(Stage::Turn) {
                // It gives its turn back with the answer.
                proxy.turn_until = proxy.turn_until.map(|until| until.min(now + took));
            }
            post.push((now + took + late(&mut seed), name, order, Some(answer)));
        }
        let orders = barrier.look(at(now));
        send(&mut post, &mut seed, now, orders);
        for proxy in &mut proxies {
            let alone = proxy.gathered.is_some_and(|g| now >= g + PATIENCE_MS);
            proxy.replays |= alone;
            proxy.turn_until = proxy
                .turn_until
                .filter(|until| *until > now && !proxy.replays);
        }
        let holders = proxies.iter().filter(|p| p.turn_until.is_some()).count();
        let replay = proxies.iter().any(|p| p.replays);
        assert!(
            holders <= 1 && (holders == 0 || !replay),
            "{now}: {proxies:?}"
        );
    }
    assert!(post.is_empty());
    assert!(barrier.is_over(), "{barrier:?}");
    turns
}

#[test]
fn whoever_has_a_turn_is_alone() {
    let turns: usize = (1..400_u64).map(|seed| run(seed * 0x9e37_79b9)).sum();
    assert!(turns > 100, "{turns}");
}
