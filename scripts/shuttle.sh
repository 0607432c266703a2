#!/usr/bin/env bash
# The hand-made protocols between threads, under a scheduler that explores their interleavings.
source "$(dirname "$0")/common.sh"
cargo run --release --locked --manifest-path scripts/shuttle/Cargo.toml --target-dir "$TARGET_DIR/shuttle"
