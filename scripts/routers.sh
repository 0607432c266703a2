#!/usr/bin/env bash
# KV events against the decoders and indexes of routers, a package with dependencies of its own.
source "$(dirname "$0")/common.sh"
cargo test --locked --manifest-path benches/routers/Cargo.toml --target-dir "$TARGET_DIR/routers"
