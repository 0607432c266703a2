#!/usr/bin/env bash
# Every thread-safe function of the C ABI from several threads, and the publisher beside its cache,
# under the thread sanitizer. The standard library comes without the sanitizer's instrumentation, and
# its sources are not there to build it anew: what is known to be synchronised inside it (see
# scripts/tsan.txt) is not reported. Races of our own code are.
source "$(dirname "$0")/common.sh"
case $HOST in
    x86_64-unknown-linux-gnu | aarch64-unknown-linux-gnu) ;;
    *) skip "no thread sanitizer for $HOST" ;;
esac
cp Cargo.lock scripts/lean/Cargo.lock
export TSAN_OPTIONS="suppressions=$ROOT/scripts/tsan.txt halt_on_error=1 ${TSAN_OPTIONS:-}"
# The standard library has no such flag: mixing is meant.
flags="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer ${RUSTFLAGS:-}"
# Optimised code would take minutes to instrument, and a second less to run.
export CARGO_PROFILE_DEV_OPT_LEVEL=0
RUSTC_BOOTSTRAP=1 RUSTFLAGS=$flags cargo test --manifest-path scripts/lean/Cargo.toml \
    --target "$HOST" --target-dir "$TARGET_DIR/tsan" --test capi_threads "$@"
