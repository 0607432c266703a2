#!/usr/bin/env bash
# Fuzzes the C ABI and the prefix index, FUZZ_SECONDS (15) each, from the kept corpus on, under the
# address sanitizer. The stable compiler's unstable flags are switched on for this build alone.
# New inputs go to target/fuzz; `scripts/fuzz.sh --keep` merges what adds coverage into the corpus.
source "$(dirname "$0")/common.sh"
command -v "${CXX:-c++}" >/dev/null || skip "no C++ compiler, which libFuzzer needs"
case $HOST in
    x86_64-unknown-linux-gnu | aarch64-unknown-linux-gnu) ;;
    *) skip "no address sanitizer for $HOST" ;;
esac

flags="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
flags+=" -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
flags+=" -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
flags+=" -Zsanitizer=address --cfg fuzzing"
RUSTC_BOOTSTRAP=1 RUSTFLAGS="$flags" cargo build --release --manifest-path fuzz/Cargo.toml \
    --target "$HOST" --target-dir "$TARGET_DIR/fuzz"

for source in fuzz/targets/*.rs; do
    name=$(basename "$source" .rs)
    binary=$TARGET_DIR/fuzz/$HOST/release/$name
    [ -x "$binary" ] || continue
    new=$TARGET_DIR/fuzz/corpus/$name
    mkdir -p "$new" "fuzz/corpus/$name"
    if [ "${1:-}" = --keep ]; then
        "$binary" -set_cover_merge=1 -use_counters=0 "fuzz/corpus/$name" "$new" 2>&1 | tail -n 1
        continue
    fi
    # A hang is a failure too: no input of this size takes long.
    "$binary" -max_total_time="${FUZZ_SECONDS:-15}" -max_len=2048 -timeout=10 -print_final_stats=1 \
        -artifact_prefix="$TARGET_DIR/fuzz/$name-" "$new" "fuzz/corpus/$name" 2>"$new.log" ||
        { tail -n 60 "$new.log"; exit 1; }
    echo "$name: $(grep -a 'number_of_executed_units' "$new.log"), $(grep -a 'DONE' "$new.log")"
done
