#!/usr/bin/env bash
# The formats' quality on the trained model, on a fixed subset of its held-out text, against the
# thresholds. Exact figures: the same on every run of one machine.
source "$(dirname "$0")/common.sh"
cargo build --quiet --release --example quality
formats=()
for format in bf16 fp8_e4m3 int8_t kt8v8 kt4v4 kt3v3 kt4v2 kt2v2; do formats+=(--format "$format"); done
"$TARGET_DIR/release/examples/quality" --check --context 1024:4 "${formats[@]}" --recall 4096
