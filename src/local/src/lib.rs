//! A whole cluster on one machine, without Kubernetes; the embedding API.
