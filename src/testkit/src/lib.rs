//! Test support: real PostgreSQL servers, fault-injecting sockets, seeded schedules.
