#!/usr/bin/env bash
# Builds images and puts them into the test cluster.
#
#   images.sh pause              holds the namespaces of a Pod
#   images.sh postgres           PostgreSQL as Debian packages it, laid out like the stock image: 15, or what
#                                HELIOS_POSTGRES_MAJOR says: 17 (trixie), 18 (sid)
#   images.sh helios PROGRAM     the product's: the Dockerfile's last stage with this program
#
# The first two are kept outside of the repository, named by the hash of what went in.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Containers are built without a daemon; chroot isolation and vfs need no more than root.
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
storage=""
build() { buildah --root "$storage/root" --runroot "$storage/run" "$@"; }
open_storage() {
    mkdir -p "$cache"
    storage="$(mktemp -d "$cache/images-build-XXXXXX")"
    trap 'rm -rf "$storage"' EXIT
}

import() { ctr_images images import --no-unpack=false "$1" >/dev/null 2>&1 || ctr_images images import "$1" >/dev/null; }

# again IMAGE: the same under a second name, for upgrades.
again() { ctr_images images tag --force "$1" "$1-next" >/dev/null; }

# from_folder FOLDER IMAGE ARCHIVE [CONFIG...]: an image with one layer.
from_folder() {
    local folder="$1" image="$2" archive="$3" container
    shift 3
    container="$(build from scratch)"
    build add --quiet "$container" "$folder" / >/dev/null
    build config "$@" "$container"
    build commit --quiet "$container" "docker-archive:$archive:$image" >/dev/null
}

pause() {
    local key archive
    key="$(sha256sum "$here/pause.c" | cut -c1-16)"
    archive="$cache/image-pause-$key.tar"
    if [ ! -e "$archive" ]; then
        open_storage
        mkdir "$storage/pause"
        gcc -Os -static -o "$storage/pause/pause" "$here/pause.c"
        from_folder "$storage/pause" "$pause_image" "$storage/image.tar" --entrypoint '["/pause"]' --user 65535
        mv "$storage/image.tar" "$archive"
    fi
    import "$archive"
}

postgres() {
    local major="$postgres_major" image="$postgres_image" suite key archive
    case "$major" in
        15) suite=bookworm ;;
        17) suite=trixie ;;
        18) suite=sid ;;
        *) die "PostgreSQL $major is in none of the suites that are known here" ;;
    esac
    key="$({ declare -f postgres from_folder; echo "$image"; } | sha256sum | cut -c1-16)"
    archive="$cache/image-postgres-$major-$key.tar"
    if [ ! -e "$archive" ]; then
        open_storage
        local root="$storage/debian" packages=postgresql
        # From 17 on the contributed modules come with the server.
        if [ "$major" = 15 ]; then packages+=,postgresql-contrib; fi
        say "building $image with debootstrap"
        # What an older debootstrap does not know by name is made like sid.
        local script=/usr/share/debootstrap/scripts/$suite
        [ -e "$script" ] || script=/usr/share/debootstrap/scripts/sid
        debootstrap --variant=minbase --include="$packages" "$suite" "$root" http://deb.debian.org/debian "$script" \
            >"$storage/debootstrap.log" 2>&1 \
            || { tail -20 "$storage/debootstrap.log" >&2; die "debootstrap failed"; }
        [ -x "$root/usr/lib/postgresql/$major/bin/postgres" ] || die "$suite has no PostgreSQL $major"
        # The numbers of the stock image; Debian's package takes the next free ones.
        local other
        other="$(chroot "$root" getent group 999 | cut -d: -f1 || true)"
        [ -z "$other" ] || [ "$other" = postgres ] || chroot "$root" groupmod -g 899 "$other"
        other="$(chroot "$root" getent passwd 999 | cut -d: -f1 || true)"
        [ -z "$other" ] || [ "$other" = postgres ] || chroot "$root" usermod -u 899 "$other"
        chroot "$root" groupmod -g 999 postgres
        chroot "$root" usermod -u 999 postgres
        chroot "$root" sh -c "chown -R postgres:postgres /var/lib/postgresql /var/run/postgresql /var/log/postgresql; rm -rf /var/lib/postgresql/$major /var/cache/apt/archives/*.deb /var/lib/apt/lists/*"
        from_folder "$root" "$image" "$storage/image.tar" \
            --env "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/$major/bin" \
            --env "PG_MAJOR=$major" --env PGDATA=/var/lib/postgresql/data --cmd postgres
        mv "$storage/image.tar" "$archive"
    fi
    import "$archive"
    again "$image"
}

helios() {
    local binary="$1"
    open_storage
    mkdir -p "$storage/context"
    cp "$binary" "$storage/context/helios"
    strip --strip-debug "$storage/context/helios"
    # The last stage alone: compiling is what the stage before it does. The image is made of a
    # static program; the one that the tests build is not, and brings its libraries along.
    mkdir -p "$storage/context/lib"
    local library
    for library in $({ ldd "$binary" || true; } | grep -o '/[^ ]*'); do
        cp --parents --dereference "$library" "$storage/context/lib/"
    done
    sed -n '/^FROM scratch/,$p' "$repository/Dockerfile" \
        | sed 's/^COPY --from=build [^ ]*/COPY lib\/ \/\nCOPY helios/' >"$storage/context/Dockerfile"
    build bud --quiet --tag "$helios_image" "$storage/context" >/dev/null
    build push --quiet "$helios_image" "docker-archive:$storage/image.tar:$helios_image" >/dev/null
    import "$storage/image.tar"
    again "$helios_image"
    say "image of $(stat -c %s "$storage/image.tar" | awk '{printf "%.0f MB", $1 / 1e6}')"
}

case "${1:-}" in
    pause | postgres) "$1" ;;
    helios) helios "${2:?the program is missing}" ;;
    *) die "usage: images.sh pause | postgres | helios PROGRAM" ;;
esac
