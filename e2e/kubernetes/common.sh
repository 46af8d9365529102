# shellcheck shell=bash
# Names and places that the scripts of this folder share. Sourced, not run.

# Everything of the cluster lives under one folder; removing it leaves nothing but the caches.
cluster_dir="${HELIOS_KUBERNETES_DIR:-/var/lib/helios-kubernetes}"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/helios-operator"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repository="$(cd "$here/../.." && pwd)"

# Not a loopback address, or Pods could not reach the API server; on lo, because nothing may be
# routed to it from outside.
node_address=10.243.0.1
node_name=helios-node
pod_range=10.244.0.0/24
service_range=10.96.0.0/16
api_service=10.96.0.1
bridge=helios0

containerd_socket="$cluster_dir/containerd.sock"
kubeconfig="$cluster_dir/kubeconfig"

pause_image=registry.local/pause:1
# 15, 17 or 18.
postgres_major="${HELIOS_POSTGRES_MAJOR:-15}"
postgres_image=registry.local/postgres:$postgres_major
helios_image=registry.local/helios:test

say() { printf 'kubernetes: %s\n' "$*" >&2; }

die() {
    printf 'kubernetes: error: %s\n' "$*" >&2
    exit 1
}

ctr_images() { ctr --address "$containerd_socket" --namespace k8s.io "$@"; }
