//! The barrier of design rule 5.7 across several proxies: none goes on before all have come as far,
//! or have been left behind.
//!
//! Pure, and not durable: who succeeds an executor that dies in the middle begins again, and the
//! proxies say how far they are. The invariants: a turn to set sequences back is given to one proxy
//! at a time, only while no proxy has let new work in on this primary, and is over by the clock of
//! its holder before any proxy may go on; what was in flight is sent again only when nobody who is
//! still waited for has replays to do, and new work is let in behind that.

use std::collections::{BTreeMap, VecDeque};

use helios_api::control::{Gathered, Stage};

use crate::operation::Time;

/// How long proxies may take to leave the old primary.
pub const GATHER_MS: u64 = 2_000;
/// How long the turns may take, from the moment their holder stood: sessions that set sequences back
/// replay one after the other. No longer than [`GATHER_MS`]: a proxy that stands later than that goes
/// on by itself at once, and nobody may have a turn then.
pub const TURNS_MS: u64 = 2_000;
/// How long replays hold up everybody: the limit of one proxy's own barrier, and what a command
/// may take on its way.
pub const REPLAY_MS: u64 = 6_000;
/// How long sending again, and opening, may take.
pub const STEP_MS: u64 = 2_000;
/// A proxy that hears nothing for so long goes on by itself. Longer than everything that others
/// may do in the meantime with a turn, which no proxy may still have then.
pub const PATIENCE_MS: u64 = 10_000;

/// What a proxy is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Leave the old primary, and stand.
    Gather,
    /// Go on to this stage.
    Advance(Stage),
}

/// What a proxy answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It stands.
    Gathered(Gathered),
    /// It has come as far as it was told.
    Done,
    /// It has let new work in without asking: it knows no stages.
    Opened,
    /// It did not do it, or nobody knows.
    Failed,
}

/// Where one proxy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Member {
    /// It has been told something, and all wait for it.
    Asked,
    /// It has done what it was told.
    Waits,
    /// Nobody waits for it any more; it has been told to go on by itself, or will be.
    Behind,
    /// It is open, or has failed.
    Over,
}

/// The barrier of one change of primary.
#[derive(Debug)]
pub struct Barrier {
    members: BTreeMap<String, Member>,
    stage: Stage,
    since: Time,
    /// Who still wants a turn.
    turns: VecDeque<String>,
    /// Nobody may have one.
    no_turns: bool,
    /// Nobody knows what became of who had one: it is over when the stage is.
    waits_out: bool,
}

type Orders = Vec<(String, Order)>;

impl Barrier {
    /// Begins with `proxies`; `all`: there is no other that could let work in.
    #[must_use]
    pub fn begin(proxies: Vec<String>, all: bool, now: Time) -> (Self, Orders) {
        let orders = proxies.iter().map(|p| (p.clone(), Order::Gather)).collect();
        let barrier = Self {
            members: proxies.into_iter().map(|p| (p, Member::Asked)).collect(),
            stage: Stage::Gathered,
            since: now,
            turns: VecDeque::new(),
            no_turns: !all,
            waits_out: false,
        };
        (barrier, orders)
    }

    /// Whether nobody has anything to do any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.members.values().all(|m| *m == Member::Over)
    }

    /// How far those are that are waited for.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// When the next look is due, whatever is answered until then.
    #[must_use]
    pub fn due(&self) -> Time {
        self.since.plus_millis(self.limit())
    }

    fn limit(&self) -> u64 {
        match self.stage {
            Stage::Gathered => GATHER_MS,
            Stage::Turn => TURNS_MS,
            Stage::Replayed => REPLAY_MS,
            Stage::Sent | Stage::Open => STEP_MS,
        }
    }

    /// Takes note of an answer; what is to be told next.
    pub fn answered(&mut self, proxy: &str, order: Order, answer: Answer, now: Time) -> Orders {
        let Some(member) = self.members.get_mut(proxy) else {
            return Vec::new();
        };
        let was = *member;
        *member = match (order, answer) {
            (_, Answer::Failed | Answer::Opened) | (Order::Advance(Stage::Open), _) => Member::Over,
            _ if was == Member::Behind => Member::Behind,
            _ => Member::Waits,
        };
        self.no_turns |= answer == Answer::Opened;
        if (order, answer) == (Order::Advance(Stage::Turn), Answer::Failed) {
            self.waits_out = true;
        }
        if let Answer::Gathered(gathered) = answer {
            self.no_turns |= gathered.has_worked;
            if gathered.wants_turn && was == Member::Asked {
                self.turns.push_back(proxy.to_owned());
            }
        }
        // One that has stood too late goes on by itself.
        if was == Member::Behind && self.members.get(proxy) == Some(&Member::Behind) {
            return vec![(proxy.to_owned(), Order::Advance(Stage::Open))];
        }
        self.look(now)
    }

    /// Leaves those behind that take too long; what is to be told next.
    pub fn look(&mut self, now: Time) -> Orders {
        let mut orders = Vec::new();
        loop {
            if now >= self.due() {
                for member in self.members.values_mut().filter(|m| **m == Member::Asked) {
                    *member = Member::Behind;
                }
            }
            let asked = self.members.values().any(|m| *m == Member::Asked);
            let waits = self.waits_out && self.stage == Stage::Turn && now < self.due();
            if asked || waits || !self.next(now, &mut orders) {
                return orders;
            }
        }
    }

    /// Enters what comes next, everybody having come as far; `false`: nothing does.
    fn next(&mut self, now: Time, orders: &mut Orders) -> bool {
        let turn = match self.stage {
            // They end at the same time: counted from when the last one stood.
            Stage::Gathered => self.next_turn(),
            Stage::Turn if now < self.due() => self.next_turn(),
            _ => None,
        };
        if let Some(proxy) = turn {
            if self.stage == Stage::Gathered {
                (self.stage, self.since) = (Stage::Turn, now);
            }
            self.members.insert(proxy.clone(), Member::Asked);
            orders.push((proxy, Order::Advance(Stage::Turn)));
            return true;
        }
        self.stage = match self.stage {
            Stage::Gathered | Stage::Turn => Stage::Replayed,
            Stage::Replayed => Stage::Sent,
            Stage::Sent => Stage::Open,
            Stage::Open => return false,
        };
        self.since = now;
        for (proxy, member) in &mut self.members {
            if *member == Member::Waits {
                *member = Member::Asked;
                orders.push((proxy.clone(), Order::Advance(self.stage)));
            }
        }
        true
    }

    fn next_turn(&mut self) -> Option<String> {
        while let Some(proxy) = self.turns.pop_front() {
            if !self.no_turns && self.members.get(&proxy) == Some(&Member::Waits) {
                return Some(proxy);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
