#!/usr/bin/env bash
# Builds and installs libkvcache for C and C++ on Linux: what `cargo cinstall` does, without cargo-c.
#
#   scripts/install.sh [--prefix DIR] [--libdir NAME] [--destdir DIR] [--features LIST]
#
#   --prefix DIR     where it will be used from (/usr/local)
#   --libdir NAME    the libraries' folder below it (lib)
#   --destdir DIR    put in front of the prefix, for packages (none)
#   --features LIST  features of the library: cuda (none)
#
# Installs the headers, libkvcache.so with its version and SONAME, libkvcache.a, and the files that
# pkg-config (kvcache, kvcache-static) and CMake (kvcache::kvcache, kvcache::kvcache_static) read.
# They hold no absolute path: the tree may be moved.
set -euo pipefail

prefix=/usr/local lib=lib destdir='' features=''
while [ $# -gt 0 ]; do
    case $1 in
        --prefix | --libdir | --destdir | --features)
            [ $# -ge 2 ] || { echo "install.sh: $1 needs a value" >&2; exit 2; } ;;&
        --prefix) prefix=$2 ;;
        --libdir) lib=$2 ;;
        --destdir) destdir=$(realpath -ms "$2") ;;
        --features) features=$2 ;;
        *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; [ "$1" = --help ] && exit; exit 2 ;;
    esac
    shift 2
done
# Relative to where the caller stands, which is not where cargo runs.
prefix=$(realpath -ms "$prefix")
source "$(dirname "$0")/common.sh"
case $HOST in
    *-linux-*) ;;
    *) echo "install.sh: knows Linux only, not $HOST; there is cargo cinstall" >&2; exit 1 ;;
esac

cargo build --release -p kvcache-c ${features:+--features "$features"}
built=$TARGET_DIR/release
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
abi=$(cut -d. -f1 <<<"$version")
[ "$abi" != 0 ] || abi=$(cut -d. -f1,2 <<<"$version")
# The line that ffi-tests holds against the compiler's own.
native=$(sed -n 's/^pub const NATIVE_STATIC_LIBS: &str = "\(.*\)";/\1/p' ffi-tests/src/lib.rs)
[ -n "$native" ] || { echo "install.sh: no list of system libraries in ffi-tests/src/lib.rs" >&2; exit 1; }

to=$destdir$prefix
libs=$to/$lib
mkdir -p "$to/include" "$libs/pkgconfig" "$to/share/cmake/kvcache"
install -m 644 include/kvcache.h bindings/cpp/kvcache.hpp "$to/include"
install -m 755 "$built/libkvcache.so" "$libs/libkvcache.so.$version"
ln -sf "libkvcache.so.$version" "$libs/libkvcache.so.$abi"
ln -sf "libkvcache.so.$version" "$libs/libkvcache.so"
install -m 644 "$built/libkvcache.a" "$libs"
install -m 644 bindings/c/install/*.cmake "$to/share/cmake/kvcache"
up=$(realpath -m --relative-to "$libs/pkgconfig" "$to")
for name in kvcache kvcache-static; do
    sed "s|@UP@|$up|; s|@LIB@|$lib|; s|@VERSION@|$version|; s|@NATIVE@|$native|" \
        "bindings/c/install/$name.pc.in" >"$libs/pkgconfig/$name.pc"
    chmod 644 "$libs/pkgconfig/$name.pc"
done
echo "libkvcache $version in $to"
