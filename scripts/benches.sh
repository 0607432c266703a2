#!/usr/bin/env bash
# Every benchmark compiles and runs once; nothing is measured.
source "$(dirname "$0")/common.sh"
benches=()
# Those of a folder need features.
for file in benches/*.rs; do benches+=(--bench "$(basename "$file" .rs)"); done
cargo test --quiet "${benches[@]}"
