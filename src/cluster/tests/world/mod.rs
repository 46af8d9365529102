//! A small model of instances, agents, a proxy and a client, with a controller that can be killed
//! between any two things it does.

mod lease;

use std::collections::{BTreeMap, BTreeSet};

use helios_api::agent::{
    AgentCommand, AgentReply, AgentRequest, AgentState, InstanceState, Rejoin, SettingsReport,
    StandbyPosition, StopMode,
};
use helios_api::control::{
    DrainReport, Fence, LostCommits, ProxyStatus, ResumeReport, Slowness, Topology,
};
use helios_api::{Endpoint, Epoch, Host, InstanceName, Lsn, Timeline};
use helios_cluster::{
    Action, ClusterState, Contact, Failure, Finished, InstanceView, Mode, Observation,
    ProxyCommand, Refusal, Reply, Request, Settings, Time, decide,
};

pub(crate) fn name(n: usize) -> InstanceName {
    format!("pg-{n}").parse().unwrap()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Empty,
    Stopped,
    Primary,
    Standby,
}

#[derive(Debug, Clone)]
pub(crate) struct Instance {
    pub(crate) role: Role,
    pub(crate) log: Vec<u64>,
    pub(crate) timeline: u32,
    standby_signal: bool,
    following: Option<InstanceName>,
    receiving: bool,
    pub(crate) epoch: Epoch,
    fenced_at: Option<Epoch>,
    stopped_at: Option<Epoch>,
    promoted: Option<Fence>,
    pub(crate) setting: BTreeSet<InstanceName>,
    /// The agent is dead until this tick.
    pub(crate) silent_until: u64,
    /// Fingerprint of the settings it was told.
    pub(crate) told: String,
    /// Promotion kills it.
    pub(crate) dies_when_promoted: bool,
    /// Nobody reaches it until this tick.
    pub(crate) cut_until: u64,
    /// The controller does not reach it until this tick.
    pub(crate) unheard_until: u64,
    /// Its agent's half of the lease.
    pub(crate) lease: lease::Tenant,
}

#[derive(Debug, Clone)]
pub(crate) struct Proxy {
    pub(crate) epoch: Epoch,
    pub(crate) primary: Option<InstanceName>,
    pub(crate) held: bool,
}

/// What is injected when the run reaches a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Controller,
    Postmaster(usize),
    /// Agent and postmaster together.
    Machine(usize),
    /// The way to everybody else.
    Network(usize),
}

pub(crate) struct World {
    pub(crate) settings: Settings,
    pub(crate) instances: BTreeMap<InstanceName, Instance>,
    pub(crate) proxy: Proxy,
    pub(crate) durable: ClusterState,
    running: Vec<Action>,
    finished: Vec<Finished>,
    pub(crate) request: Option<Request>,
    pub(crate) answers: Vec<Result<Option<u64>, Refusal>>,
    pub(crate) tick: u64,
    next_commit: u64,
    unacknowledged: Vec<u64>,
    pub(crate) acknowledged: Vec<u64>,
    /// Points passed so far, and what happens at which.
    pub(crate) points: u64,
    pub(crate) faults: Vec<(u64, Fault)>,
    pub(crate) reverse: bool,
    /// The client rests.
    pub(crate) idle: bool,
    /// Nothing reaches a standby.
    pub(crate) hold_back: bool,
    /// Standbys have lost their connections.
    pub(crate) disconnected: bool,
    /// What the proxy says of the primary's latency, whoever that is.
    pub(crate) slow: Option<Slowness>,
    /// Standbys that are about to be stopped.
    pub(crate) aside: BTreeSet<InstanceName>,
    /// Instances that are to go.
    pub(crate) removed: BTreeSet<InstanceName>,
    /// Instances with a volume of an earlier cluster.
    pub(crate) kept: BTreeSet<InstanceName>,
    /// Standbys whose slots were dropped.
    pub(crate) dropped: Vec<InstanceName>,
    /// For how many ticks a network fault lasts.
    pub(crate) cut_ticks: u64,
    /// The controller is away until this tick.
    pub(crate) away_until: u64,
    /// The controller's half of the lease.
    memory: lease::Memory,
    pub(crate) trace: Vec<String>,
}

