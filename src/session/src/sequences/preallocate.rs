//! Values of sequences that a backend takes in one go, before a long transaction runs again on it.
//!
//! Pure. PostgreSQL keeps values that a session has taken ahead in that session's memory (`CACHE` of
//! CREATE SEQUENCE, `SeqTable` in `src/backend/commands/sequence.c`); `nextval` gives them out one by
//! one and touches nothing shared. A backend that has all values from the first that its client saw
//! to the last needs nobody to wait while it runs the transaction again. Values in between that the
//! client did not see are passed over where they come: they were another session's, or drawn unseen
//! by this one, which draws them again then.
//!
//! The invariant: in front of a gap the backend stands at the last value that was seen, and all of
//! the gap is passed over; or at the gap's end, because the statements that run again have drawn all
//! of it, unseen, and so it was theirs before, too. Anywhere else nothing of the replay counts.

use super::consecutive;
use super::run::{Drawn, Span};

/// Most values from the first to the last of one sequence: a backend takes a million in some
/// milliseconds.
const VALUES: u64 = 1 << 20;

/// Most values that are passed over, of all sequences: each is a call of its own.
const PASSED_OVER: u64 = 1 << 16;

/// What a setting back of sequences takes, in microseconds, with a record behind it.
const SETTING_BACK: u64 = 4_000;

/// So many records may go with one setting back.
const RECORDS: u64 = 256;

/// What a record takes, in microseconds.
const RECORD: u64 = 80;

/// Setting back that takes longer than this, in microseconds, is not in time where it must be: it has
/// half of the barrier's limit, or 1.5 s with several proxies.
const TOO_LONG: u64 = 1_000_000;

/// Where the backend has to stand in front of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// The record's number.
    pub record: usize,
    /// The sequence's number in the plan.
    pub sequence: usize,
    /// The value that it gave last.
    pub stands: i64,
    /// So many values behind that one are passed over.
    pub pass_over: u64,
    /// The value behind which the record goes on: where it stands when all of them are.
    pub behind: i64,
}

/// What is taken ahead, and where values are passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan<S> {
    /// The sequences, each with the first and the last value that was seen.
    pub spans: Vec<Span<S>>,
    /// In the order of the records.
    pub stops: Vec<Stop>,
    /// How many records have drawn.
    drawn: u64,
    passed_over: u64,
}

impl<S> Default for Plan<S> {
    fn default() -> Self {
        Self {
            spans: Vec::new(),
            stops: Vec::new(),
            drawn: 0,
            passed_over: 0,
        }
    }
}

impl<S: Clone + PartialEq> Plan<S> {
    /// Takes the next record that has drawn, with its values; `false`: they cannot be taken ahead,
    /// nor those of the transaction.
    #[must_use]
    pub fn take(&mut self, record: usize, drawn: &[Drawn<S>]) -> bool {
        self.drawn += u64::from(!drawn.is_empty());
        drawn.iter().all(|one| self.take_one(record, one).is_some())
    }

    fn take_one(&mut self, record: usize, drawn: &Drawn<S>) -> Option<()> {
        let (first, last) = (*drawn.values.first()?, *drawn.values.last()?);
        let increment = drawn.increment;
        consecutive(&drawn.values, increment).then_some(())?;
        let known = self.spans.iter().position(|s| s.sequence == drawn.sequence);
        let sequence = known.unwrap_or(self.spans.len());
        let behind = first.checked_sub(increment)?;
        let Some(span) = self.spans.get_mut(sequence) else {
            self.spans.push(Span {
                sequence: drawn.sequence.clone(),
                first,
                last,
            });
            self.stop(record, sequence, behind, (0, behind));
            return (steps(first, last, increment)? < VALUES).then_some(());
        };
        let stands = std::mem::replace(&mut span.last, last);
        let far = steps(span.first, last, increment)? >= VALUES;
        let gap = steps(stands, first, increment)?.checked_sub(1)?;
        self.passed_over += gap;
        if gap > 0 {
            self.stop(record, sequence, stands, (gap, behind));
        }
        (!far && self.passed_over <= PASSED_OVER).then_some(())
    }

