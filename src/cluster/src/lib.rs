//! Decisions about a cluster: (observation, time) to (next durable state, actions).
