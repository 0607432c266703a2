#!/usr/bin/env bash
# The served model against a forward pass without a cache, in every 16- and 32-bit format and in sealed tiles.
source "$(dirname "$0")/common.sh"
cargo build --quiet --release --example generate
for dtype in f32 f16 bf16 kt8v8 kt4v4 kt3v3 kt4v2 kt2v2; do
    echo "generate --check --kv-format $dtype"
    "$TARGET_DIR/release/examples/generate" --check --kv-format "$dtype" --json
done
