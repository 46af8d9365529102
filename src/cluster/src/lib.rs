//! Decisions about a cluster: (durable state, observation, time) → (next durable state, actions).
//!
//! Pure: no I/O, no clock, no runtime, so that every sequence can be stepped through with a death
//! at every point. Whoever executes decisions saves [`Decision::next`] durably before it carries
//! out [`Decision::actions`], and feeds results and observations back in.

pub mod operation;

pub use operation::{
    Durability, OperationKind, OperationRecord, Outcome, Phase, PhaseDuration, Time,
};
