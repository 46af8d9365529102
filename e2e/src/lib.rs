//! Tests against a whole cluster, and what builds that cluster.
