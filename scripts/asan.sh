#!/usr/bin/env bash
# Unit tests and the conformance table under the address sanitizer, with the stable compiler's
# unstable flags switched on for this build alone.
source "$(dirname "$0")/common.sh"
case $HOST in
    x86_64-unknown-linux-gnu | aarch64-unknown-linux-gnu) ;;
    *) skip "no address sanitizer for $HOST" ;;
esac
cp Cargo.lock scripts/lean/Cargo.lock
RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address ${RUSTFLAGS:-}" KVCACHE_CONFORMANCE=${KVCACHE_CONFORMANCE:-small} \
    cargo test --manifest-path scripts/lean/Cargo.toml --target "$HOST" \
    --target-dir "$TARGET_DIR/asan"
