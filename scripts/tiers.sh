#!/usr/bin/env bash
# Tiers beyond the test command: the disk through io_uring, a killed writer, and the served model
# twice over one directory: the second run skips the system prompt and writes the same.
source "$(dirname "$0")/common.sh"
KVCACHE_CRASHES=${KVCACHE_CRASHES:-200} \
    cargo test --quiet "${UNOPTIMISED[@]}" -p libkvcache --features io-uring --test tier_crash -- --nocapture
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cargo build --quiet --release --example generate
run() { "$TARGET_DIR/release/examples/generate" --tier "disk:$dir/tier" --json >"$dir/$1.json"; }
run first
run second
python3 - "$dir" <<'PY'
import json, sys
first, second = (json.load(open(f"{sys.argv[1]}/{n}.json")) for n in ("first", "second"))
assert [s["tokens"] for s in first["sequences"]] == [s["tokens"] for s in second["sequences"]]
assert second["prefix_hit_tokens"] > first["prefix_hit_tokens"]
print("generate twice: the same tokens;", first["prefix_hit_tokens"], "then",
      second["prefix_hit_tokens"], "of", second["prompt_tokens"], "prompt tokens found")
PY
