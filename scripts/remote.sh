#!/usr/bin/env bash
# Remote tiers on real servers, started here and ended here: Redis from Debian, and s3rver (npm), which
# takes any signature (scripts/signatures.sh has a server that does not). The served model twice over
# each of them: the second run skips the system prompt and writes the same.
source "$(dirname "$0")/common.sh"
need_debian redis-server curl
command -v npm >/dev/null || need_debian nodejs npm
if [ ! -x "$TOOLS/s3rver/node_modules/.bin/s3rver" ]; then
    npm install --silent --no-audit --no-fund --prefix "$TOOLS/s3rver" s3rver@3.7.1
fi
dir=$(mktemp -d)
servers=()
end() {
    [ ${#servers[@]} = 0 ] || kill "${servers[@]}" 2>/dev/null || true
    wait
    rm -rf "$dir"
}
trap end EXIT

# A free port; it is let go before the server takes it.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$TOOLS/s3rver/node_modules/.bin/s3rver" --directory "$dir/s3" --address 127.0.0.1 --port "$port" \
    --silent --configure-bucket kv >"$dir/s3.log" 2>&1 &
servers+=($!)
(cd "$dir" && exec redis-server --port 0 --unixsocket "$dir/redis" --save '' >"$dir/redis.log") &
servers+=($!)
export AWS_ACCESS_KEY_ID=S3RVER AWS_SECRET_ACCESS_KEY=S3RVER
export KVCACHE_S3=s3+http://127.0.0.1:$port/kv KVCACHE_REQUIRE_REMOTE=1
for _ in $(seq 100); do
    curl -s -o "$dir/answer" "http://127.0.0.1:$port/" && [ -S "$dir/redis" ] && break
    sleep 0.1
done

cargo test --quiet -p libkvcache --features remote --test remote
# With the library that the tests have just built, and in a file of its own: other stages build the
# example without the feature.
cargo build --quiet -p libkvcache --features remote --example generate
generate=$dir/generate
cp "$TARGET_DIR/debug/examples/generate" "$generate"
for address in "redis+unix://$dir/redis" "$KVCACHE_S3"; do
    for run in first second; do
        "$generate" --tier "remote:$address" --json >"$dir/$run.json"
    done
    python3 - "$dir" "${address%%:*}" <<'PY'
import json, sys
first, second = (json.load(open(f"{sys.argv[1]}/{n}.json")) for n in ("first", "second"))
assert [s["tokens"] for s in first["sequences"]] == [s["tokens"] for s in second["sequences"]]
assert second["prefix_hit_tokens"] > first["prefix_hit_tokens"]
print("generate twice over", sys.argv[2], "- the same tokens;", first["prefix_hit_tokens"], "then",
      second["prefix_hit_tokens"], "of", second["prompt_tokens"], "prompt tokens found")
PY
done
