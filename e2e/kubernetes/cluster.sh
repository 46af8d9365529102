#!/usr/bin/env bash
# A single-node Kubernetes on this machine, for tests: real API server, kubelet and containers.
#
#   cluster.sh up       start it (and build what is missing); prints the kubeconfig's path
#   cluster.sh down     end all its processes, remove all it has made
#   cluster.sh status   0 when it is up
#
# As root on Debian 12. Nothing listens on an address that other machines can reach but the Pods'.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

packages=(etcd-server containerd runc containernetworking-plugins iptables iproute2 conntrack socat
    golang-go golang-github-modern-go-reflect2-dev rsync make dpkg-dev buildah prometheus debootstrap openssl gcc libc6-dev)

install_packages() {
    local missing=() package
    for package in "${packages[@]}"; do
        dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
    done
    if ! command -v kubectl >/dev/null; then missing+=(kubernetes-client); fi
    if [ "${#missing[@]}" -gt 0 ]; then
        say "installing ${missing[*]}"
        # The services of these packages are not wanted, only their programs.
        local policy=/usr/sbin/policy-rc.d ours=""
        if [ ! -e "$policy" ]; then
            printf '#!/bin/sh\nexit 101\n' >"$policy"
            chmod +x "$policy"
            ours=yes
        fi
        local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
        "${apt[@]}" update >&2 || say "apt-get update failed; trying with the lists at hand"
        local status=0
        "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >&2 </dev/null || status=$?
        if [ -n "$ours" ]; then rm -f "$policy"; fi
        [ "$status" = 0 ] || die "the packages could not be installed"
    fi
}

# certificate NAME SUBJECT [SAN]: a key and a certificate of the cluster's authority.
certificate() {
    local name="$1" subject="$2" san="${3:-}"
    local pki="$cluster_dir/pki"
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "$subject" \
        -keyout "$pki/$name.key" -out "$pki/$name.csr" 2>/dev/null
    openssl x509 -req -in "$pki/$name.csr" -CA "$pki/ca.crt" -CAkey "$pki/ca.key" -CAcreateserial \
        -days 30 -out "$pki/$name.crt" \
        -extfile <(printf 'extendedKeyUsage=serverAuth,clientAuth\n%s' "${san:+subjectAltName=$san}") \
        2>/dev/null
}

certificates() {
    local pki="$cluster_dir/pki"
    mkdir -p "$pki"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 \
        -subj "/CN=helios-test-ca" -keyout "$pki/ca.key" -out "$pki/ca.crt" 2>/dev/null
    certificate apiserver "/CN=kube-apiserver" \
        "IP:$node_address,IP:$api_service,IP:127.0.0.1,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc"
    certificate admin "/O=system:masters/CN=admin"
    certificate kubelet "/O=system:nodes/CN=system:node:$node_name" "IP:$node_address,DNS:$node_name"
    openssl genrsa -out "$pki/service-accounts.key" 2048 2>/dev/null
    write_kubeconfig admin "$kubeconfig"
    write_kubeconfig kubelet "$cluster_dir/kubelet.kubeconfig"
}

# write_kubeconfig CERTIFICATE FILE
write_kubeconfig() {
    local pki="$cluster_dir/pki"
    cat >"$2" <<YAML
apiVersion: v1
kind: Config
clusters:
  - name: helios-test
    cluster: {server: "https://$node_address:6443", certificate-authority: "$pki/ca.crt"}
users:
  - name: $1
    user: {client-certificate: "$pki/$1.crt", client-key: "$pki/$1.key"}
contexts:
  - name: helios-test
    context: {cluster: helios-test, user: "$1"}
current-context: helios-test
YAML
    chmod 600 "$2"
}

# start NAME COMMAND...: in a session of its own, its log and process id in files.
start() {
    local name="$1"
    shift
    setsid "$@" >"$cluster_dir/logs/$name.log" 2>&1 </dev/null &
    echo $! >"$cluster_dir/run/$name.pid"
}

