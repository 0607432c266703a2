# Sourced by the scripts: where things are, how a stage skips, how a tool is fetched.
# A stage exits 0 when it passed, 77 when it could not run (its last line says why), else it failed.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
# Fetched tools; ignored by git, safe to delete.
TOOLS=$ROOT/.toolchain
TARGET_DIR=${CARGO_TARGET_DIR:-$ROOT/target}
HOST=$(rustc -vV | sed -n 's/^host: //p')

# The library unoptimised, for cargo: its kernels take minutes to build, which only pays where they run.
UNOPTIMISED=(--config profile.dev.package.libkvcache.opt-level=0)

skip() {
    echo "skipped: $*"
    exit 77
}

# need_debian PACKAGE...: installs what is missing; the versions are those of Debian 12.
need_debian() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q '^install ok' || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    [ "$(id -u)" = 0 ] || skip "${missing[*]} not installed, and only root can install it"
    command -v apt-get >/dev/null || skip "${missing[*]} not installed, and there is no apt-get"
    fresh_lists
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# Package lists, fetched once a day at most.
fresh_lists() {
    if [ -z "$(find /var/lib/apt/lists -name '*_Packages*' -mtime -1 -print -quit 2>/dev/null)" ]; then
        apt-get update -qq
    fi
}
