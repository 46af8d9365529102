//! The proxy: listener, TLS, authentication, backends, drain, migration engine, control API.
