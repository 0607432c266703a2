#!/usr/bin/env bash
# The served model against a forward pass without a cache, in every format.
source "$(dirname "$0")/common.sh"
cargo build --quiet --release --example generate
for format in f32 f16 bf16 fp8_e4m3 fp8_e5m2 int8_t int4_t nvfp4 \
    kt8v8 kt4v4 kt3v3 kt4v2 kt2v2; do
    echo "generate --check --kv-format $format"
    "$TARGET_DIR/release/examples/generate" --check --kv-format "$format" --json
done
