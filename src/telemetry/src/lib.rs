//! Tracing set-up, the metrics registry, the names of metrics.
