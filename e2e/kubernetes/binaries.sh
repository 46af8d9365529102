#!/usr/bin/env bash
# Builds Kubernetes from Debian's source package with Debian's Go, once, outside of the repository.
# Prints the directory that holds the binaries. Its name is the hash of what went in.
#
# Why from source: no image registry and no download site is needed, and every byte comes from
# Debian's signed archive. About six minutes on two quiet cores.
set -euo pipefail

version=1.20.2
programs=(kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy)
cache="${XDG_CACHE_HOME:-$HOME/.cache}/helios-operator"

say() { printf 'kubernetes: %s\n' "$*" >&2; }

# Debian's own revision is left out: it holds a security fix now and then, and the archive keeps
# only the newest.
key="$(printf '%s\n' "$version" reflect2-1.0.2 "${programs[*]}" "$(go version)" | sha256sum | cut -c1-16)"
target="$cache/kubernetes-$key"
mkdir -p "$cache"
exec 9>"$target.lock"
flock 9
if [ -e "$target/complete" ]; then
    echo "$target"
    exit
fi

# A Go workspace in the form of before modules: Debian's package is built so.
work="$(mktemp -d "$cache/kubernetes-build-XXXXXX")"
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT
# apt's own lists stay as they are: the source archive is looked up with a configuration of its own.
mkdir -p "$work/apt/lists/partial" "$work/download"
chmod -R a+rwX "$work"
echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main" \
    >"$work/apt/sources.list"
apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/apt/sources.list" -o Dir::Etc::sourceparts=-
    -o "Dir::State::lists=$work/apt/lists" -o APT::Sandbox::User=root)
say "fetching the source of Kubernetes $version from Debian"
"${apt[@]}" update >&2
(cd "$work/download" && "${apt[@]}" source --download-only kubernetes >&2 \
    && dpkg-source --no-check -x kubernetes_*.dsc tree >&2)
mkdir -p "$work/src/k8s.io"
mv "$work/download/tree" "$work/src/k8s.io/kubernetes"

# The copy of reflect2 in the tree calls Go's map iterator as it was before Go 1.18, which damages
# the API server's memory now and then (kubernetes/kubernetes#107796); Debian has the mended one.
reflect2=github.com/modern-go/reflect2
rm -rf "$work/src/k8s.io/kubernetes/vendor/$reflect2"
cp -r "/usr/share/gocode/src/$reflect2" "$work/src/k8s.io/kubernetes/vendor/$reflect2"

say "building $version: ${programs[*]} (some minutes)"
export GOPATH="$work" GO111MODULE=off CGO_ENABLED=0 GOFLAGS= GOCACHE="$work/go-cache" GOTMPDIR="$work"
cd "$work/src/k8s.io/kubernetes"
# Without the version the server calls itself v0.0.0, and clients cannot tell what it offers.
stamp=""
for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    for prefix in "" k8s.io/kubernetes/vendor/; do
        stamp="$stamp -X $prefix$package.gitVersion=v$version -X $prefix$package.gitMajor=1"
        stamp="$stamp -X $prefix$package.gitMinor=20 -X $prefix$package.gitTreeState=clean"
    done
done
make generated_files >"$work/build.log" 2>&1 || { tail -30 "$work/build.log" >&2; exit 1; }
mkdir -p "$work/out"
for program in "${programs[@]}"; do
    go build -trimpath -ldflags "-s -w$stamp" -o "$work/out/$program" "./cmd/$program" \
        >>"$work/build.log" 2>&1 || { tail -30 "$work/build.log" >&2; exit 1; }
done

rm -rf "$target"
mv "$work/out" "$target"
touch "$target/complete"
say "built into $target"
echo "$target"
