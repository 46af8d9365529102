#!/usr/bin/env bash
# The charts without a cluster: what is generated is current, every value is understood, what is none
# is refused, alerts are what Prometheus understands and have their runbooks.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=../e2e/kubernetes/common.sh
. e2e/kubernetes/common.sh

operator=charts/helios-operator
cluster=charts/helios-cluster
helm="$(e2e/kubernetes/helm.sh)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
failed=0
checks=0

# check WHAT COMMAND...
check() {
    local what="$1"
    shift
    checks=$((checks + 1))
    "$@" >"$work/out" 2>&1 && return
    printf 'charts: failed: %s\n' "$what" >&2
    tail -n 20 "$work/out" >&2
    failed=$((failed + 1))
}
not() { ! "$@"; }

template() { "$helm" template test "$@"; }
# renders PATTERN HELM-ARGUMENT...: what comes out has a line like it.
renders() {
    local pattern="$1"
    shift
    template "$@" >"$work/rendered" && grep -qE -- "$pattern" "$work/rendered"
}

generated() {
    check "the dashboards are what is generated" python3 scripts/dashboards.py --check
    scripts/kubernetes.sh render-to "$work/install.yaml"
    check "manifests/install.yaml is what is rendered" diff -u manifests/install.yaml "$work/install.yaml"
}

operator_values() {
    check "lint" "$helm" lint --strict $operator
    local kind
    for kind in ServiceAccount ClusterRole ClusterRoleBinding Deployment NetworkPolicy CustomResourceDefinition; do
        check "there is a $kind" renders "^kind: $kind\$" $operator
    done
    local everything=(--set monitoring.podMonitor.enabled=true --set monitoring.prometheusRule.create=true
        --set monitoring.grafanaDashboard.create=true --api-versions policy/v1/PodDisruptionBudget)
    for kind in PodMonitor PrometheusRule ConfigMap PodDisruptionBudget; do
        check "there is no $kind unless it is asked for" not renders "^kind: $kind\$" $operator
        check "there is a $kind when it is" renders "^kind: $kind\$" $operator "${everything[@]}"
    done
    check "dashboards have the label of Grafana's sidecar" renders 'grafana_dashboard: "1"' $operator "${everything[@]}"
    check "runbooks are where one says" renders 'runbook_url: https://wiki/x#helios' $operator "${everything[@]}" \
        --set monitoring.prometheusRule.runbookUrl=https://wiki/x
    check "no ServiceAccount of its own" not renders '^kind: ServiceAccount$' $operator --set serviceAccount.create=false
    check "but another one" renders 'serviceAccountName: theirs' $operator --set serviceAccount.create=false --set serviceAccount.name=theirs
    check "no roles" not renders '^kind: (Cluster)?Role' $operator --set rbac.create=false
    check "no definitions" not renders '^kind: CustomResourceDefinition' $operator --set crds.install=false
    check "one namespace needs no ClusterRole" not renders '^kind: ClusterRole' $operator --set watchNamespace=shop
    check "but a Role there" renders '^  namespace: "?shop' $operator --set watchNamespace=shop
    check "no policy" not renders '^kind: NetworkPolicy' $operator --set networkPolicy.create=false
    check "no budget for one copy" not renders '^kind: PodDisruptionBudget' $operator "${everything[@]}" --set replicaCount=1
    local set pattern
    while read -r set pattern; do
        check "$set" renders "$pattern" $operator --set "$set"
    done <<'LIST'
nodeSelector.disk=ssd disk: ssd
tolerations[0].key=k,tolerations[0].operator=Exists key: k
priorityClassName=system-cluster-critical priorityClassName: system-cluster-critical
topologySpreadConstraints[0].maxSkew=1,topologySpreadConstraints[0].topologyKey=zone,topologySpreadConstraints[0].whenUnsatisfiable=ScheduleAnyway topologyKey: zone
affinity.nodeAffinity.x=y nodeAffinity:
resources.limits.memory=99Mi memory: 99Mi
podLabels.a=b a: b
podAnnotations.c=d c: d
serviceAccount.annotations.e=f e: f
imagePullSecrets[0].name=pull name: pull
image.tag=v9 :v9
logLevel=debug value: "debug"
replicaCount=3 replicas: 3
fullnameOverride=other name: other
nameOverride=short app.kubernetes.io/name: short
LIST
    for set in replicaCount=0 replicas=2 image.pull=Always image.repository= image.pullPolicy=Often \
        watchNamespace=No_Name monitoring.podMonitor.interval=soon monitoring.podMonitor.create=true \
        monitoring.prometheusRule.runbookUrl=wiki resources.limit.memory=1Gi resources.limits.memory=lots \
        'tolerations[0].effect=Never' 'topologySpreadConstraints[0].maxSkew=1' rbac=true 'imagePullSecrets[0]=pull' \
        affinity.node=x serviceAccount.named=x logLevel=; do
        check "$set is refused" not template $operator --set "$set"
    done
}

cluster_values() {
    check "lint" "$helm" lint --strict $cluster
    check "the name of the release" renders '^  name: test$' $cluster
    check "another name" renders '^  name: shop$' $cluster --set nameOverride=shop
    check "a large number stays whole" renders '"maxTotalJournalBytes": 1073741824$' $cluster \
        --set proxy.transactionReplay.maxTotalJournalBytes=1073741824
    # Each sample's spec, given as values, is that spec again.
    local sample
    for sample in manifests/samples/*.yaml; do
        sed -n '/^spec:/,$p' "$sample" | sed 1d | sed 's/^  //' >"$work/values.yaml"
        check "$sample as values" template $cluster --values "$work/values.yaml"
    done
    local set
    for set in instances=0 instance=2 storage.siez=1Gi proxy.replicas=many imageName= nameOverride=No_Name \
        postgresql.synchronous.dataDurability=maybe proxy.transactionReplay.mode=all labels.a.b=c; do
        check "$set is refused" not template $cluster --set "$set"
    done
}

alerts() {
    if ! command -v promtool >/dev/null; then
        say "promtool is missing (Debian: prometheus): the alerts' expressions are not checked"
    else
        check "alerts" promtool check rules $operator/files/alerts.yaml
    fi
    local name anchors
    anchors="$(grep -E '^#+ ' docs/operations.md | sed -E 's/^#+ //' | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9\n-')"
    for name in $(sed -n 's/.*runbook_url: RUNBOOKS#//p' $operator/files/alerts.yaml); do
        check "a runbook for $name" grep -qx "$name" <<<"$anchors"
    done
    check "every alert has a runbook" test "$(grep -c 'alert:' $operator/files/alerts.yaml)" \
        = "$(grep -c 'runbook_url:' $operator/files/alerts.yaml)"
}

generated
operator_values
cluster_values
alerts
say "charts: $((checks - failed)) of $checks checks passed"
[ "$failed" = 0 ]
