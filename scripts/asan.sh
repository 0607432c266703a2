#!/usr/bin/env bash
# The conformance table under the address sanitizer, with the stable compiler's unstable flags switched
# on for this build alone; with KVCACHE_CONFORMANCE=full (in deep.sh) all of it, and the unit tests, for
# which the library is built once more.
source "$(dirname "$0")/common.sh"
case $HOST in
    x86_64-unknown-linux-gnu | aarch64-unknown-linux-gnu) ;;
    *) skip "no address sanitizer for $HOST" ;;
esac
cp Cargo.lock scripts/lean/Cargo.lock
export KVCACHE_CONFORMANCE=${KVCACHE_CONFORMANCE:-small}
tests=()
[ "$KVCACHE_CONFORMANCE" != small ] || tests=(--test '*')
RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address ${RUSTFLAGS:-}" \
    cargo test --manifest-path scripts/lean/Cargo.toml --target "$HOST" --target-dir "$TARGET_DIR/asan" \
    "${tests[@]}"
