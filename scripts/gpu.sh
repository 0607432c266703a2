#!/usr/bin/env bash
# Everything that wants a GPU, on a machine that may have no Rust and no network.
#
#   scripts/gpu.sh pack DIR   here: builds tests, benchmark, example and libkvcache.so with their
#                             kernels (the pinned nvcc), and puts them into DIR with what they need;
#                             FLASHINFER=1 adds that peer, reduced to what it needs there
#   DIR/gpu.sh run            there: correctness, graphs, the served model, benchmark, peers and
#                             sanitizer; $OUT (default: DIR/out) gets gpu.json, gpu.txt and gpu.log,
#                             written anew after each part
#
# `run NAME...` runs only those parts. All of it ends within $SECONDS_IN_ALL (540), whatever hangs:
# a command gets at most what is left of that, and one that has less than a few seconds is skipped and
# said to be. What fails costs nothing but itself. Without a GPU it shows that everything starts, says
# of each part that it is skipped, and exits with 77 (KVCACHE_REQUIRE_GPU=1: fails). PyTorch and
# FlashInfer, where Python finds them, are the peers. compute-sanitizer is looked for in PATH,
# CUDA_HOME and /usr/local/cuda.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# --- commands: each has a limit, and a part goes on after one that fails

# Runs a command for at most so many seconds, and no longer than the whole run may take.
within() {
    local most=$1 left=$((DEADLINE - $(date +%s)))
    shift
    if [ "$left" -lt 3 ]; then echo "skipped: $1 (no time is left)"; return 77; fi
    timeout -k 5 $((most < left ? most : left)) "$@"
}

# Runs a command of a part whatever came before; `worst` is the code of the first that failed, else
# of one that was skipped.
worst=0
attempt() {
    local code=0
    "$@" || code=$?
    if [ "$code" != 0 ] && { [ "$worst" = 0 ] || [ "$worst" = 77 ]; }; then worst=$code; fi
}

# --- the parts

part_facts() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem \
        --format=csv || true
    cat "$HERE/VERSION"
    attempt within 60 "$BIN/unit" cuda:: kernels::image --nocapture
}

part_conformance() {
    attempt within 120 "$BIN/conformance_device"
    attempt within 60 "$BIN/conformance_device_codes"
    attempt within 60 "$BIN/device_latents"
    attempt within 60 "$BIN/cache" device
    attempt within 60 "$BIN/cascade_cache" --nocapture
    # Copies, lookups, merges and cascades; the kernels alone.
    attempt within 60 "$BIN/device_capi"
    attempt within 60 "$BIN/device_capi_shared"
}

part_graph() { attempt within 60 "$BIN/gpu" --nocapture --test-threads=1; }

sanitizer() {
    local at
    for at in compute-sanitizer "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
        /usr/local/cuda/bin/compute-sanitizer; do
        command -v "$at" && return
    done
    return 1
}

part_sanitizer() {
    local tool check
    tool=$(sanitizer) || { echo "skipped: no compute-sanitizer"; worst=77; return; }
    # Under one check, a program's tests of these names.
    sanitized() {
        local check=$1 program=$2
        shift 2
        echo "$check: $program $*"
        # shellcheck disable=SC2086
        attempt within 60 "$tool" --tool $check --error-exitcode 1 "$BIN/$program" \
            --test-threads=1 "$@" >"$WORK/sanitized" 2>&1
        cat "$WORK/sanitized"
    }
    # A kernel that is not in the image is looked for and not found: no error of ours.
    local checks=("memcheck --report-api-errors no" racecheck synccheck)
    for check in "${checks[@]}"; do
        sanitized "$check" conformance_device every_format_and_row_type appended_rows
        if grep -q 'Device not supported' "$WORK/sanitized"; then
            echo "skipped: compute-sanitizer does not support this device"
            worst=77
            return
        fi
    done
    # Codes, sealed tiles, and what sequences share, as far as time reaches.
    for check in "${checks[@]}"; do
        sanitized "$check" gpu a_tile_that_stays_raw
        sanitized "$check" conformance_device_codes what_is_appended_is_attended
        sanitized "$check" device_capi_shared
    done
}

part_generate() {
    local dtype
    for dtype in f16 bf16; do
        echo "generate --device cuda --check --dtype $dtype"
        attempt within 60 "$BIN/generate" --device cuda --check --dtype "$dtype"
    done
    echo "generate --device cuda --check --kv-format kt4v4"
    attempt within 60 "$BIN/generate" --device cuda --check --kv-format kt4v4
}

part_bench() { OUT=$WORK attempt within 180 "$BIN/cuda" --bench; }

# FlashInfer compiles its kernels when they are first used, for this GPU alone: begun at once, beside
# everything else.
start_peers() {
    if [ -f "$HERE/flashinfer.tar.xz" ]; then
        unpack "$HERE/flashinfer.tar.xz" "$WORK/site" || return 0
        export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
    fi
    export FLASHINFER_NO_DOWNLOAD=1 PYTHONUNBUFFERED=1
    export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$WORK}
    if ! timeout 60 python3 -c 'import torch, flashinfer' 2>/dev/null; then return 0; fi
    export FLASHINFER_READY=$WORK/ready
    mkdir -p "$FLASHINFER_READY"
    export MAX_JOBS=${MAX_JOBS:-$(nproc)}
    local left=$((DEADLINE - $(date +%s)))
    compile() {
        timeout "$left" nice python3 "$HERE/peers.py" --compile "$@" >>"$WORK/compile.out" 2>&1 &
        COMPILERS+=($!)
    }
    compile "cuda cores" xqa
    compile fa2 "prefill fa2"
    compile fa3 "prefill fa3"
}

