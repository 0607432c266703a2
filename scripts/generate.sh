#!/usr/bin/env bash
# The served model against a forward pass without a cache, in every format that is stored token by token.
source "$(dirname "$0")/common.sh"
cargo build --quiet --release --example generate
for format in f32 f16 bf16 fp8_e4m3 fp8_e5m2 int8_t int4_t nvfp4; do
    echo "generate --check --kv-format $format"
    "$TARGET_DIR/release/examples/generate" --check --kv-format "$format" --json
done
