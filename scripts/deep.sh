#!/usr/bin/env bash
# What takes longer than .ci/run may: more random cases, every CPU level, the whole conformance table
# under the sanitizer and on aarch64, fuzzers, the oldest supported compiler, benchmarks that measure.
# `scripts/deep.sh NAME...` runs only those parts.
source "$(dirname "$0")/common.sh"

# Ten thousand cases per property instead of the default.
part_random() {
    PROPTEST_CASES=${PROPTEST_CASES:-10000} cargo test --release \
        --test model_pool --test model_prefix --test model_eviction --test model_windows --test cache
}

# The cache's tests once for each level this CPU has (the conformance table visits them all itself).
part_levels() {
    local level said
    for level in scalar avx2 avx512 avx512bf16 neon neondotprod; do
        if said=$(KVCACHE_CPU=$level cargo test --test cache 2>&1); then
            echo "$level: $(grep '^test result' <<<"$said")"
        elif grep -q 'the level that KVCACHE_CPU names' <<<"$said"; then
            # The library's own answer: nothing else may excuse a failure.
            echo "skipped: this CPU has no $level"
        else
            echo "$said"
            return 1
        fi
    done
}

part_asan() { KVCACHE_CONFORMANCE=full scripts/asan.sh; }

part_aarch64() { KVCACHE_CONFORMANCE=full scripts/aarch64.sh; }

# Every CUDA kernel for every architecture of a release.
part_cuda() { scripts/cuda.sh --release; }

# The emulated kernels without sanitizers, under more schedules; every unit test with the sockets built in.
part_emulator() { scripts/emulator.sh --plain; }
part_zmq() { cargo test -p libkvcache --features zmq --lib; }

# Stages that are not in .ci/run's list.
part_transformers() { scripts/transformers.sh; }

part_shuttle() { SHUTTLE_ITERATIONS=${SHUTTLE_ITERATIONS:-1000000} scripts/shuttle.sh; }

part_tsan() { scripts/tsan.sh; }

part_fuzz() { FUZZ_SECONDS=${FUZZ_SECONDS:-300} scripts/fuzz.sh; }

# A writer to the disk tier is killed 200 times.
part_crashes() { KVCACHE_CRASHES=${KVCACHE_CRASHES:-200} cargo test --release --test tier_crash; }

# S3 signatures before a server that checks them, which takes minutes to build.
part_signatures() { scripts/signatures.sh; }

# The disk tier beside fio, which Debian has.
part_disk() { scripts/disk.sh; }

# Decode over quantised formats beside llama.cpp and vLLM, whose wheels are large.
part_peers() { scripts/peers.sh; }

part_msrv() {
    local version
    version=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    cargo "+$version" --version >/dev/null 2>&1 || { echo "skipped: no Rust $version here"; return; }
    cargo "+$version" check --workspace --target-dir "$TARGET_DIR/msrv"
}

part_features() {
    cargo check -p libkvcache --no-default-features
    cargo check -p libkvcache --no-default-features --features capi
    cargo check -p libkvcache --all-features
}

# cargo-c itself takes minutes to build.
part_cinstall() { scripts/cinstall.sh; }

part_benches() { cargo bench; }

# What a GPU machine is given, as far as it runs without a GPU; with one, all of it.
part_gpu() {
    scripts/gpu.sh pack "$TARGET_DIR/gpu"
    "$TARGET_DIR/gpu/gpu.sh" run
}

# Each part runs in its own process: `set -e` does not hold inside a tested command.
if [ "${1:-}" = --one ]; then
    "part_$2"
    exit
fi
parts=(random levels features asan aarch64 cuda emulator zmq tsan shuttle fuzz crashes disk
    peers signatures msrv cinstall transformers benches gpu)
[ $# = 0 ] || parts=("$@")
failed=()
for part in "${parts[@]}"; do
    printf '\n== %s\n' "$part"
    start=$SECONDS
    code=0
    scripts/deep.sh --one "$part" || code=$?
    [ $code = 0 ] || [ $code = 77 ] || failed+=("$part")
    echo "$part: $((SECONDS - start)) s"
done
echo "$((${#parts[@]} - ${#failed[@]})) passed or skipped, ${#failed[@]} failed ${failed[*]}"
[ ${#failed[@]} = 0 ]