# until_true SECONDS WHAT COMMAND...
until_true() {
    local seconds="$1" what="$2" deadline
    shift 2
    deadline=$((SECONDS + seconds))
    until "$@" >/dev/null 2>&1; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            tail -n 5 "$cluster_dir"/logs/*.log >&2 || true
            die "$what is not there after $seconds s"
        fi
        sleep 0.2
    done
}

start_containerd() {
    mkdir -p "$cluster_dir/cni"
    cat >"$cluster_dir/cni/10-helios.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "helios", "plugins": [
  {"type": "bridge", "bridge": "$bridge", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$cluster_dir/cni-addresses",
            "ranges": [[{"subnet": "$pod_range"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
    # restrict_oom_score_adj: lowering it needs a capability that a container of ours may not have.
    cat >"$cluster_dir/containerd.toml" <<TOML
version = 2
root = "$cluster_dir/containerd"
state = "$cluster_dir/containerd-state"
[grpc]
  address = "$containerd_socket"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$pause_image"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$cluster_dir/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "${HELIOS_SNAPSHOTTER:-overlayfs}"
TOML
    start containerd containerd --config "$cluster_dir/containerd.toml"
    until_true 30 containerd ctr --address "$containerd_socket" version
}

start_control_plane() {
    local bin="$1" pki="$cluster_dir/pki"
    # What the operator asks for, for the test that compares it with what it may.
    cat >"$cluster_dir/audit.yaml" <<'YAML'
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - {level: Metadata, users: ["system:serviceaccount:helios-system:helios-operator"]}
  - {level: None}
YAML
    # What a test writes need not survive a power cut.
    start etcd etcd --data-dir "$cluster_dir/etcd" --unsafe-no-fsync \
        --listen-client-urls http://127.0.0.1:23790 --advertise-client-urls http://127.0.0.1:23790 \
        --listen-peer-urls http://127.0.0.1:23800 \
        --initial-advertise-peer-urls http://127.0.0.1:23800 \
        --initial-cluster default=http://127.0.0.1:23800
    start kube-apiserver "$bin/kube-apiserver" --etcd-servers http://127.0.0.1:23790 \
        --bind-address "$node_address" --advertise-address "$node_address" --secure-port 6443 \
        --service-cluster-ip-range "$service_range" --allow-privileged=true \
        --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction \
        --client-ca-file "$pki/ca.crt" \
        --audit-policy-file "$cluster_dir/audit.yaml" --audit-log-path "$cluster_dir/logs/audit.log" \
        --tls-cert-file "$pki/apiserver.crt" --tls-private-key-file "$pki/apiserver.key" \
        --kubelet-certificate-authority "$pki/ca.crt" \
        --kubelet-client-certificate "$pki/admin.crt" --kubelet-client-key "$pki/admin.key" \
        --kubelet-preferred-address-types InternalIP \
        --service-account-issuer https://kubernetes.default.svc \
        --service-account-key-file "$pki/service-accounts.key" \
        --service-account-signing-key-file "$pki/service-accounts.key"
    until_true 60 "the API server" kubectl --kubeconfig "$kubeconfig" get --raw /readyz
    start kube-controller-manager "$bin/kube-controller-manager" --kubeconfig "$kubeconfig" \
        --bind-address 127.0.0.1 --leader-elect=false --cluster-cidr "$pod_range" \
        --service-account-private-key-file "$pki/service-accounts.key" \
        --root-ca-file "$pki/ca.crt" --use-service-account-credentials
    start kube-scheduler "$bin/kube-scheduler" --kubeconfig "$kubeconfig" --leader-elect=false \
        --bind-address 127.0.0.1
}

start_node() {
    local bin="$1" pki="$cluster_dir/pki"
    cat >"$cluster_dir/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $node_address
cgroupDriver: cgroupfs
failSwapOn: false
enforceNodeAllocatable: []
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $pki/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $pki/kubelet.crt
tlsPrivateKeyFile: $pki/kubelet.key
clusterDomain: cluster.local
evictionHard: {imagefs.available: "0%", nodefs.available: "0%", memory.available: "100Mi"}
imageGCHighThresholdPercent: 100
maxPods: 110
YAML
    start kubelet "$bin/kubelet" --config "$cluster_dir/kubelet.yaml" \
        --kubeconfig "$cluster_dir/kubelet.kubeconfig" --root-dir "$cluster_dir/kubelet" \
        --hostname-override "$node_name" --node-ip "$node_address" \
        --container-runtime remote --container-runtime-endpoint "unix://$containerd_socket"
    cat >"$cluster_dir/kube-proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clusterCIDR: $pod_range
hostnameOverride: $node_name
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
clientConnection: {kubeconfig: $kubeconfig}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
YAML
    start kube-proxy "$bin/kube-proxy" --config "$cluster_dir/kube-proxy.yaml"
    until_true 60 "the node" sh -c "kubectl --kubeconfig $kubeconfig get node $node_name \
        -o jsonpath='{.status.conditions[?(@.type==\"Ready\")].status}' | grep -q True"
}

# There is no provisioner: volumes are made ahead, and a claim takes one of them.
make_volumes() {
    local number
    {
        cat <<'YAML'
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: local, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: Immediate
YAML
        for number in $(seq 1 60); do
            mkdir -p "$cluster_dir/volumes/$number"
            chmod 777 "$cluster_dir/volumes/$number"
            cat <<YAML
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: "local-$number"}
spec:
  storageClassName: local
  accessModes: [ReadWriteOnce]
  capacity: {storage: 10Gi}
  persistentVolumeReclaimPolicy: Retain
  hostPath: {path: "$cluster_dir/volumes/$number", type: Directory}
YAML
        done
    } | kubectl --kubeconfig "$kubeconfig" apply -f - >/dev/null
}

is_up() {
    [ -e "$kubeconfig" ] && kubectl --kubeconfig "$kubeconfig" --request-timeout 5s get --raw /readyz >/dev/null 2>&1
}

up() {
    [ "$(id -u)" = 0 ] || die "root is needed: containers, network interfaces, iptables"
    if is_up; then
        echo "$kubeconfig"
        return
    fi
    install_packages
    local bin
    bin="$("$here/binaries.sh")"
    [ ! -d "$cluster_dir" ] || down
    mkdir -p "$cluster_dir/logs" "$cluster_dir/run" "$cluster_dir/volumes"
    ip address replace "$node_address/32" dev lo
    sysctl -q -w net.ipv4.ip_forward=1 >&2 || true
    certificates
    start_containerd
    "$here/images.sh" pause
    start_control_plane "$bin"
    start_node "$bin"
    make_volumes
    say "up: KUBECONFIG=$kubeconfig"
    echo "$kubeconfig"
}

# end NAME: by its process id, which must still be that program.
end() {
    local file="$cluster_dir/run/$1.pid" pid
    [ -e "$file" ] || return 0
    pid="$(cat "$file")"
    if grep -qa -- "$1" "/proc/$pid/cmdline" 2>/dev/null; then
        kill "$pid" 2>/dev/null || true
        local deadline=$((SECONDS + 10))
        while kill -0 "$pid" 2>/dev/null; do
            if [ "$SECONDS" -ge "$deadline" ]; then kill -9 "$pid" 2>/dev/null || true; fi
            sleep 0.1
        done
    fi
    rm -f "$file"
}

down() {
    [ -d "$cluster_dir" ] || return 0
    end kubelet
    end kube-proxy
    if [ -S "$containerd_socket" ]; then
        local task
        for task in $(ctr_images tasks list --quiet 2>/dev/null); do
            ctr_images tasks kill --signal SIGKILL "$task" >/dev/null 2>&1 || true
        done
        for task in $(ctr_images containers list --quiet 2>/dev/null); do
            ctr_images tasks delete --force "$task" >/dev/null 2>&1 || true
            ctr_images containers delete "$task" >/dev/null 2>&1 || true
        done
    fi
    local name
    for name in kube-scheduler kube-controller-manager kube-apiserver etcd containerd; do end "$name"; done
    # What is mounted below the folder goes before the folder does, the deepest first.
    local mount
    for mount in $(awk '{print $2}' /proc/mounts | grep -F "$cluster_dir/" | sort -r); do
        umount -l "$mount" 2>/dev/null || true
    done
    local namespace
    for namespace in $(ip netns list 2>/dev/null | awk '/^cni-/ {print $1}'); do
        ip netns delete "$namespace" 2>/dev/null || true
    done
    ip link delete "$bridge" 2>/dev/null || true
    ip address delete "$node_address/32" dev lo 2>/dev/null || true
    remove_rules
    rm -rf "$cluster_dir"
    say "down"
}

# The rules of kube-proxy, kubelet and the bridge plug-in.
remove_rules() {
    local table
    for table in nat filter mangle; do
        { iptables-save -t "$table" 2>/dev/null || true; } \
            | { grep -v -e KUBE- -e CNI- -e "$bridge" || true; } \
            | iptables-restore -T "$table" 2>/dev/null || true
    done
}

case "${1:-}" in
    up) up ;;
    down) down ;;
    status) is_up || die "it is not up" ;;
    *) die "usage: cluster.sh up | down | status" ;;
esac
