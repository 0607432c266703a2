#!/usr/bin/env bash
# Lints of everything that is compiled, as errors; the no_std half too.
source "$(dirname "$0")/common.sh"
cargo clippy --version >/dev/null 2>&1 || skip "this toolchain has no clippy"
cargo clippy --workspace --all-targets -- -D warnings
cargo clippy -p libkvcache --lib --no-default-features -- -D warnings
