#!/usr/bin/env bash
# Remote tiers on real servers, started here and ended here: Redis from Debian, and s3rver (npm), which
# takes any signature (scripts/signatures.sh has a server that does not); a directory and that server
# again through NIXL (PyPI); Redis and that server over TLS. The served model twice over each of those
# without TLS: the second run skips the system prompt and writes the same.
source "$(dirname "$0")/common.sh"
need_debian redis-server curl openssl socat
command -v npm >/dev/null || need_debian nodejs npm
if [ ! -x "$TOOLS/s3rver/node_modules/.bin/s3rver" ]; then
    npm install --silent --no-audit --no-fund --prefix "$TOOLS/s3rver" s3rver@3.7.1
fi
# The wheel for CUDA 12: the plugin for S3 of that for CUDA 13 needs a library that no registry has. Of
# either CUDA nothing is needed here.
nixl=
if [ "$(uname -m)" = x86_64 ]; then
    nixl=$TOOLS/nixl-1.5.1
    if [ ! -d "$nixl" ]; then
        new=$nixl.new.$$
        mkdir -p "$new"
        echo "nixl-cu12==1.5.1 --hash=sha256:341d0dfa499f941c054614252f1d8047d1380e33f29c87707372ff5ec7d3779a" \
            >"$new/requirements.txt"
        python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
            --require-hashes --only-binary :all: --implementation cp --python-version 3.11 --abi cp311 \
            --platform manylinux_2_28_x86_64 --target "$new" -r "$new/requirements.txt"
        mv "$new" "$nixl"
    fi
    export KVCACHE_NIXL=$nixl/.nixl_cu12.mesonpy.libs/libnixl_capi.so KVCACHE_REQUIRE_NIXL=1
else
    echo "skipped: NIXL, of which no wheel for $(uname -m) is pinned here"
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

cargo test --quiet -p libkvcache --features remote-tls "${UNOPTIMISED[@]}" --test remote --test remote_tls
# With the library that the tests have just built, and in a file of its own: other stages build the
# example without the feature.
cargo build --quiet -p libkvcache --features remote-tls "${UNOPTIMISED[@]}" --example generate
generate=$dir/generate
cp "$TARGET_DIR/debug/examples/generate" "$generate"
addresses=("redis+unix://$dir/redis" "$KVCACHE_S3")
mkdir "$dir/shared"
[ -z "$nixl" ] || addresses+=("nixl+posix:$dir/shared")
for address in "${addresses[@]}"; do
    for run in first second; do
        "$generate" --tier "remote:$address" --max-tokens 8 --json >"$dir/$run.json"
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