    fn stop(
        &mut self,
        record: usize,
        sequence: usize,
        stands: i64,
        (pass_over, behind): (u64, i64),
    ) {
        self.stops.push(Stop {
            record,
            sequence,
            stands,
            pass_over,
            behind,
        });
    }

    /// Whether it is worth it, for a transaction of so many records: setting sequences back as they
    /// come would take too long.
    #[must_use]
    pub fn is_worth_it(&self, records: usize) -> bool {
        let times = (self.drawn / RECORDS).max(self.stops.len() as u64);
        let records = u64::try_from(records).unwrap_or(u64::MAX);
        let each = records.saturating_mul(RECORD);
        !self.spans.is_empty() && times.saturating_mul(SETTING_BACK).saturating_add(each) > TOO_LONG
    }
}

/// How often a sequence steps from `from` to `to`; `None`: it never gets there.
fn steps(from: i64, to: i64, increment: i64) -> Option<u64> {
    let (way, step) = (i128::from(to) - i128::from(from), i128::from(increment));
    let whole = step != 0 && way % step == 0;
    whole.then(|| u64::try_from(way / step).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(sequence: char, increment: i64, values: &[i64]) -> Drawn<char> {
        Drawn {
            sequence,
            increment,
            values: values.to_vec(),
        }
    }

    fn plan(records: &[(usize, Drawn<char>)]) -> Option<Plan<char>> {
        let mut plan = Plan::default();
        let mut all = records.iter();
        all.all(|(at, d)| plan.take(*at, std::slice::from_ref(d)))
            .then_some(plan)
    }

    #[test]
    fn values_that_others_took_are_passed_over() {
        let made = plan(&[
            (1, drawn('a', 1, &[7])),
            (2, drawn('a', 1, &[8, 9])),
            (4, drawn('b', -5, &[-5])),
            (5, drawn('a', 1, &[13])),
            (6, drawn('b', -5, &[-20, -25])),
        ])
        .unwrap();
        let spans: Vec<_> = made.spans.iter().map(|s| (s.first, s.last)).collect();
        assert_eq!(spans, [(7, 13), (-5, -25)]);
        let stops: Vec<_> = made
            .stops
            .iter()
            .map(|s| (s.record, s.sequence, s.stands, s.pass_over, s.behind))
            .collect();
        assert_eq!(
            stops,
            [
                (1, 0, 6, 0, 6),
                (4, 1, 0, 0, 0),
                (5, 0, 9, 3, 12),
                (6, 1, -5, 2, -15),
            ]
        );
    }

    #[test]
    fn what_no_sequence_gives_cannot_be_taken_ahead() {
        for records in [
            // Back, the same again, off the steps, a gap within a record, and at the ends of numbers.
            vec![(1, drawn('a', 1, &[7])), (2, drawn('a', 1, &[6]))],
            vec![(1, drawn('a', 1, &[7])), (2, drawn('a', 1, &[7]))],
            vec![(1, drawn('a', 2, &[7])), (2, drawn('a', 2, &[10]))],
            vec![(1, drawn('a', 1, &[7, 9]))],
            vec![(1, drawn('a', 1, &[i64::MIN]))],
            vec![(1, drawn('a', 1, &[]))],
            vec![(1, drawn('a', 1, &[1])), (2, drawn('a', 1, &[1 << 17]))],
            vec![(1, drawn('a', 1, &[1])), (2, drawn('a', 1, &[1 << 30]))],
            vec![
                (1, drawn('a', 1, &[i64::MIN + 1])),
                (2, drawn('a', 1, &[i64::MAX])),
            ],
        ] {
            assert_eq!(plan(&records), None, "{records:?}");
        }
    }

    #[test]
    fn it_is_for_transactions_that_take_long() {
        let mut made = plan(&[(0, drawn('a', 1, &[1]))]).unwrap();
        assert!(!made.is_worth_it(10_000));
        assert!(made.is_worth_it(20_000));
        for n in 1..300 {
            assert!(made.take(n, &[drawn('a', 1, &[1 + 2 * i64::try_from(n).unwrap()])]));
        }
        assert!(made.is_worth_it(300));
        assert!(!Plan::<char>::default().is_worth_it(usize::MAX));
    }
}
