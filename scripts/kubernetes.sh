#!/usr/bin/env bash
# Tests on a real Kubernetes: that of KUBECONFIG, or, without one, a single node on this machine,
# built from Debian's packages.
#
#   scripts/kubernetes.sh up       start that single node, to keep; prints the path of its kubeconfig
#   scripts/kubernetes.sh down     end it and remove what it has made
#   scripts/kubernetes.sh status   0 when it is up
#   scripts/kubernetes.sh deploy   build this tree's program and image, install the chart
#   scripts/kubernetes.sh render   write manifests/install.yaml: the chart with its default values
#   scripts/kubernetes.sh test [NAME...]   up, deploy, tests, and down unless it was up before
#   scripts/kubernetes.sh ci       a short choice of them on a node of its own, or 77 where none can be
#
# The single node needs root on Debian 12. HELIOS_KEEP=1 leaves it up after the tests. On the cluster
# of KUBECONFIG nodes have to find the images: HELIOS_IMAGE names this tree's (pushed beforehand),
# HELIOS_POSTGRES_IMAGE a stock one.
# HELIOS_POSTGRES_MAJOR=17 (or 18) has the single node take another PostgreSQL than 15.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=../e2e/kubernetes/common.sh
. e2e/kubernetes/common.sh

namespace=helios-system

# Whether the tests run on somebody else's cluster.
is_foreign() { [ -n "${KUBECONFIG:-}" ] && [ "$KUBECONFIG" != "$kubeconfig" ]; }

# What is tested, and on which PostgreSQL.
if is_foreign; then
    kubeconfig="$KUBECONFIG"
    helios_image="${HELIOS_IMAGE:-}"
    postgres_image="${HELIOS_POSTGRES_IMAGE:-docker.io/library/postgres:17}"
fi

deploy() {
    cargo build --locked -p helios
    if is_foreign; then
        [ -n "$helios_image" ] || die "HELIOS_IMAGE has to name an image of this tree that the nodes can pull"
    else
        e2e/kubernetes/images.sh postgres
        e2e/kubernetes/images.sh helios "${HELIOS_PROGRAM:-${CARGO_TARGET_DIR:-target}/debug/helios}"
    fi
    local helm
    helm="$(e2e/kubernetes/helm.sh)"
    export KUBECONFIG="$kubeconfig"
    local options=()
    # Helm would refuse the CEL rules that an old API server only drops.
    is_foreign || options+=(--disable-openapi-validation)
    "$helm" upgrade --install helios-operator charts/helios-operator --namespace "$namespace" --create-namespace \
        --set image.repository="${helios_image%:*}" --set image.tag="${helios_image##*:}" \
        --set 'logLevel=info\,helios_operator=debug' "${options[@]}" --wait --timeout 3m >&2
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

# test NAME...: those tests, or all of them, on a cluster that is up.
run_on() {
    deploy
    local status=0 audit=""
    if ! is_foreign && [ -e "$cluster_dir/logs/audit.log" ]; then audit="$cluster_dir/logs/audit.log"; fi
    if ! is_foreign; then
        export HELIOS_IMAGE_NEXT="$helios_image-next" HELIOS_POSTGRES_IMAGE_NEXT="$postgres_image-next"
    fi
    HELIOS_AUDIT_LOG="$audit" KUBECONFIG="$kubeconfig" HELIOS_POSTGRES_IMAGE="$postgres_image" \
        cargo test --locked -p helios-e2e --test kubernetes -- --ignored --nocapture --test-threads 1 "$@" \
        || status=$?
    if [ "$status" != 0 ]; then collect; fi
    return "$status"
}

run_tests() {
    rendered | diff -u manifests/install.yaml - || die "manifests/install.yaml has drifted: scripts/kubernetes.sh render"
    if is_foreign; then
        run_on "$@"
        return
    fi
    local was_up="" status=0
    if e2e/kubernetes/cluster.sh status 2>/dev/null; then was_up=yes; fi
    e2e/kubernetes/cluster.sh up >/dev/null
    run_on "$@" || status=$?
    if [ -z "$was_up" ] && [ -z "${HELIOS_KEEP:-}" ]; then e2e/kubernetes/cluster.sh down; fi
    return "$status"
}

# skip WHY...: says so, with the status that stands for it.
skip() {
    say "skipped: $*"
    exit 77
}

# What CI runs beside everything else: from an empty machine to two moves under load. Its own limit
# holds for all of it, a build of Kubernetes (6 to 10 minutes, once) included.
ci() {
    [ "$(id -u)" = 0 ] || skip "not root: containers need it"
    unshare --net --mount true 2>/dev/null || skip "no namespaces can be made here"
    grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release || skip "not Debian 12, whose packages the node is built from"
    mkdir -p "$cache"
    exec 8>"$cache/kubernetes-ci.lock"
    flock -w 600 8 || die "another run holds the node for ten minutes"
    unset KUBECONFIG
    # What an earlier run has left behind is not built on.
    e2e/kubernetes/cluster.sh down
    local status=0
    timeout --kill-after 60 "${HELIOS_CI_SECONDS:-2400}" scripts/kubernetes.sh test readme:: plugin:: 8>&- || status=$?
    [ "$status" != 124 ] || say "not done within ${HELIOS_CI_SECONDS:-2400} s"
    e2e/kubernetes/cluster.sh down
    return "$status"
}

case "${1:-}" in
    up | down | status) e2e/kubernetes/cluster.sh "$1" ;;
    deploy) deploy ;;
    render) rendered >manifests/install.yaml ;;
    render-to) rendered >"$2" ;;
    test)
        shift
        run_tests "$@"
        ;;
    ci) ci ;;
    *) die "usage: scripts/kubernetes.sh up | down | status | deploy | render | test [NAME...] | ci" ;;
esac
