#!/usr/bin/env bash
# The conformance table on aarch64, under qemu, so that NEON is run and not only compiled; with
# KVCACHE_CONFORMANCE=full (in deep.sh) all of it, and the unit tests. Debian 12 has a current rustc with
# an arm64 standard library; both are unpacked into a private prefix (the system's packages and
# architectures stay as they are), the linker and qemu are installed.
source "$(dirname "$0")/common.sh"
target=aarch64-unknown-linux-gnu
cp Cargo.lock scripts/lean/Cargo.lock
lean=(--manifest-path scripts/lean/Cargo.toml --target-dir "$TARGET_DIR/aarch64")

if [ "$HOST" = $target ]; then
    cargo test "${lean[@]}"
    exit
fi
[ "$HOST" = x86_64-unknown-linux-gnu ] || skip "no aarch64 cross build from $HOST"
if ! grep -qs 'VERSION_ID="12"' /etc/os-release; then
    skip "the aarch64 cross build is written for Debian 12"
fi
need_debian gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user

prefix=$TOOLS/aarch64
version=1.96.0+dfsg1-1~deb12u2
if [ ! -e "$prefix/complete-$version" ]; then
    rm -rf "$prefix"
    mkdir -p "$prefix"/{lists/partial,cache/archives/partial,debs,root}
    # Lists of both architectures, kept apart from the system's.
    apt=(apt-get -qq -o APT::Architectures::=amd64 -o APT::Architectures::=arm64
        -o Dir::State::Lists="$prefix/lists" -o Dir::Cache="$prefix/cache" -o APT::Sandbox::User=root)
    "${apt[@]}" update
    (cd "$prefix/debs" && "${apt[@]}" download "rustc-web=$version" "libllvm22" \
        "libstd-rust-web-1.96=$version" "libstd-rust-web-dev:amd64=$version" \
        "libstd-rust-web-dev:arm64=$version")
    for deb in "$prefix"/debs/*.deb; do dpkg -x "$deb" "$prefix/root"; done
    rm -rf "$prefix"/{lists,cache,debs}
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' \
        "$prefix/root/usr/lib/x86_64-linux-gnu" "$prefix/root/usr/bin/rustc" >"$prefix/rustc"
    chmod +x "$prefix/rustc"
    touch "$prefix/complete-$version"
fi

export RUSTC=$prefix/rustc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
export KVCACHE_CONFORMANCE=${KVCACHE_CONFORMANCE:-small}
cargo test "${lean[@]}" --target $target --test conformance --test conformance_codes --test sealed
# The unit tests take the library's other build and minutes under qemu: deep.sh has them. Tiers have no
# code of an instruction set, and qemu's files are not what they are tested on.
if [ "$KVCACHE_CONFORMANCE" != small ]; then
    cargo test "${lean[@]}" --target $target --lib -- --skip tier:: --skip tiers::
fi
