//! The `helios` command line.
fn main() {}
