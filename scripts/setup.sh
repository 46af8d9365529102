#!/usr/bin/env bash
# Brings what a target needs beyond Rust, and says plainly what is missing where it cannot.
#
#   scripts/setup.sh demo      a C linker and a PostgreSQL server
#   scripts/setup.sh clients   the above, and what the client programs need; prints their directory
#   scripts/setup.sh bench     the first, and PgBouncer
#
# Packages come from apt on Debian and its relatives, with sudo when not root. What the client
# programs need besides is kept outside of the repository, in a directory named by its content.
set -euo pipefail
cd "$(dirname "$0")/.."

cache="${XDG_CACHE_HOME:-$HOME/.cache}/helios-operator"
updated=""

say() { printf 'setup: %s\n' "$*" >&2; }

die() {
    printf 'setup: error: %s\n' "$1" >&2
    shift
    for line in "$@"; do printf 'setup:        %s\n' "$line" >&2; done
    exit 1
}

# want WHAT-FOR PACKAGE...: notes what is missing, so that all of it is said and installed at once.
purposes=()
packages=()
want() {
    purposes+=("$1")
    shift
    packages+=("$@")
}

install_wanted() {
    [ "${#packages[@]}" -gt 0 ] || return 0
    local all
    all="$(printf ', %s' "${purposes[@]}")"
    apt_install "${all:2}" "${packages[@]}"
}

# apt_install WHAT-FOR PACKAGE...
apt_install() {
    local purpose="$1"
    shift
    command -v apt-get >/dev/null || die "missing: $purpose; and this system has no apt-get" \
        "install what Debian calls: $*" "then run the same command again"
    local root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || die "missing: $purpose; and neither root nor sudo is at hand" \
            "as root: apt-get install $*" "then run the same command again"
        root=(sudo)
    fi
    say "installing $purpose: $*"
    local apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
    if [ -z "$updated" ]; then
        # One archive out of several that does not answer is no reason to give up.
        "${apt[@]}" update >&2 </dev/null || say "apt-get update failed; trying with the lists at hand"
        updated=yes
    fi
    "${apt[@]}" install -y --no-install-recommends "$@" >&2 </dev/null \
        || die "apt-get install $* failed" "is there a network? else install $purpose by hand and run the same command again"
}

has_server() { [ -x "$1/initdb" ] && [ -x "$1/postgres" ] && [ -x "$1/pg_rewind" ]; }

# Prints the directory of PostgreSQL's binaries: PG_BINDIR, PATH, Debian's layout.
pg_bindir() {
    if [ -n "${PG_BINDIR:-}" ]; then
        has_server "$PG_BINDIR" || die "PG_BINDIR=$PG_BINDIR holds no PostgreSQL server" \
            "it has to hold postgres, initdb and pg_rewind"
        echo "$PG_BINDIR"
        return
    fi
    local found
    found="$(command -v initdb || true)"
    if [ -n "$found" ] && has_server "$(dirname "$found")"; then
        dirname "$found"
        return
    fi
    for version in 18 17 16 15; do
        if has_server "/usr/lib/postgresql/$version/bin"; then
            echo "/usr/lib/postgresql/$version/bin"
            return
        fi
    done
}

need_rust() {
    command -v cargo >/dev/null || die "cargo is missing" \
        "install Rust $(sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml) with rustup: https://rustup.rs"
}

need_linker() {
    command -v cc >/dev/null || want "a C compiler for the linker" gcc libc6-dev
}

need_server() {
    if [ -z "$(pg_bindir)" ]; then
        # Debian would start a cluster of its own with the package; nobody asked for one.
        if [ ! -e /etc/postgresql-common/createcluster.conf ] && [ "$(id -u)" = 0 ]; then
            mkdir -p /etc/postgresql-common
            echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
        fi
        want "a PostgreSQL server" postgresql
    fi
}

check_server() {
    local bindir version
    bindir="$(pg_bindir)"
    [ -n "$bindir" ] || die "PostgreSQL was installed, but no server of version 15 to 18 was found" \
        "set PG_BINDIR to the directory that holds postgres and initdb"
    version="$("$bindir/postgres" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')"
    if [ "$version" -lt 15 ] || [ "$version" -gt 18 ]; then
        die "$bindir holds PostgreSQL $version; 15 to 18 are supported" "set PG_BINDIR to another"
    fi
    if [ "$(id -u)" = 0 ] && ! id postgres >/dev/null 2>&1; then
        die "PostgreSQL refuses to run as root, and there is no user postgres to run it as" \
            "create one (useradd --system postgres), or run this as another user"
    fi
}

need_python() {
    # Debian splits venv off; ensurepip tells whether it is there.
    python3 -c 'import venv, ensurepip' 2>/dev/null || want "Python for client programs" python3 python3-venv
}

need_jdbc() {
    command -v javac >/dev/null || want "a Java compiler for the JDBC client program" default-jdk-headless
    [ -e /usr/share/java/postgresql.jar ] || want "the JDBC driver" libpostgresql-jdbc-java
}

need_node() {
    command -v node >/dev/null || want "Node.js for the node-postgres client program" nodejs
    command -v npm >/dev/null || want "npm for the node-postgres client program" npm
}

# Debian's wrapper scripts count too: psql and pgbench are taken from beside the server.
client_directory() {
    local key dir
    key="$(cd e2e/clients && cat requirements.txt package.json *.java | sha256sum | cut -c1-16)"
    dir="$cache/clients-$key"
    mkdir -p "$cache"
    exec 9>"$dir.lock"
    flock 9
    if [ ! -e "$dir/complete" ]; then
        say "setting up client programs in $dir"
        rm -rf "$dir"
        mkdir -p "$dir/node" "$dir/java"
        python3 -m venv "$dir/python" >&2
        "$dir/python/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
            -r e2e/clients/requirements.txt >&2 </dev/null \
            || die "the Python drivers could not be installed" "see the message of pip above"
        cp e2e/clients/package.json "$dir/node/"
        (cd "$dir/node" && npm install --silent --no-audit --no-fund >&2 </dev/null) \
            || die "node-postgres could not be installed" "see the message of npm above"
        javac -d "$dir/java" -cp /usr/share/java/postgresql.jar e2e/clients/*.java >&2 \
            || die "the JDBC client programs do not compile"
        touch "$dir/complete"
    fi
    echo "$dir"
}

need_rust
case "${1:-}" in
    demo)
        need_linker
        need_server
        install_wanted
        check_server
        ;;
    clients)
        need_linker
        need_server
        need_python
        need_node
        need_jdbc
        install_wanted
        check_server
        client_directory
        ;;
    bench)
        need_linker
        need_server
        command -v python3 >/dev/null || want "Python for the benchmark's driver" python3
        PATH="$PATH:/usr/sbin" command -v pgbouncer >/dev/null || want "PgBouncer" pgbouncer
        install_wanted
        check_server
        if [ ! -x "$(pg_bindir)/pgbench" ]; then apt_install "pgbench" postgresql-contrib; fi
        ;;
    *) die "usage: scripts/setup.sh demo | clients | bench" ;;
esac
