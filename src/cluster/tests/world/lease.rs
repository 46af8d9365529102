//! Both halves of the lease in the model: agents whose clocks run at other rates and guards that
//! come late, a controller that forgets when it dies.

use std::collections::BTreeMap;

use helios_api::{InstanceName, Lsn};
use helios_cluster::lease::{Leased, Tenancy, duty};

use super::{Role, World};

/// A record that proves a contact; no commit of a client.
const PROOF: u64 = 1 << 40;
/// How many ticks a guard may come late: below the margin of a lease of 3 s.
const LATE: u64 = 20;
/// An agent is asked so often.
const RENEW_TICKS: u64 = 30;

/// An agent's half.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tenant {
    pub(crate) tenancy: Tenancy,
    /// Rate of its clock in thousandths.
    rate: u64,
    asks: u64,
    leased: bool,
    expired_at: Option<u64>,
}

impl Tenant {
    pub(crate) fn new(n: usize) -> Self {
        Self {
            rate: [1_010, 990, 1_000][n % 3],
            ..Self::default()
        }
    }

    fn now(&self, tick: u64) -> u64 {
        tick * 10 * self.rate / 1_000 + self.rate
    }

    /// It has held a lease, and does not now.
    pub(crate) fn missing(&self, tick: u64) -> bool {
        self.leased && (self.tenancy.version().is_none() || self.tenancy.expired(self.now(tick)))
    }

    pub(crate) fn release(&mut self) {
        self.tenancy = Tenancy::default();
    }
}

/// What the controller knows, all of it since it began.
#[derive(Debug, Clone, Default)]
pub(crate) struct Memory {
    began: u64,
    asks: BTreeMap<InstanceName, u64>,
    versions: BTreeMap<InstanceName, Option<u64>>,
    granted: BTreeMap<InstanceName, u64>,
    heard: BTreeMap<InstanceName, u64>,
    received: BTreeMap<InstanceName, (usize, u64)>,
}

impl Memory {
    pub(crate) fn starting(tick: u64) -> Self {
        Self {
            began: tick,
            ..Self::default()
        }
    }

    fn since(&self, at: Option<u64>, tick: u64) -> u64 {
        (tick - at.unwrap_or(self.began)) * 10
    }

    pub(crate) fn silent_ms(&self, name: &InstanceName, tick: u64) -> u64 {
        self.since(self.heard.get(name).copied(), tick)
    }

    pub(crate) fn leased(&self, name: &InstanceName, tick: u64) -> Leased {
        Leased {
            version: self.versions.get(name).copied().flatten(),
            ungranted_ms: self.since(self.granted.get(name).copied(), tick),
            quiet_ms: self.since(self.received.get(name).map(|(_, at)| *at), tick),
        }
    }
}

impl World {
    /// Agents look at their leases; primaries that are not renewed write proofs.
    pub(crate) fn leases(&mut self) {
        let tick = self.tick;
        for name in self.instances.keys().cloned().collect::<Vec<_>>() {
            let i = self.instances.get_mut(&name).unwrap();
            let now = i.lease.now(tick);
            if !i.lease.tenancy.expired(now) {
                i.lease.expired_at = None;
            } else if i.role == Role::Primary {
                let at = *i.lease.expired_at.get_or_insert(tick);
                if tick >= at + LATE {
                    self.trace.push(format!("{tick} lease of {name} has ended"));
                    self.stop(&name);
                    continue;
                }
            }
            let i = self.instances.get_mut(&name).unwrap();
            if i.role != Role::Primary || i.silent_until > tick {
                continue;
            }
            if i.lease.tenancy.wants_proof(now) && tick.is_multiple_of(20) {
                i.log.push(PROOF + tick);
                let at = Lsn(i.log.len() as u64);
                i.lease.tenancy.written(at, now);
            }
            let standbys: Vec<_> = self.instances.keys().cloned().collect();
            for standby in standbys {
                if !self.streams(&standby, &name) {
                    continue;
                }
                let flushed = Lsn(self.instances[&standby].log.len() as u64);
                let i = self.instances.get_mut(&name).unwrap();
                i.lease.tenancy.flushed(&standby, flushed);
            }
        }
    }

    /// The controller renews, and takes note of what it hears.
    pub(crate) fn grant(&mut self) {
        let tick = self.tick;
        for name in self.instances.keys().cloned().collect::<Vec<_>>() {
            if !self.hears(&name) {
                continue;
            }
            self.memory.heard.insert(name.clone(), tick);
            let received = self.instances[&name].log.len();
            let known = self.memory.received.get(&name).map(|(len, _)| *len);
            if known != Some(received) {
                self.memory.received.insert(name, (received, tick));
            }
        }
        if !tick.is_multiple_of(RENEW_TICKS) || self.settings.lease_ms.is_none() {
            return;
        }
        let Some((name, epoch, terms)) = duty(&self.durable) else {
            return;
        };
        let ask = self.memory.asks.remove(&name);
        if ask.is_some() {
            // Whether it arrives or not.
            self.memory.granted.insert(name.clone(), tick);
        }
        if !self.hears(&name) {
            return;
        }
        let i = self.instances.get_mut(&name).unwrap();
        let now = i.lease.now(tick);
        let fenced = i.fenced_at.is_some_and(|at| at >= epoch);
        if let Some(ask) = ask
            && epoch >= i.epoch
            && !fenced
            && i.lease.tenancy.grant(&terms, ask, now)
        {
            i.lease.leased = true;
        }
        i.lease.asks += 1;
        i.lease.tenancy.ask(i.lease.asks, now);
        self.memory.asks.insert(name.clone(), i.lease.asks);
        let version = i.lease.tenancy.version();
        self.memory.versions.insert(name, version);
    }
}
