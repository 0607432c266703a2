#!/usr/bin/env bash
# The CUDA kernels without a GPU: the emulator's own tests, the emulated kernels, the conformance
# table, a cache on an emulated device and a served prompt, under AddressSanitizer and
# UndefinedBehaviorSanitizer, with the blocks of a launch on two threads. `--plain` (in deep.sh) does it
# without sanitizers, with blocks one after another and more schedules; that is also what a compiler
# without them gets. C and C++ programs against a library with an emulated device run there too.
source "$(dirname "$0")/common.sh"
CXX=${CXX:-c++}
command -v "$CXX" >/dev/null || skip "no C++ compiler ($CXX)"

# The sanitizer's library must be the first that a program loads, which Rust's linker line does not
# give: the runner loads it before.
asan=$("$CXX" -print-file-name=libasan.so)
run=()
case "${1:-} $asan" in
    --plain*) ;;
    *" "/*)
        runner=CARGO_TARGET_$(printf %s "$HOST" | tr 'a-z-' 'A-Z_')_RUNNER
        # The harness keeps allocations to its end, and fibers are left where they stand.
        run=(env "$runner=env LD_PRELOAD=$asan" KVCACHE_EMU_SANITIZE=1 KVCACHE_EMU_WORKERS=2
            KVCACHE_EMU_ROUNDS=10 ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
            UBSAN_OPTIONS=print_stacktrace=1)
        ;;
    *) echo "skipped: $CXX has no libasan" ;;
esac
"${run[@]}" cargo test -p libkvcache --features emulate --test 'emulat*' --test 'device_*' \
    --test conformance_device --test conformance_device_codes --test cascade_cache
# The others of this file have nothing on a device.
"${run[@]}" cargo test -p libkvcache --features emulate --test cache -- device freed
"${run[@]}" cargo run -p libkvcache --features emulate --example generate -- \
    --device emu --check --prompt 'What is a KV cache?' --max-tokens 4
if [ "${1:-}" = --plain ]; then
    cargo run -p libkvcache --features emulate --example generate -- --device emu --kv-format kt4v4 \
        --check --prompt 'What is a KV cache?' --max-tokens 4
    cargo test -p ffi-tests --features emulate --test programs --test wrapper
fi
