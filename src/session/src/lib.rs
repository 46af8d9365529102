//! What a session is: expected replies, tracked state, journal, replay planner and verifier.
