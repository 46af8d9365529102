#!/usr/bin/env bash
# A short round of the tests that depend on PostgreSQL's version, for every version that can be had:
# agents (promotion, fence, rewind, clone), a cluster with failovers, replay through the proxy, the
# catalogs that temporary tables are made again from, and the evidence of commits.
#
#   scripts/test-versions.sh [VERSION...]     default: all that scripts/postgres.sh knows
#
# Exit status 0 when all that could be had passed; what could not be had is named.
set -euo pipefail
cd "$(dirname "$0")/.."

tests='package(helios-agent) & (test(rewound) | test(cloned) | test(fence_tells) | test(there_and_back)
        | test(halted))
    | package(helios-local) & (test(twice_in_a_row) | test(moves_crashes))
    | package(helios-proxy) & (test(open_transaction_moves) | test(settings_role)
        | test(restarted_server) | test(a_difference) | binary(temporary))
    | package(helios-e2e) & (binary(autocommit) | binary(calls) | binary(constructs) | binary(counted)
        | binary(endings) | binary(pipelines) | binary(restarts))'
versions=("$@")
[ "${#versions[@]}" -gt 0 ] || mapfile -t versions < <(scripts/postgres.sh --list)

cargo nextest --version >/dev/null 2>&1 || {
    echo "cargo-nextest is missing: cargo install cargo-nextest" >&2
    exit 77
}
failed=()
for version in "${versions[@]}"; do
    status=0
    bin="/usr/lib/postgresql/$version/bin"
    [ -x "$bin/postgres" ] || bin="$(scripts/postgres.sh "$version")" || status=$?
    if [ "$status" = 77 ]; then
        echo "=== PostgreSQL $version: skipped"
        continue
    fi
    echo "=== $("$bin/postgres" --version)"
    # The whole workspace, although three crates would do: it is built already, for `make test`.
    PG_BINDIR="$bin" cargo nextest run --locked --no-fail-fast --workspace \
        -E "$tests" || failed+=("$version")
done
[ "${#failed[@]}" = 0 ] || {
    echo "failed with PostgreSQL ${failed[*]}"
    exit 1
}
