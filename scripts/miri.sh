#!/usr/bin/env bash
# Undefined behaviour in what is pure: Miri where the toolchain has it. Where not, the address
# sanitizer over the conformance tables is a weaker stand-in (no aliasing rules, no uninitialised reads).
source "$(dirname "$0")/common.sh"
if cargo miri --version >/dev/null 2>&1; then
    export MIRIFLAGS="-Zmiri-strict-provenance"
    cargo miri test --manifest-path scripts/lean/Cargo.toml --target-dir "$TARGET_DIR/miri" --lib
    exit
fi
scripts/asan.sh
skip "this toolchain has no Miri; the address sanitizer passed in its place"