part_peers() {
    within 60 python3 -c 'import torch' 2>/dev/null || { echo "skipped: no PyTorch"; worst=77; return; }
    [ ! -f "$WORK/compile.out" ] || cat "$WORK/compile.out"
    # The sanitizer comes after this and may have what is left.
    local seconds=$((DEADLINE - $(date +%s) - 60))
    [ "$seconds" -le "${PEER_SECONDS:-200}" ] || seconds=${PEER_SECONDS:-200}
    attempt within $((seconds + 30)) python3 "$HERE/peers.py" --seconds "$seconds" \
        --json "$WORK/peers.json"
}

# In the order of what would be missed most where time runs out.
parts=(facts conformance graph generate bench peers sanitizer)

# How this script fares with parts that go wrong, for `pack.sh --check`.
part_fails() { attempt false; attempt echo "and goes on"; }
part_hangs() { attempt within 1 sleep 60; }
part_lacks() { echo "skipped: nothing to run"; worst=77; }
part_passes() { attempt true; }

# --- the run

unpack() {
    mkdir -p "$2"
    tar -xJf "$1" -C "$2" 2>/dev/null || python3 -m tarfile -e "$1" "$2"
}

# What can be seen without a GPU: every program starts and says what it lacks.
without() {
    local name
    starts() {
        local said code=0
        said=$(timeout -k 5 60 "$@" 2>&1) || code=$?
        printf '== %s\n' "${1##*/}"
        grep -a -m 3 -E 'skipped|test result|agree|checked' <<<"$said" || tail -n 2 <<<"$said"
        [ "$code" = 0 ] || { echo "failed: ${1##*/} ($code)"; worst=1; }
    }
    starts "$BIN/unit" cuda:: kernels::image
    starts "$BIN/conformance_device" --nocapture
    starts "$BIN/conformance_device_codes" --nocapture
    starts "$BIN/device_latents" --nocapture
    starts "$BIN/cache" device --nocapture
    starts "$BIN/device_capi" --nocapture
    starts "$BIN/device_capi_shared" --nocapture
    starts "$BIN/gpu" --nocapture
    starts "$BIN/generate" --prompt Hi --max-tokens 4 --check
    starts "$BIN/cuda" --bench
    starts python3 "$HERE/peers.py" --dry
    if timeout 60 "$BIN/generate" --device cuda --prompt Hi 2>&1; then
        echo "failed: generate ran on a device that is not there"
        worst=1
    fi
    for name in "${parts[@]}"; do echo "skipped: $name (no GPU)"; done
    [ "${KVCACHE_REQUIRE_GPU:-}" != 1 ] || { echo "failed: KVCACHE_REQUIRE_GPU is set"; exit 1; }
    [ "$worst" = 0 ] || exit 1
    exit 77
}

report() { python3 "$REPORT" "$WORK" "$OUT" "$HERE/VERSION"; }

# Runs parts one after another, each as a process of its own, and reports after each.
all() {
    local name code start failed=0 part
    ended() { echo "$name $1 $((SECONDS - start))" >>"$WORK/parts"; }
    # Whoever stops this run has what the part under way has written.
    trap 'kill "$part" 2>/dev/null || true; ended interrupted; report; exit 143' TERM INT
    for name in "$@"; do
        printf '\n== %s\n' "$name"
        start=$SECONDS code=0
        # To a file: what a killed command leaves behind cannot hold that open. Waited for, so that
        # a signal is heard at once.
        "${BASH_SOURCE[0]}" --part "$name" >"$WORK/$name.log" 2>&1 &
        part=$!
        wait "$part" || code=$?
        cat "$WORK/$name.log"
        case $code in
            0) ended passed ;;
            77) ended skipped ;;
            124 | 137) ended OUT-OF-TIME; failed=1 ;;
            *) ended FAILED; failed=1 ;;
        esac
        report || echo "failed: no report of $name"
    done
    trap - TERM INT
    printf '\n'
    cat "$WORK/parts"
    echo "$OUT/gpu.json $OUT/gpu.txt $OUT/gpu.log"
    return "$failed"
}

begin() {
    export OUT=${OUT:-$HERE/out} KVCACHE_REQUIRE_GPU=${KVCACHE_REQUIRE_GPU:-}
    mkdir -p "$OUT"
    DEADLINE=$(($(date +%s) + ${SECONDS_IN_ALL:-540}))
    WORK=$(mktemp -d)
    BIN=$WORK/bin REPORT=$HERE/report.py
    [ -f "$REPORT" ] || REPORT=$HERE/gpu/report.py
    export DEADLINE WORK BIN KVCACHE_MODEL_DIR=$WORK/model KVCACHE_LIB=$BIN/libkvcache.so
    COMPILERS=()
    trap '[ ${#COMPILERS[@]} = 0 ] || kill "${COMPILERS[@]}" 2>/dev/null || true; rm -rf "$WORK"' EXIT
}

run() {
    [ $# = 0 ] || parts=("$@")
    begin
    unpack "$HERE/pack.tar.xz" "$WORK"
    if ! timeout 60 nvidia-smi -L 2>/dev/null | grep -q GPU; then without; fi
    export KVCACHE_REQUIRE_GPU=1
    case " ${parts[*]} " in *" peers "*) start_peers ;; esac
    all "${parts[@]}"
}

case ${1:-} in
    pack) [ $# = 2 ] || { echo "usage: scripts/gpu.sh pack DIR"; exit 2; }; exec "$HERE/gpu/pack.sh" "$2" ;;
    run) shift; run "$@" ;;
    --part) "part_$2"; exit "$worst" ;;
    --try-parts) begin; all fails hangs lacks passes ;;
    *) sed -n '2,17p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
