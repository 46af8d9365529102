//! Decisions about a cluster: (durable state, observation, time) → (next durable state, actions).
//!
//! Pure: no I/O, no clock, no runtime, so that every sequence can be stepped through with a death
//! at every point. Whoever executes decisions saves [`Decision::next`] durably before it carries
//! out [`Decision::actions`], and feeds results and observations back in. Where to look:
//! `found` is how there comes to be a first primary, `moves` a change of primary step by step, `steady` the upkeep between, `health` what counts
//! as a failure, `slow` what is left for its latency, `elect` who may become primary, `sync` whose
//! confirmation commits rest on, `lease` how a primary whose agent is silent is known to have
//! stopped, `transition` what may follow on what.

pub mod barrier;
mod decide;
pub mod elect;
mod found;
mod health;
pub mod lease;
mod moves;
pub mod observe;
pub mod operation;
mod requests;
mod slow;
pub mod state;
mod steady;
mod sync;
mod transition;

pub use decide::{Decision, decide};
pub use lease::{LeaseState, Leased, Tenancy};
pub use observe::{
    Action, Contact, Failure, Finished, InstanceView, Observation, ProxyCommand, Refusal, Reply,
    Request,
};
pub use operation::{
    Durability, OperationKind, OperationRecord, Outcome, Phase, PhaseDuration, Time,
};
pub use state::{
    ClusterState, Held, Member, Mode, Move, Position, Primary, Settings, Step, SyncState,
};
pub use transition::Violation;
