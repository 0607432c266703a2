#!/usr/bin/env bash
# The served model against a forward pass without a cache, in every 16- and 32-bit format.
source "$(dirname "$0")/common.sh"
cargo build --quiet --release --example generate
for dtype in f32 f16 bf16; do
    echo "generate --check --dtype $dtype"
    "$TARGET_DIR/release/examples/generate" --check --dtype "$dtype" --json
done
