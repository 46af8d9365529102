//! Which of a cluster's certificates are to be made anew, in which order, and when to look again.
//!
//! Pure: what the Secrets hold, the spec and the clock go in, the next step comes out. Invariants:
//! nothing is issued by an authority before everybody has been told to believe it, for
//! [`TRUST_FIRST`], and every program that runs was seen to; one that others may rest on is believed until it has ended; and what a program
//! does not read again is left alone for as long as it is valid anyway.

use helios_api::v1alpha1::Certificates;

use crate::certificates::Span;

pub(crate) const DAY: i64 = 86_400;
/// How long an authority is valid. It is replaced when a third of that is left.
pub(crate) const AUTHORITY_LIFE: i64 = 3650 * DAY;
/// So long everybody believes a new authority before it issues anything. The kubelet brings a
/// changed Secret within minutes, a node may be away for longer.
pub(crate) const TRUST_FIRST: i64 = DAY;
/// An authority with less time left is replaced even where a program does not read it again.
const LAST_DAYS: i64 = 30 * DAY;
/// What a fresh certificate must bring to be worth it: one cannot outlive its authority.
const LEAST_GAIN: i64 = DAY;
/// When to look again after a step that failed.
const RETRY: i64 = 60;

/// How long a certificate is valid, and when it is renewed, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) life: i64,
    /// With so much left; a third of its life without it.
    pub(crate) before: Option<i64>,
}

impl Terms {
    pub(crate) fn of(spec: &Certificates) -> Self {
        Self {
            life: spec.duration_days.saturating_mul(DAY),
            before: spec.renew_before_days.map(|days| days.saturating_mul(DAY)),
        }
    }
}

/// The authority, as its Secret has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Authority {
    pub(crate) valid: Span,
    /// Somebody else's is used, and not replaced.
    pub(crate) ours: bool,
    /// Its key is its own: it can issue.
    pub(crate) issues: bool,
    /// The one that is to take its place.
    pub(crate) next: Option<Next>,
    /// Ends of those before it that are still believed.
    pub(crate) former: Vec<i64>,
    /// A new one was asked for.
    pub(crate) asked: bool,
    /// A write has failed in this round.
    pub(crate) stuck: bool,
}

/// An authority that has been announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Next {
    pub(crate) valid: Span,
    /// Since when everybody has been told to believe it.
    pub(crate) trusted: Option<i64>,
    /// Whether every program that runs was seen to believe it; `None`: none was asked in this round.
    pub(crate) believed: Option<bool>,
}

/// Whoever holds a certificate: an instance, the proxies, the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) leaf: Leaf,
    pub(crate) believes: Believes,
    /// Somebody else's is used, and not renewed.
    pub(crate) ours: bool,
    /// Its program reads the files again.
    pub(crate) reloads: bool,
    /// A new certificate was asked for.
    pub(crate) asked: bool,
    /// A write has failed in this round.
    pub(crate) stuck: bool,
}

/// A holder's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leaf {
    Missing,
    /// It cannot be read, or its key is another one's.
    Broken,
    Held {
        valid: Span,
        /// Whether the authority in use has issued it.
        current: bool,
    },
}

/// The authorities in a holder's Secret, compared with those that are to be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Believes {
    Same,
    /// Some more.
    More,
    /// One is missing.
    Less,
}

/// Why something is made anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    Missing,
    Broken,
    Asked,
    Ends,
    /// It is valid for longer than one that is made now.
    TooLong,
    /// Its authority was replaced.
    Replaced,
}

impl Why {
    /// For people.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "there was none",
            Self::Broken => "it could not be used",
            Self::Asked => "it was asked for",
            Self::Ends => "its end was near",
            Self::TooLong => "it was valid for longer than it should be",
            Self::Replaced => "its authority was replaced",
        }
    }
}

/// One change of one Secret. Holders are counted in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Authorities that have ended are believed no more.
    Forget,
    /// A new authority is made, for everybody to believe.
    Announce(Why),
    /// Everybody has been told to: from now on the time counts.
    Trusted,
    /// Every program that runs is asked whether it believes the new authority.
    Ask,
    /// The new authority issues from now on.
    Promote,
    /// A holder's certificate is made anew.
    Issue(usize, Why),
    /// A holder is told what to believe.
    Tell(usize),
}

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// This; then it is decided again.
    Do(Step),
    /// Nothing.
    Rest {
        /// When to look again.
        again: i64,
        /// When the first certificate ends.
        first_end: i64,
    },
}

/// The next step.
pub(crate) fn decide(
    terms: Terms,
    authority: &Authority,
    holders: &[Holder],
    now: i64,
) -> Decision {
    if let Some(step) = of_authority(authority, holders, now) {
        return Decision::Do(step);
    }
    let first = holders
        .iter()
        .enumerate()
        .find_map(|(number, holder)| of_holder(terms, authority, (number, holder), now));
    match first {
        Some(step) => Decision::Do(step),
        None => rest(terms, authority, holders, now),
    }
}

