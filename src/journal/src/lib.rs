//! Storage of the journal: memory pools with byte-exact accounting.
