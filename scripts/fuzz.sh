#!/usr/bin/env bash
# Runs every fuzz target, SECONDS in all.   scripts/fuzz.sh 60
set -euo pipefail
cd "$(dirname "$0")/.."

seconds="${1:-60}"
if [ ! -e fuzz/Cargo.toml ]; then
    echo "fuzz: error: there is no fuzz/Cargo.toml" >&2
    exit 1
fi
if ! rustup run nightly rustc --version >/dev/null 2>&1; then
    echo "fuzz: skipped: fuzzing needs a nightly toolchain (rustup toolchain install nightly)" >&2
    exit 77
fi
command -v c++ >/dev/null || {
    echo "fuzz: skipped: libFuzzer needs a C++ compiler (Debian: apt-get install g++)" >&2
    exit 77
}
if [ -n "${CARGO_TARGET_DIR:-}" ]; then
    export CARGO_TARGET_DIR="$CARGO_TARGET_DIR/fuzz"
fi
mapfile -t targets < <(scripts/tool.sh cargo-fuzz +nightly fuzz list)
[ "${#targets[@]}" -gt 0 ] || {
    echo "fuzz: error: no targets" >&2
    exit 1
}
each=$((seconds / ${#targets[@]}))
for target in "${targets[@]}"; do
    echo "fuzz: $target for $each s"
    scripts/tool.sh cargo-fuzz +nightly fuzz run "$target" -- \
        -max_total_time="$each" -rss_limit_mb=2048 -timeout=10 -verbosity=0 -print_final_stats=1
done