fn of_authority(authority: &Authority, holders: &[Holder], now: i64) -> Option<Step> {
    if !authority.ours || authority.stuck {
        return None;
    }
    if authority.former.iter().any(|end| *end <= now) {
        return Some(Step::Forget);
    }
    let everybody = holders.iter().all(|holder| holder.reloads);
    let ended = authority.valid.until <= now;
    match authority.next {
        // One that lay there for years is no better than the one that it is to replace.
        Some(next) if near(next.valid, None, now) => Some(Step::Announce(Why::Ends)),
        Some(next) => {
            let told = holders
                .iter()
                .all(|holder| holder.believes != Believes::Less);
            let Some(since) = next.trusted else {
                return told.then_some(Step::Trusted);
            };
            let waited = now >= since.saturating_add(TRUST_FIRST);
            let may = everybody || authority.valid.until - now <= LAST_DAYS;
            if !told {
                return None;
            }
            match next.believed {
                // Nobody believes one that has ended: there is nothing to wait for.
                _ if ended => Some(Step::Promote),
                _ if !(waited && may) => None,
                None => Some(Step::Ask),
                Some(true) => Some(Step::Promote),
                Some(false) => None,
            }
        }
        None if !authority.issues => Some(Step::Announce(Why::Broken)),
        None if authority.asked => Some(Step::Announce(Why::Asked)),
        None if near(authority.valid, None, now) => Some(Step::Announce(Why::Ends)),
        None if everybody && outlives(authority.valid, AUTHORITY_LIFE, now) => {
            Some(Step::Announce(Why::TooLong))
        }
        None => None,
    }
}

fn of_holder(
    terms: Terms,
    authority: &Authority,
    (number, holder): (usize, &Holder),
    now: i64,
) -> Option<Step> {
    if holder.stuck || !(holder.ours || holder.leaf == Leaf::Missing) {
        return None;
    }
    if let Some(why) = renewed(terms, authority, holder, now) {
        return Some(Step::Issue(number, why));
    }
    (holder.believes != Believes::Same).then_some(Step::Tell(number))
}

fn renewed(terms: Terms, authority: &Authority, holder: &Holder, now: i64) -> Option<Why> {
    let (valid, current) = match holder.leaf {
        Leaf::Missing => return Some(Why::Missing),
        _ if !authority.issues => return None,
        Leaf::Broken => return Some(Why::Broken),
        Leaf::Held { valid, current } => (valid, current),
    };
    if !current {
        return Some(Why::Replaced);
    }
    // A program that keeps its own would be left with one that ends sooner, should its server reload.
    if holder.asked && holder.reloads {
        return Some(Why::Asked);
    }
    if near(valid, terms.before, now) {
        let fresh = Span::of(now, terms.life).within(authority.valid);
        return (fresh.until - valid.until >= LEAST_GAIN).then_some(Why::Ends);
    }
    (holder.reloads && outlives(valid, terms.life, now)).then_some(Why::TooLong)
}

/// From when on something is near its end.
fn due(valid: Span, before: Option<i64>) -> i64 {
    let third = valid.until.saturating_sub(valid.from) / 3;
    valid.until.saturating_sub(before.unwrap_or(third))
}

fn near(valid: Span, before: Option<i64>, now: i64) -> bool {
    now >= due(valid, before)
}

/// Whether it is valid for clearly longer than one that is made now.
fn outlives(valid: Span, life: i64, now: i64) -> bool {
    valid.until - now > life.saturating_add(DAY)
}

fn rest(terms: Terms, authority: &Authority, holders: &[Holder], now: i64) -> Decision {
    let mut times = authority.former.clone();
    times.push(match authority.next {
        Some(next) => match next.trusted {
            Some(since) => since.saturating_add(TRUST_FIRST),
            None => due(next.valid, None),
        },
        None => due(authority.valid, None),
    });
    let mut ends = vec![authority.valid.until];
    for holder in holders {
        if let Leaf::Held { valid, .. } = holder.leaf {
            times.push(due(valid, terms.before));
            ends.push(valid.until);
        }
    }
    let doubted = authority.next.and_then(|next| next.believed) == Some(false);
    let stuck = doubted || authority.stuck || holders.iter().any(|holder| holder.stuck);
    times.extend(stuck.then_some(now.saturating_add(RETRY)));
    let later = times.into_iter().filter(|at| *at > now).min();
    Decision::Rest {
        again: later.unwrap_or(now.saturating_add(RETRY)),
        first_end: ends.into_iter().min().unwrap_or(authority.valid.until),
    }
}

#[cfg(test)]
#[path = "renewal_tests.rs"]
mod tests;
