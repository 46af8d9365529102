//! PostgreSQL v3 protocol: framing, the messages we look into, SCRAM.
