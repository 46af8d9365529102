#!/usr/bin/env bash
# Tests on a real Kubernetes.
#
#   scripts/kubernetes.sh up       a single-node cluster on this machine, built from Debian's packages
#   scripts/kubernetes.sh down     end it and remove what it has made
#   scripts/kubernetes.sh status   0 when it is up
#   scripts/kubernetes.sh deploy   build this tree's program and image, install the chart
#   scripts/kubernetes.sh render   write manifests/install.yaml: the chart with its default values
#   scripts/kubernetes.sh test     all of it: up, deploy, tests, and down unless it was up before
#
# As root on Debian 12. HELIOS_KEEP=1 leaves the cluster up after the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=../e2e/kubernetes/common.sh
. e2e/kubernetes/common.sh

namespace=helios-system

deploy() {
    cargo build --locked -p helios
    e2e/kubernetes/images.sh postgres
    e2e/kubernetes/images.sh helios "${CARGO_TARGET_DIR:-target}/debug/helios"
    local helm
    helm="$(e2e/kubernetes/helm.sh)"
    # Helm would refuse the CEL rules that this old API server only drops.
    export KUBECONFIG="$kubeconfig"
    "$helm" upgrade --install helios-operator charts/helios-operator --namespace "$namespace" --create-namespace \
        --set image.repository="${helios_image%:*}" --set image.tag="${helios_image##*:}" \
        --set 'logLevel=info\,helios_operator=debug' --disable-openapi-validation --wait --timeout 3m >&2
    # The tag is the same each time: only new Pods run the new image.
    kubectl --namespace "$namespace" rollout restart deployment/helios-operator >&2
    kubectl --namespace "$namespace" rollout status deployment/helios-operator --timeout 2m >&2
}

# For people without Helm.
rendered() {
    echo "# Rendered from charts/helios-operator by scripts/kubernetes.sh render. Do not edit."
    printf -- '---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: %s\n' "$namespace"
    "$(e2e/kubernetes/helm.sh)" template helios-operator charts/helios-operator --namespace "$namespace" \
        --api-versions policy/v1/PodDisruptionBudget
}

# What a person needs who was not there.
collect() {
    local folder="${HELIOS_E2E_LOGS:-${CARGO_TARGET_DIR:-target}/kubernetes-failure}"
    rm -rf "$folder"
    mkdir -p "$folder"
    export KUBECONFIG="$kubeconfig"
    kubectl get all,hc,pvc,networkpolicies --all-namespaces -o wide >"$folder/objects.txt" 2>&1 || true
    kubectl get hc --all-namespaces -o yaml >"$folder/clusters.yaml" 2>&1 || true
    kubectl get events --all-namespaces --sort-by=.lastTimestamp >"$folder/events.txt" 2>&1 || true
    local pod
    kubectl get pods --all-namespaces -o custom-columns=N:.metadata.namespace,P:.metadata.name --no-headers \
        | while read -r space pod; do
            kubectl logs --namespace "$space" "$pod" --all-containers --tail=2000 \
                >"$folder/$space-$pod.log" 2>&1 || true
            kubectl logs --namespace "$space" "$pod" --all-containers --previous --tail=500 \
                >"$folder/$space-$pod-previous.log" 2>/dev/null || true
        done
    cp -r "$cluster_dir/logs" "$folder/cluster" || true
    say "logs, events and objects are in $folder"
}

run_tests() {
    local was_up="" status=0
    if e2e/kubernetes/cluster.sh status 2>/dev/null; then was_up=yes; fi
    rendered | diff -u manifests/install.yaml - || die "manifests/install.yaml has drifted: scripts/kubernetes.sh render"
    e2e/kubernetes/cluster.sh up >/dev/null
    deploy
    KUBECONFIG="$kubeconfig" HELIOS_POSTGRES_IMAGE="$postgres_image" \
        cargo test --locked -p helios-e2e --test kubernetes -- --ignored --nocapture --test-threads 1 \
        || status=$?
    if [ "$status" != 0 ]; then collect; fi
    if [ -z "$was_up" ] && [ -z "${HELIOS_KEEP:-}" ]; then e2e/kubernetes/cluster.sh down; fi
    return "$status"
}

case "${1:-}" in
    up | down | status) e2e/kubernetes/cluster.sh "$1" ;;
    deploy) deploy ;;
    render) rendered >manifests/install.yaml ;;
    test) run_tests ;;
    *) die "usage: scripts/kubernetes.sh up | down | status | deploy | render | test" ;;
esac
