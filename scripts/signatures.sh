#!/usr/bin/env bash
# S3 signatures before a server that checks them: s3s-fs, from crates.io (minutes to build, once). The
# right secret stores and loads; with a wrong one every call fails and is counted, and prompts are
# served all the same.
source "$(dirname "$0")/common.sh"
need_debian redis-server curl
server=$TOOLS/s3s/bin/s3s-fs
[ -x "$server" ] || cargo install s3s-fs --version 0.14.1 --features binary --locked --debug \
    --root "$TOOLS/s3s" --target-dir "$TARGET_DIR/s3s"
dir=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill "$pid"; rm -rf "$dir"' EXIT
mkdir -p "$dir/root/blocks"
# A free port; it is let go before the server takes it.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$server" --host 127.0.0.1 --port "$port" --access-key key --secret-key right "$dir/root" \
    >"$dir/log" 2>&1 &
pid=$!
for _ in $(seq 100); do
    curl -s -o "$dir/answer" "http://127.0.0.1:$port/" && break
    sleep 0.1
done
export KVCACHE_S3=s3+http://127.0.0.1:$port/blocks KVCACHE_REQUIRE_REMOTE=1 AWS_ACCESS_KEY_ID=key
# One test by its whole name; a name that no test has would pass too.
check() {
    cargo test -p libkvcache --features remote "${UNOPTIMISED[@]}" --test remote "$1" -- --exact |
        tee "$dir/said"
    grep -q '^test result: ok. 1 passed' "$dir/said"
}
AWS_SECRET_ACCESS_KEY=right check s3::keeps_objects_and_serves_the_next_process
AWS_SECRET_ACCESS_KEY=wrong KVCACHE_S3_REFUSES=1 check s3::with_a_wrong_secret_fails_and_is_counted