impl World {
    pub(crate) fn new(count: usize, settings: Settings) -> Self {
        let fresh = Instance {
            role: Role::Empty,
            log: Vec::new(),
            timeline: 1,
            standby_signal: false,
            following: None,
            receiving: false,
            epoch: Epoch(0),
            fenced_at: None,
            stopped_at: None,
            promoted: None,
            setting: BTreeSet::new(),
            silent_until: 0,
            told: "first".to_owned(),
            dies_when_promoted: false,
            cut_until: 0,
            unheard_until: 0,
            lease: lease::Tenant::default(),
        };
        Self {
            settings,
            instances: (1..=count)
                .map(|n| {
                    let lease = lease::Tenant::new(n);
                    let instance = Instance {
                        lease,
                        ..fresh.clone()
                    };
                    (name(n), instance)
                })
                .collect(),
            proxy: Proxy {
                epoch: Epoch(0),
                primary: None,
                held: false,
            },
            durable: ClusterState::default(),
            running: Vec::new(),
            finished: Vec::new(),
            request: None,
            answers: Vec::new(),
            tick: 0,
            next_commit: 1,
            unacknowledged: Vec::new(),
            acknowledged: Vec::new(),
            points: 0,
            faults: Vec::new(),
            reverse: false,
            idle: false,
            hold_back: false,
            disconnected: false,
            slow: None,
            aside: BTreeSet::new(),
            removed: BTreeSet::new(),
            kept: BTreeSet::new(),
            dropped: Vec::new(),
            cut_ticks: 800,
            away_until: 0,
            memory: lease::Memory::default(),
            trace: Vec::new(),
        }
    }

