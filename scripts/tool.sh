#!/usr/bin/env bash
# Runs a cargo subcommand in the version that this project pins, building it once outside of the
# repository.   scripts/tool.sh cargo-deny deny check ...   scripts/tool.sh cargo-fuzz +nightly fuzz ...
set -euo pipefail

crate="$1"
shift
case "$crate" in
    cargo-deny) version=0.20.2 ;;
    cargo-fuzz) version=0.13.2 ;;
    *)
        echo "tool: error: no version is pinned for $crate" >&2
        exit 2
        ;;
esac
root="${XDG_CACHE_HOME:-$HOME/.cache}/helios-operator/$crate-$version"
if [ ! -x "$root/bin/$crate" ]; then
    echo "tool: building $crate $version into $root" >&2
    mkdir -p "$root"
    # Not into the project's target directory.
    env -u CARGO_TARGET_DIR -u RUSTFLAGS \
        cargo install --quiet --locked --root "$root" --version "$version" "$crate" >&2 </dev/null
fi
PATH="$root/bin:$PATH" exec cargo "$@"
