#!/usr/bin/env bash
# `cargo cinstall` into a DESTDIR: the same files as scripts/install.sh, the same SONAME, and a program
# that finds them through pkg-config. cargo-c, pinned, is built from crates.io where it is missing:
# some ten minutes, which is why this is a part of scripts/deep.sh.
source "$(dirname "$0")/common.sh"
cargo_c=0.10.24+cargo-0.98.0
need_debian cmake pkg-config libssl-dev
export PATH=$TOOLS/bin:$PATH
cargo cinstall --version >/dev/null 2>&1 ||
    cargo install cargo-c --version "$cargo_c" --locked --debug --root "$TOOLS"
dest=$TARGET_DIR/cinstall
rm -rf "$dest"
# A folder of its own, or it would keep every other build waiting.
cargo cinstall --release -p libkvcache --target-dir "$TARGET_DIR/cargo-c" --prefix /usr --libdir lib --destdir "$dest"

for file in include/kvcache.h include/kvcache.hpp lib/libkvcache.a lib/pkgconfig/kvcache.pc \
    share/cmake/kvcache/kvcacheConfig.cmake share/cmake/kvcache/kvcacheConfigVersion.cmake; do
    [ -s "$dest/usr/$file" ] || { echo "cargo cinstall made no $file"; find "$dest"; exit 1; }
done
cmp include/kvcache.h "$dest/usr/include/kvcache.h"
soname=$(readelf -d "$dest/usr/lib/libkvcache.so" | sed -n 's/.*(SONAME).*\[\(.*\)\]/\1/p')
abi=$(sed -n 's/^version = "\(0\.[0-9]*\|[1-9][0-9]*\)\..*"/\1/p' Cargo.toml | head -n 1)
[ "$soname" = "libkvcache.so.$abi" ] || { echo "the SONAME is $soname"; exit 1; }
symbols() { nm -D --defined-only --format=just-symbols "$1" | grep '^kvc_' | sort; }
diff <(grep -v '^#' ffi-tests/symbols.txt | cut -d' ' -f1 | sort) <(symbols "$dest/usr/lib/libkvcache.so")

export PKG_CONFIG_PATH=$dest/usr/lib/pkgconfig PKG_CONFIG_SYSROOT_DIR=$dest
# shellcheck disable=SC2046 # Flags are words.
cc -std=c11 ffi-tests/c/serve.c -o "$dest/serve" $(pkg-config --cflags --libs kvcache) -lm
LD_LIBRARY_PATH=$dest/usr/lib "$dest/serve"
cmake -S bindings/cpp/examples -B "$dest/build" -DCMAKE_PREFIX_PATH="$dest/usr" >/dev/null
cmake --build "$dest/build" --target generate -- --quiet
"$dest/build/generate" --prompt "If you want to" --max-tokens 8
echo "cargo cinstall: $soname"
