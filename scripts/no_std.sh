#!/usr/bin/env bash
# A program without std, with its own allocator and panic handler, links the library and runs. If
# std slipped into the library's no_std build, the program would have two panic handlers.
source "$(dirname "$0")/common.sh"
cp Cargo.lock scripts/no_std/Cargo.lock
export CARGO_TARGET_DIR=$TARGET_DIR/no_std
cargo build --release --manifest-path scripts/no_std/Cargo.toml
"$CARGO_TARGET_DIR/release/kvcache-no-std"
echo "a no_std program linked and ran"
