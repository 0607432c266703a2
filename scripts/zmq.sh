#!/usr/bin/env bash
# Events over ZeroMQ: the sockets against peers of our own, against pyzmq where pip can fetch it,
# and through the C ABI of a library that has them.
source "$(dirname "$0")/common.sh"
venv=$TOOLS/pyzmq-27.3.0
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import zmq' 2>/dev/null; then
    rm -rf "$venv"
    { python3 -m venv "$venv" && "$venv/bin/pip" -q install pyzmq==27.3.0; } >/dev/null 2>&1 || true
fi
[ -x "$venv/bin/python" ] && export KVCACHE_PYTHON=$venv/bin/python
cargo clippy -p libkvcache --all-targets --features zmq -- -D warnings
# What the feature changes; without capture, so that a skip is seen.
zmq=("${UNOPTIMISED[@]}" -p libkvcache --features zmq)
cargo test "${zmq[@]}" --lib events:: -- --nocapture
cargo test "${zmq[@]}" --test events --test zmq -- --nocapture