    /// The cluster is deleted and made again over the volumes of these instances: the others', the
    /// durable state and the proxies are gone.
    #[allow(
        dead_code,
        reason = "only one of the files with this model makes clusters again"
    )]
    pub(crate) fn made_again(&mut self, kept: &[usize]) {
        let fresh = Self::new(self.instances.len(), self.settings.clone());
        self.kept = kept.iter().map(|n| name(*n)).collect();
        // What lay nowhere else goes with its volume.
        let logs = self.kept.iter().map(|n| &self.instances[n].log);
        let left: BTreeSet<u64> = logs.flatten().copied().collect();
        self.acknowledged.retain(|commit| left.contains(commit));
        for (n, instance) in fresh.instances {
            self.stop(&n);
            match self.instances.get_mut(&n) {
                // Its agent was started anew, too.
                Some(old) if self.kept.contains(&n) => {
                    old.lease.release();
                    old.receiving = false;
                    (old.following, old.stopped_at) = (None, None);
                }
                Some(old) => *old = instance,
                None => {}
            }
        }
        self.proxy = fresh.proxy;
        self.durable = fresh.durable;
        self.memory = fresh.memory;
        self.unacknowledged.clear();
        self.running.clear();
        self.finished.clear();
    }

    pub(crate) fn now(&self) -> Time {
        Time(self.tick * 10_000)
    }

    /// Runs until the cluster is as it should be.
    pub(crate) fn settle(&mut self) {
        for _ in 0..6_000 {
            self.step();
            if self.is_settled() {
                return;
            }
        }
        panic!(
            "never settled: {:#?}\n{}",
            self.durable,
            self.trace.join("\n")
        );
    }

    fn is_settled(&self) -> bool {
        let state = &self.durable;
        let Some(primary) = &state.primary else {
            return false;
        };
        let others = self.instances.keys().filter(|n| **n != primary.name);
        let followed = others
            .clone()
            .filter(|n| !state.members[*n].fenced)
            .all(|n| {
                self.streams(n, &primary.name)
                    && state.members[n].followed == Some(primary.timeline)
            });
        let counted = others.clone().all(|n| {
            state.members[n].fenced || !self.settings.synchronous || state.sync.target().contains(n)
        });
        self.request.is_none()
            && self.running.is_empty()
            && self.finished.is_empty()
            && state.mode == Mode::Steady
            && followed
            && counted
            && state.sync.is_settled()
            && !self.proxy.held
            && self.proxy.epoch == state.epoch
            && self.proxy.primary.as_ref() == Some(&primary.name)
            && self.instances[&primary.name].role == Role::Primary
    }

    /// One round of everything.
    pub(crate) fn step(&mut self) {
        self.tick += 1;
        self.client();
        self.replicate();
        self.confirm();
        self.check();
        self.leases();
        if self.tick >= self.away_until {
            self.grant();
            self.controller();
        }
        self.check();
    }

    /// Whether anybody reaches an instance's machine.
    fn is_cut(&self, name: &InstanceName) -> bool {
        self.instances[name].cut_until > self.tick
    }

    /// Whether the controller reaches an instance's agent.
    fn hears(&self, name: &InstanceName) -> bool {
        let i = &self.instances[name];
        i.silent_until.max(i.cut_until).max(i.unheard_until) <= self.tick
    }

    fn streams(&self, standby: &InstanceName, primary: &InstanceName) -> bool {
        let (s, p) = (&self.instances[standby], &self.instances[primary]);
        !self.disconnected
            && !self.is_cut(standby)
            && !self.is_cut(primary)
            && s.role == Role::Standby
            && s.receiving
            && s.following.as_ref() == Some(primary)
            && p.role == Role::Primary
    }

    fn client(&mut self) {
        let Some(target) = self
            .proxy
            .primary
            .clone()
            .filter(|p| !self.proxy.held && !self.idle && !self.is_cut(p))
        else {
            return;
        };
        let instance = self.instances.get_mut(&target).unwrap();
        if instance.role == Role::Primary && self.unacknowledged.len() < 3 {
            instance.log.push(self.next_commit);
            self.unacknowledged.push(self.next_commit);
            self.next_commit += 1;
        }
    }

    /// Standbys receive one record a tick, the second one every other tick only.
    fn replicate(&mut self) {
        if self.hold_back {
            return;
        }
        let names: Vec<_> = self.instances.keys().cloned().collect();
        for (at, standby) in names.iter().enumerate() {
            let Some(primary) = self.instances[standby].following.clone() else {
                continue;
            };
            if !self.streams(standby, &primary) || (at % 2 == 1 && self.tick.is_multiple_of(3)) {
                continue;
            }
            self.receive(standby, &primary, 1);
        }
    }

    fn receive(&mut self, standby: &InstanceName, primary: &InstanceName, records: usize) {
        let Instance { log, timeline, .. } = self.instances[primary].clone();
        let s = self.instances.get_mut(standby).unwrap();
        assert!(
            log.starts_with(&s.log),
            "{standby} streams although it has diverged"
        );
        let to = (s.log.len() + records).min(log.len());
        s.log.extend_from_slice(&log[s.log.len()..to]);
        s.timeline = timeline;
    }

    /// Acknowledges what the primary's setting allows.
    fn confirm(&mut self) {
        let Some(primary) = self.proxy.primary.clone() else {
            return;
        };
        if self.is_cut(&primary) {
            return;
        }
        let p = &self.instances[&primary];
        if p.role != Role::Primary {
            // The backend died: the outcome is resolved by evidence, not acknowledged.
            self.unacknowledged.clear();
            return;
        }
        let confirmed = |commit: &u64| {
            let by = |n: &InstanceName| {
                self.streams(n, &primary) && self.instances[n].log.contains(commit)
            };
            p.log.contains(commit) && (p.setting.is_empty() || p.setting.iter().any(by))
        };
        let (done, waiting): (Vec<u64>, Vec<u64>) =
            self.unacknowledged.iter().partition(|c| confirmed(c));
        let (here, _): (Vec<u64>, Vec<u64>) = waiting.iter().partition(|c| p.log.contains(c));
        self.acknowledged.extend(done);
        self.unacknowledged = here;
    }

    fn check(&self) {
        let primaries: Vec<_> = self
            .instances
            .iter()
            .filter(|(_, i)| i.role == Role::Primary)
            .map(|(n, _)| n)
            .collect();
        assert!(
            primaries.len() <= 1,
            "two writable instances {primaries:?}\n{}",
            self.trace.join("\n")
        );
    }

    /// The primary of the durable state holds every acknowledged commit.
    pub(crate) fn check_nothing_lost(&self) {
        let lost = self.lost();
        assert!(lost.is_empty(), "lost {lost:?}\n{}", self.trace.join("\n"));
    }

    /// Acknowledged commits that the primary of the durable state does not hold.
    pub(crate) fn lost(&self) -> Vec<u64> {
        let primary = self.durable.primary.as_ref().unwrap();
        let log: BTreeSet<_> = self.instances[&primary.name].log.iter().collect();
        let lost = self.acknowledged.iter().filter(|c| !log.contains(c));
        lost.copied().collect()
    }

    /// Nothing is lost by a promotion that says so; what another one lost is forgotten.
    fn check_marked(&mut self, topology: &Topology) {
        let lost = self.lost();
        let since = self.proxy.epoch;
        assert!(
            lost.is_empty() || topology.may_have_lost(since),
            "lost {lost:?} without a mark: {topology:?}\n{}",
            self.trace.join("\n")
        );
        self.acknowledged.retain(|commit| !lost.contains(commit));
    }

    /// A point where something may be injected; `true`: the controller dies here.
    fn point(&mut self, what: &str) -> bool {
        let at = self.points;
        self.points += 1;
        let mut dies = false;
        for (_, fault) in self.faults.clone().into_iter().filter(|(p, _)| *p == at) {
            self.trace
                .push(format!("{} !! {fault:?} at {what}", self.tick));
            match fault {
                Fault::Controller => dies = true,
                Fault::Postmaster(n) => self.stop(&name(n)),
                Fault::Machine(n) => {
                    self.stop(&name(n));
                    let until = self.tick + 30;
                    self.instances.get_mut(&name(n)).unwrap().silent_until = until;
                }
                Fault::Network(n) => {
                    let until = self.tick + self.cut_ticks;
                    self.instances.get_mut(&name(n)).unwrap().cut_until = until;
                }
            }
        }
        if dies {
            self.running.clear();
            self.finished.clear();
            self.memory = lease::Memory::starting(self.tick);
        }
        dies
    }

    /// Its data directory is gone.
    pub(crate) fn wipe(&mut self, name: &InstanceName) {
        let i = self.instances.get_mut(name).unwrap();
        i.role = Role::Empty;
        i.log.clear();
        i.standby_signal = false;
    }

    pub(crate) fn stop(&mut self, name: &InstanceName) {
        let i = self.instances.get_mut(name).unwrap();
        if i.role != Role::Empty {
            i.role = Role::Stopped;
        }
    }

    fn controller(&mut self) {
        let obs = self.observe();
        let finished = std::mem::take(&mut self.finished);
        let decision = decide(
            &self.settings,
            &self.durable,
            &Observation { finished, ..obs },
            self.now(),
        )
        .unwrap_or_else(|e| panic!("{e}\n{}", self.trace.join("\n")));
        if self.point("before save") {
            return;
        }
        if decision.next != self.durable {
            if let Mode::Moving(m) = &decision.next.mode {
                self.trace.push(format!(
                    "{} epoch {} {:?}",
                    self.tick, decision.next.epoch, m.step
                ));
            }
            let text = serde_json::to_string(&decision.next).unwrap();
            self.durable = serde_json::from_str(&text).unwrap();
        }
        if let Some(answer) = decision.answer {
            self.request = None;
            self.answers.push(answer);
        }
        if self.point("after save") {
            return;
        }
        let mut actions = decision.actions;
        if self.reverse {
            actions.reverse();
        }
        for action in actions {
            self.trace.push(format!("{} {action:?}", self.tick));
            let result = self.carry_out(&action);
            // The state changes between the effect and the moment the controller learns of it.
            if self.point("after effect") {
                return;
            }
            self.check();
            self.finished.push(Finished { action, result });
        }
    }

    pub(crate) fn observe(&self) -> Observation {
        let view = |n: &InstanceName, i: &Instance| InstanceView {
            endpoint: Endpoint {
                host: Host::Unix(format!("/{n}").into()),
                port: 5432,
            },
            contact: if !self.hears(n) {
                Contact::Silent {
                    for_ms: self.memory.silent_ms(n, self.tick),
                    proven_dead: i.silent_until > self.tick,
                }
            } else {
                Contact::Answers(Box::new(self.report(n, i)))
            },
            lease: self.memory.leased(n, self.tick),
        };
        let status = ProxyStatus {
            epoch: self.proxy.epoch,
            phase: if self.proxy.held { "held" } else { "running" }.to_owned(),
            sessions: 1,
            in_transaction: 0,
            protected: 1,
            held: 0,
            primary_reachable: true,
            journal_bytes: 0,
            slow: self.slow,
        };
        Observation {
            instances: self
                .instances
                .iter()
                .map(|(n, i)| (n.clone(), view(n, i)))
                .collect(),
            proxies: [("proxy".to_owned(), Some(status))].into(),
            running: self.running.clone(),
            finished: Vec::new(),
            request: self.request.clone(),
            aside: self.aside.clone(),
            removed: self.removed.clone(),
            kept: self.kept.clone(),
        }
    }

    fn report(&self, n: &InstanceName, i: &Instance) -> AgentState {
        let end = Lsn(i.log.len() as u64);
        let timeline = Timeline(i.timeline);
        let instance = match i.role {
            Role::Empty => InstanceState::Empty,
            Role::Stopped => InstanceState::Stopped {
                crashed: true,
                clean: false,
                timeline,
            },
            Role::Primary => InstanceState::Primary {
                timeline,
                position: end,
                standbys: self
                    .instances
                    .iter()
                    .filter(|(s, _)| self.streams(s, n))
                    .map(|(s, other)| StandbyPosition {
                        name: s.to_string(),
                        flushed: Lsn(other.log.len() as u64),
                        synchronous: i.setting.contains(s),
                    })
                    .collect(),
            },
            Role::Standby => InstanceState::Standby {
                timeline,
                received: end,
                replayed: end,
                heard_ms: i
                    .following
                    .as_ref()
                    .filter(|primary| self.streams(n, primary))
                    .map(|_| 0),
            },
        };
        AgentState {
            revision: self.tick,
            name: n.clone(),
            epoch: i.epoch,
            fenced: i.fenced_at.is_some(),
            instance,
            leaving: false,
            settings: SettingsReport {
                told: i.told.clone(),
                ..SettingsReport::default()
            },
        }
    }

    fn carry_out(&mut self, action: &Action) -> Result<Reply, Failure> {
        match action {
            Action::Agent { instance, request } => self.agent(instance, request).map(Reply::Agent),
            Action::Proxy { command, .. } => self.proxy(command),
        }
    }

    fn proxy(&mut self, command: &ProxyCommand) -> Result<Reply, Failure> {
        let given = match command {
            ProxyCommand::Prepare { epoch, .. } | ProxyCommand::Abort { epoch } => *epoch,
            ProxyCommand::Drain(request) => request.epoch,
            ProxyCommand::Resume(topology)
            | ProxyCommand::Together { topology, .. }
            | ProxyCommand::Join(topology) => topology.epoch,
        };
        if given < self.proxy.epoch {
            return Err(Failure::Stale {
                seen: self.proxy.epoch,
            });
        }
        match command {
            ProxyCommand::Prepare { .. } => Ok(Reply::Done),
            ProxyCommand::Drain(_) => {
                self.proxy.held = true;
                Ok(Reply::Drained(DrainReport::default()))
            }
            ProxyCommand::Abort { .. } => {
                self.proxy.held = false;
                Ok(Reply::Done)
            }
            ProxyCommand::Resume(topology)
            | ProxyCommand::Together { topology, .. }
            | ProxyCommand::Join(topology) => {
                self.check_marked(topology);
                self.proxy = Proxy {
                    epoch: topology.epoch,
                    primary: Some(topology.primary.name.clone()),
                    held: false,
                };
                self.unacknowledged.clear();
                Ok(Reply::Resumed(ResumeReport::default()))
            }
        }
    }

    fn agent(&mut self, n: &InstanceName, request: &AgentRequest) -> Result<AgentReply, Failure> {
        let refused = |why: &str| Err(Failure::Refused(why.to_owned()));
        if !self.hears(n) {
            return Err(Failure::Failed("no agent".to_owned()));
        }
        let tick = self.tick;
        let i = self.instances.get_mut(n).unwrap();
        if request.epoch < i.epoch {
            return Err(Failure::Stale { seen: i.epoch });
        }
        i.epoch = request.epoch;
        let locked = i.fenced_at.is_some_and(|at| at >= request.epoch);
        let here = AgentReply::Positions {
            end: Lsn(i.log.len() as u64),
            timeline: Timeline(i.timeline),
        };
        match &request.command {
            AgentCommand::Bootstrap if i.role == Role::Empty => i.role = Role::Primary,
            AgentCommand::StartPrimary if locked => return refused("fenced"),
            AgentCommand::StartPrimary if i.standby_signal => return refused("a standby"),
            AgentCommand::StartPrimary if i.role == Role::Empty => return refused("empty"),
            AgentCommand::StartPrimary if i.lease.missing(tick) => return refused("no lease"),
            AgentCommand::StartPrimary => i.role = Role::Primary,
            AgentCommand::Survey if i.role == Role::Stopped => {
                return Ok(AgentReply::Held {
                    standby: i.standby_signal,
                    torn: false,
                    timeline: Timeline(i.timeline),
                    end: Lsn(i.log.len() as u64),
                });
            }
            AgentCommand::StartStandby if i.role == Role::Stopped && i.standby_signal => {
                i.role = Role::Standby;
                i.receiving = false;
                i.following = None;
            }
            AgentCommand::Follow { .. } if i.stopped_at >= Some(request.epoch) => {
                return refused("its receiver was stopped");
            }
            AgentCommand::Follow { primary, .. } => {
                return self.follow(n, &primary.name.clone());
            }
            AgentCommand::Fence { mode } => {
                let was = i.role;
                i.fenced_at = Some(request.epoch);
                if *mode == StopMode::Fast && was == Role::Primary {
                    let standbys: Vec<_> = self.instances.keys().cloned().collect();
                    for s in standbys.iter().filter(|s| *s != n) {
                        if self.streams(s, n) {
                            self.receive(s, n, usize::MAX / 2);
                        }
                    }
                }
                self.stop(n);
                return Ok(here);
            }
            AgentCommand::StopReceiver if i.role == Role::Standby => {
                i.receiving = false;
                i.stopped_at = Some(request.epoch);
                return Ok(here);
            }
            AgentCommand::WalBeyond { at, .. } if i.role == Role::Stopped => {
                let beyond = i.log.len() as u64 > at.0;
                return Ok(AgentReply::WalBeyond { beyond });
            }
            AgentCommand::Promote => return self.promote(n, request.epoch, locked),
            AgentCommand::SetSynchronous { standbys, .. } if i.role == Role::Primary => {
                i.setting = standbys.iter().cloned().collect();
            }
            AgentCommand::Configure { settings } => {
                i.told = settings.fingerprint();
            }
            AgentCommand::DropSlot { standby } if i.role == Role::Primary => {
                self.dropped.push(standby.clone());
            }
            AgentCommand::Checkpoint if matches!(i.role, Role::Primary | Role::Standby) => {}
            _ => return refused("not in this state"),
        }
        Ok(AgentReply::Done)
    }

    fn follow(&mut self, n: &InstanceName, of: &InstanceName) -> Result<AgentReply, Failure> {
        let p = self.instances[of].clone();
        let cut = self.is_cut(of);
        let i = self.instances.get_mut(n).unwrap();
        if i.role == Role::Primary {
            return Err(Failure::Refused("fence it first".to_owned()));
        }
        if p.role != Role::Primary || cut {
            return Err(Failure::Failed("the primary does not answer".to_owned()));
        }
        let common = i.log.iter().zip(&p.log).take_while(|(a, b)| a == b).count();
        let how = if common < i.log.len() {
            Rejoin::Rewound
        } else {
            Rejoin::Direct
        };
        i.log.truncate(common);
        i.timeline = p.timeline;
        i.setting = BTreeSet::new();
        i.role = Role::Standby;
        i.standby_signal = true;
        i.receiving = true;
        i.following = Some(of.clone());
        i.fenced_at = None;
        i.promoted = None;
        i.lease.release();
        Ok(AgentReply::Following { how })
    }

    fn promote(
        &mut self,
        n: &InstanceName,
        epoch: Epoch,
        locked: bool,
    ) -> Result<AgentReply, Failure> {
        let i = self.instances.get_mut(n).unwrap();
        if let Some(fence) = i.promoted.clone().filter(|f| f.epoch == epoch)
            && i.role == Role::Primary
        {
            return Ok(AgentReply::Promoted { fence, micros: 1 });
        }
        if i.role != Role::Standby || locked {
            return Err(Failure::Refused("not a standby".to_owned()));
        }
        assert!(!i.receiving, "promoted while it receives");
        i.timeline += 1;
        let fence = Fence {
            epoch,
            timeline: Timeline(i.timeline),
            fork: Lsn(i.log.len() as u64),
            xid: None,
            lost: LostCommits::default(),
        };
        i.promoted = Some(fence.clone());
        i.standby_signal = false;
        i.role = Role::Primary;
        if i.dies_when_promoted {
            i.dies_when_promoted = false;
            i.role = Role::Stopped;
            return Err(Failure::Failed("connection lost".to_owned()));
        }
        Ok(AgentReply::Promoted { fence, micros: 1 })
    }
}
