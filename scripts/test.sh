#!/usr/bin/env bash
# All tests of the workspace; with cargo-nextest when it is there, else with cargo test.
set -euo pipefail
cd "$(dirname "$0")/.."

status=0
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --workspace --locked --no-fail-fast || status=$?
    # nextest leaves the examples in the documentation out.
    cargo test --workspace --doc --locked --no-fail-fast || status=$?
else
    cargo test --workspace --locked --no-fail-fast || status=$?
fi
exit "$status"
