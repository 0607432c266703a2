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
# a part gets at most what is left of that, and one that has less than a few seconds is skipped and
# said to be. Without a GPU it shows that everything starts, says so and exits with 77
# (KVCACHE_REQUIRE_GPU=1: fails). PyTorch and FlashInfer, where Python finds them, are the peers.
# compute-sanitizer is looked for in PATH, CUDA_HOME and /usr/local/cuda.
set -euo pipefail

# What a pack may weigh, FlashInfer (12 to 15 MiB) not counted: it travels with the sources.
MOST_MIB=${MOST_MIB:-36}

pack() {
    source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
    local dir=$1 profile=${PROFILE:-dev} built
    mkdir -p "$dir/bin" "$dir/model"
    dir=$(cd "$dir" && pwd)
    NVCC=${NVCC:-$(scripts/cuda-toolchain.sh "$TOOLS/cuda")}
    export NVCC KVCACHE_REQUIRE_NVCC=1
    built=$(mktemp)
    cargo test -p libkvcache --profile "$profile" --features cuda --no-run \
        --message-format=json-render-diagnostics \
        --lib --test conformance_device --test conformance_device_codes --test cache --test gpu \
        --bench cuda >"$built"
    cargo build -p libkvcache --profile "$profile" --features cuda --example generate \
        --message-format=json-render-diagnostics >>"$built"
    # What peers.py calls with PyTorch's pointers.
    cargo build -p kvcache-c --profile "$profile" --features cuda \
        --message-format=json-render-diagnostics >>"$built"
    python3 - "$built" "$dir/bin" <<'PYTHON'
import json, shutil, sys
for line in open(sys.argv[1]):
    message = json.loads(line)
    if message.get("reason") != "compiler-artifact":
        continue
    target = message["target"]
    if message.get("executable"):
        name = {"kvcache": "unit"}.get(target["name"], target["name"])
        shutil.copy(message["executable"], f"{sys.argv[2]}/{name}")
    for file in message["filenames"]:
        if target["name"] == "kvcache" and file.endswith("libkvcache.so"):
            shutil.copy(file, f"{sys.argv[2]}/libkvcache.so")
PYTHON
    rm "$built"
    strip "$dir"/bin/*
    cp examples/generate/model/{config.json,model.safetensors,tokenizer.txt} "$dir/model/"
    cp scripts/gpu.sh scripts/gpu/peers.py "$dir/"
    {
        echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
        echo "packed $(date -u +%F)"
    } >"$dir/VERSION"
    local mib
    mib=$(du -sm "$dir" --exclude=out | cut -f1)
    echo "$dir: $mib MiB"
    [ "$mib" -le "$MOST_MIB" ] || { echo "more than $MOST_MIB MiB"; exit 1; }
    [ "${FLASHINFER:-}" != 1 ] || python3 scripts/gpu/flashinfer.py "$dir/flashinfer.tar.xz"
}

# --- on the GPU machine: from here on nothing of the repository is needed

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

sanitizer() {
    local at
    for at in compute-sanitizer "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
        /usr/local/cuda/bin/compute-sanitizer; do
        command -v "$at" && return
    done
    return 1
}

# Runs a command for at most so many seconds, and no longer than the whole run may take.
within() {
    local most=$1 left=$((DEADLINE - $(date +%s)))
    shift
    if [ "$left" -lt 3 ]; then echo "skipped: $1 (no time is left)"; return 77; fi
    timeout -k 5 $((most < left ? most : left)) "$@"
}

part_facts() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem \
        --format=csv
    cat "$HERE/VERSION"
    within 60 "$HERE/bin/unit" cuda:: kernels::image --nocapture
}

part_conformance() {
    within 120 "$HERE/bin/conformance_device"
    within 60 "$HERE/bin/conformance_device_codes"
    within 60 "$HERE/bin/cache" device
}

part_graph() { within 60 "$HERE/bin/gpu" --nocapture --test-threads=1; }

part_sanitizer() {
    local tool check code=0
    tool=$(sanitizer) || { echo "skipped: no compute-sanitizer"; return 77; }
    for check in memcheck racecheck synccheck; do
        echo "$check"
        within 60 "$tool" --tool "$check" --error-exitcode 1 "$HERE/bin/conformance_device" \
            --test-threads=1 every_format_and_row_type appended_rows >"$WORK/sanitized" 2>&1 ||
            code=$?
        cat "$WORK/sanitized"
        if grep -q 'Device not supported' "$WORK/sanitized"; then
            echo "skipped: compute-sanitizer does not support this device"
            return 77
        fi
        [ "$code" = 0 ] || return "$code"
    done
}

part_generate() {
    local dtype
    for dtype in f16 bf16; do
        echo "generate --device cuda --check --dtype $dtype"
        KVCACHE_MODEL_DIR=$HERE/model within 60 "$HERE/bin/generate" --device cuda --check \
            --dtype "$dtype"
    done
}

part_bench() { OUT=$WORK within 180 "$HERE/bin/cuda" --bench; }

# FlashInfer compiles its kernels when they are first used, for this GPU alone: begun at once, beside
# everything else.
start_peers() {
    if [ -f "$HERE/flashinfer.tar.xz" ]; then
        mkdir -p "$WORK/site"
        tar -xJf "$HERE/flashinfer.tar.xz" -C "$WORK/site"
        export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
    fi
    export KVCACHE_LIB=$HERE/bin/libkvcache.so FLASHINFER_NO_DOWNLOAD=1 PYTHONUNBUFFERED=1
    export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$WORK}
    if ! python3 -c 'import torch, flashinfer' 2>/dev/null; then return; fi
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
    python3 -c 'import torch' 2>/dev/null || { echo "skipped: no PyTorch"; return 77; }
    [ ! -f "$WORK/compile.out" ] || cat "$WORK/compile.out"
    # The sanitizer comes after this and may have what is left.
    local seconds=$((DEADLINE - $(date +%s) - 60))
    [ "$seconds" -le "${PEER_SECONDS:-200}" ] || seconds=${PEER_SECONDS:-200}
    within $((seconds + 30)) python3 "$HERE/peers.py" --seconds "$seconds" \
        --json "$WORK/peers.json"
}

# In the order of what would be missed most where time runs out.
parts=(facts conformance graph generate bench peers sanitizer)

# What can be seen without a GPU: every program starts and says what it lacks.
without() {
    local name
    for name in conformance_device conformance_device_codes gpu cuda; do
        echo "== $name"
        timeout 60 "$HERE/bin/$name" --nocapture 2>&1 | grep -a -m 3 -E 'skipped|test result' || true
    done
    timeout 60 "$HERE/bin/unit" cuda:: kernels::image 2>&1 | grep -a 'test result'
    KVCACHE_LIB=$HERE/bin/libkvcache.so python3 "$HERE/peers.py" --dry
    KVCACHE_MODEL_DIR=$HERE/model timeout 60 "$HERE/bin/generate" --prompt Hi --max-tokens 4 --check \
        2>/dev/null | tail -1
    if KVCACHE_MODEL_DIR=$HERE/model "$HERE/bin/generate" --device cuda --prompt Hi 2>&1; then
        echo "generate ran on a device that is not there"
        exit 1
    fi
    echo "skipped: no GPU"
    [ "${KVCACHE_REQUIRE_GPU:-}" != 1 ] || { echo "KVCACHE_REQUIRE_GPU is set"; exit 1; }
    exit 77
}

run() {
    [ $# = 0 ] || parts=("$@")
    export OUT=${OUT:-$HERE/out} KVCACHE_REQUIRE_GPU=${KVCACHE_REQUIRE_GPU:-}
    mkdir -p "$OUT"
    if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then without; fi
    export KVCACHE_REQUIRE_GPU=1
    DEADLINE=$(($(date +%s) + ${SECONDS_IN_ALL:-540}))
    WORK=$(mktemp -d)
    export DEADLINE WORK
    COMPILERS=()
    trap 'kill "${COMPILERS[@]}" 2>/dev/null || true; rm -rf "$WORK"' EXIT
    case " ${parts[*]} " in *" peers "*) start_peers ;; esac
    local name code start failed=()
    for name in "${parts[@]}"; do
        printf '\n== %s\n' "$name"
        start=$SECONDS
        code=0
        # A process of its own: `set -e` does not hold inside a tested command.
        "$HERE/gpu.sh" --part "$name" 2>&1 | tee "$WORK/$name.log" || code=${PIPESTATUS[0]}
        case $code in
            0) echo "$name passed $((SECONDS - start))" ;;
            77) echo "$name skipped $((SECONDS - start))" ;;
            124 | 137) echo "$name OUT-OF-TIME $((SECONDS - start))"; failed+=("$name") ;;
            *) echo "$name FAILED $((SECONDS - start))"; failed+=("$name") ;;
        esac >>"$WORK/parts"
        report
    done
    printf '\n'
    cat "$WORK/parts"
    echo "$OUT/gpu.json $OUT/gpu.txt $OUT/gpu.log"
    [ ${#failed[@]} = 0 ]
}

# One JSON, one table and one log of everything so far.
report() {
    python3 - "$WORK" "$OUT" "$HERE/VERSION" <<'PYTHON'
import json, os, sys
work, out, version = sys.argv[1:]
def load(name):
    path = os.path.join(work, name)
    return json.load(open(path)) if os.path.exists(path) else None
def text(name):
    return open(os.path.join(work, name + ".log"), errors="replace").read()
states = [line.split() for line in open(os.path.join(work, "parts"))]
everything = dict(
    version=open(version).read().split("\n"),
    parts={name: dict(state=state, seconds=int(seconds)) for name, state, seconds in states},
    facts=text(states[0][0]) if states[0][0] == "facts" else None,
    kernels=load("kernels.json"), peers=load("peers.json"))
json.dump(everything, open(os.path.join(out, "gpu.json"), "w"), indent=1)
ran = [name for name, _, _ in states]
with open(os.path.join(out, "gpu.txt"), "w") as table:
    for name in ("facts", "bench", "peers", "generate"):
        if name in ran:
            table.write(f"== {name}\n{text(name)}\n")
    table.writelines(" ".join(state) + " s\n" for state in states)
with open(os.path.join(out, "gpu.log"), "w") as log:
    for name in ran:
        log.write(f"== {name}\n{text(name)[-1 << 20:]}\n")
PYTHON
}

case ${1:-} in
    pack) [ $# = 2 ] || { echo "usage: scripts/gpu.sh pack DIR"; exit 2; }; pack "$2" ;;
    run) shift; run "$@" ;;
    --part) "part_$2" ;;
    *) sed -n '2,15p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
