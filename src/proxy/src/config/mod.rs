//! `helios_proxy.toml`.
