//! The agent: one instance's postmaster loop, fencing, promotion, rejoin, control API.
