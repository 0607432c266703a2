#!/usr/bin/env bash
# Formatting, by rustfmt.toml.
source "$(dirname "$0")/common.sh"
cargo fmt --version >/dev/null 2>&1 || skip "this toolchain has no rustfmt"
cargo fmt --all -- --check
