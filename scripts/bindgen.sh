#!/usr/bin/env bash
# The header as bindgen reads it: the layout of every struct. libclang comes from PyPI.
source "$(dirname "$0")/common.sh"
libclang=libclang==18.1.1
if [ -z "${LIBCLANG_PATH:-}" ]; then
    if [ ! -e "$TOOLS/libclang/clang/native/libclang.so" ]; then
        python3 -m pip --version >/dev/null 2>&1 || skip "no pip to fetch $libclang with"
        python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
            --no-deps --target "$TOOLS/libclang" "$libclang"
    fi
    export LIBCLANG_PATH=$TOOLS/libclang/clang/native
    # The wheel has no compiler headers of its own: take the C compiler's.
    export BINDGEN_EXTRA_CLANG_ARGS="-isystem $(cc -print-file-name=include)"
fi
cargo test "${UNOPTIMISED[@]}" -p ffi-tests --features bindgen --test layout
