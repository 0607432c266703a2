#!/usr/bin/env bash
# Everything that wants a GPU, on a machine that may have no Rust and no network.
#
#   scripts/gpu.sh pack DIR   here: builds tests, benchmark, example and libkvcache.so with their
#                             kernels (the pinned nvcc), and puts them into DIR with what they need
#   DIR/gpu.sh run            there: correctness, sanitizer, graphs, the served model, benchmark and
#                             peers, in ten minutes at most; $OUT (default: DIR/out) gets gpu.json,
#                             gpu.txt and a log for each part
#
# `run NAME...` runs only those parts. Without a GPU it shows that everything starts, says so and
# exits with 77 (KVCACHE_REQUIRE_GPU=1: fails). PyTorch and FlashInfer, where Python finds them, are
# the peers; compute-sanitizer is looked for in PATH, CUDA_HOME and /usr/local/cuda.
set -euo pipefail

# What a pack may weigh.
MOST_MIB=60

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

# Every part takes its own time limit in seconds, since one that hangs must not take the rest along.
part_facts() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem \
        --format=csv
    cat "$HERE/VERSION"
    timeout 60 "$HERE/bin/unit" cuda:: kernels::image --nocapture
}

part_conformance() {
    timeout 120 "$HERE/bin/conformance_device"
    timeout 60 "$HERE/bin/conformance_device_codes"
    timeout 60 "$HERE/bin/cache" device
}

part_graph() { timeout 60 "$HERE/bin/gpu" --nocapture --test-threads=1; }

part_sanitizer() {
    local tool check
    tool=$(sanitizer) || { echo "skipped: no compute-sanitizer"; return 77; }
    for check in memcheck racecheck synccheck; do
        echo "$check"
        timeout 60 "$tool" --tool "$check" --error-exitcode 1 "$HERE/bin/conformance_device" \
            --test-threads=1 every_format_and_row_type appended_rows
    done
}

part_generate() {
    local dtype
    for dtype in f16 bf16; do
        echo "generate --device cuda --check --dtype $dtype"
        KVCACHE_MODEL_DIR=$HERE/model timeout 60 "$HERE/bin/generate" --device cuda --check \
            --dtype "$dtype"
    done
}

part_bench() { OUT=$OUT timeout 240 "$HERE/bin/cuda" --bench; }

part_peers() {
    python3 -c 'import torch' 2>/dev/null || { echo "skipped: no PyTorch"; return 77; }
    # FlashInfer compiles its kernels when they are first used.
    KVCACHE_LIB=$HERE/bin/libkvcache.so FLASHINFER_NO_DOWNLOAD=1 \
        FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$OUT} \
        timeout 280 python3 "$HERE/peers.py" --seconds "${PEER_SECONDS:-240}" --json "$OUT/peers.json"
}

parts=(facts conformance graph sanitizer generate bench peers)

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
    local name code start failed=() states=()
    for name in "${parts[@]}"; do
        printf '\n== %s\n' "$name"
        start=$SECONDS
        code=0
        # A process of its own: `set -e` does not hold inside a tested command.
        "$HERE/gpu.sh" --part "$name" 2>&1 | tee "$OUT/$name.log" || code=${PIPESTATUS[0]}
        case $code in
            0) states+=("$name passed $((SECONDS - start))") ;;
            77) states+=("$name skipped $((SECONDS - start))") ;;
            *) states+=("$name FAILED $((SECONDS - start))"); failed+=("$name") ;;
        esac
    done
    printf '\n'
    printf '%s\n' "${states[@]}" | tee "$OUT/parts"
    report
    [ ${#failed[@]} = 0 ]
}

# One JSON and one table of everything.
report() {
    python3 - "$OUT" "$HERE/VERSION" <<'PYTHON'
import json, os, sys
out = sys.argv[1]
def load(name):
    path = os.path.join(out, name)
    return json.load(open(path)) if os.path.exists(path) else None
def text(name):
    path = os.path.join(out, name + ".log")
    return open(path, errors="replace").read() if os.path.exists(path) else ""
states = [line.split() for line in open(os.path.join(out, "parts"))]
everything = dict(
    version=open(sys.argv[2]).read().split("\n"),
    parts={name: dict(state=state, seconds=int(seconds)) for name, state, seconds in states},
    facts=text("facts"), kernels=load("kernels.json"), peers=load("peers.json"))
json.dump(everything, open(os.path.join(out, "gpu.json"), "w"), indent=1)
with open(os.path.join(out, "gpu.txt"), "w") as table:
    for name in ("facts", "bench", "peers", "generate"):
        if text(name):
            table.write(f"== {name}\n{text(name)}\n")
    table.writelines(" ".join(state) + " s\n" for state in states)
PYTHON
    echo "$OUT/gpu.json $OUT/gpu.txt"
}

case ${1:-} in
    pack) [ $# = 2 ] || { echo "usage: scripts/gpu.sh pack DIR"; exit 2; }; pack "$2" ;;
    run) shift; run "$@" ;;
    --part) "part_$2" ;;
    *) sed -n '2,15p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
