#!/usr/bin/env bash
# What a GPU machine needs, into a folder: programs and model as one archive, the script that runs
# them, and with FLASHINFER=1 that peer.
#
#   scripts/gpu/pack.sh DIR       builds with the pinned nvcc and packs
#   scripts/gpu/pack.sh --check   builds nothing: what is named here and in gpu.sh is there
#
# Every program carries the same kernels; one dictionary over all of them stores those once.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# What a pack and the sources that travel beside it may weigh together.
MOST_MIB=${MOST_MIB:-62}
tests=(conformance_device conformance_device_codes device_latents cache cascade_cache device_capi
    device_capi_shared gpu)
bench=cuda
example=generate
model=(config.json model.safetensors tokenizer.txt)
scripts=(scripts/gpu.sh scripts/gpu/peers.py scripts/gpu/report.py)
# Tests that gpu.sh asks for by name.
named=(every_format_and_row_type appended_rows a_tile_that_stays_raw what_is_appended_is_attended)

check() {
    local name file
    for name in "${tests[@]}"; do
        [ -f "tests/$name.rs" ] || [ -f "tests/$name/main.rs" ] || { echo "no test $name"; exit 1; }
    done
    for file in "benches/$bench/main.rs" "examples/$example/main.rs" "${scripts[@]}" \
        "${model[@]/#/examples/generate/model/}"; do
        [ -f "$file" ] || { echo "no $file"; exit 1; }
    done
    for name in "${named[@]}"; do
        grep -q "$name" scripts/gpu.sh || { echo "gpu.sh does not run $name"; exit 1; }
        grep -rqE "$name" tests/conformance_device*.rs tests/gpu.rs tests/device ||
            { echo "there is no test $name"; exit 1; }
    done
    bash -n scripts/gpu.sh
    local before after=0
    # Two parts that fail, one that hangs and one that has nothing to run: the others still report.
    before=$(mktemp -d)
    OUT=$before scripts/gpu.sh --try-parts >/dev/null || after=$?
    [ "$after" = 1 ] || { echo "failing parts made gpu.sh exit with $after"; exit 1; }
    diff <(sed 's/ [0-9]* s$//' "$before/gpu.txt" | tail -4) - <<'TEXT' || exit 1
fails FAILED
hangs OUT-OF-TIME
lacks skipped
passes passed
TEXT
    rm -r "$before"
    python3 scripts/gpu/test_peers.py
}

pack() {
    local dir=$1 profile=${PROFILE:-dev} name targets=()
    mkdir -p "$dir"
    dir=$(cd "$dir" && pwd)
    stage=$(mktemp -d) built=$(mktemp)
    trap 'rm -rf "$stage" "$built"' EXIT
    mkdir "$stage/bin" "$stage/model"
    NVCC=${NVCC:-$(scripts/cuda-toolchain.sh "$TOOLS/cuda")}
    export NVCC KVCACHE_REQUIRE_NVCC=1
    for name in "${tests[@]}"; do targets+=(--test "$name"); done
    cargo test -p libkvcache --profile "$profile" --features cuda --no-run \
        --message-format=json-render-diagnostics --lib "${targets[@]}" --bench "$bench" >"$built"
    cargo build -p libkvcache --profile "$profile" --features cuda --example "$example" \
        --message-format=json-render-diagnostics >>"$built"
    # What peers.py calls with PyTorch's pointers.
    cargo build -p kvcache-c --profile "$profile" --features cuda \
        --message-format=json-render-diagnostics >>"$built"
    python3 - "$built" "$stage/bin" <<'PYTHON'
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
    strip "$stage"/bin/*
    for name in unit "$bench" "$example" libkvcache.so "${tests[@]}"; do
        [ -s "$stage/bin/$name" ] || { echo "cargo built no $name"; exit 1; }
    done
    cp "${model[@]/#/examples/generate/model/}" "$stage/model/"
    tar -C "$stage" -cf - bin model | xz -T1 --lzma2=preset=6,dict=128MiB >"$dir/pack.tar.xz"
    cp "${scripts[@]}" "$dir/"
    {
        echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
        echo "packed $(date -u +%F)"
    } >"$dir/VERSION"
    [ "${FLASHINFER:-}" != 1 ] || python3 scripts/gpu/flashinfer.py "$dir/flashinfer.tar.xz"
    local files tree
    files=$(cd "$dir" && du -cb -- *.* VERSION | tail -1 | cut -f1)
    tree=$({ git ls-files -z 2>/dev/null | du --files0-from=- -cb 2>/dev/null || true; } | tail -1 | cut -f1)
    echo "$dir: $(((files >> 20) + 1)) MiB, $(du -sm "$stage" | cut -f1) MiB unpacked;" \
        "the sources: $(((${tree:-0} >> 20) + 1)) MiB"
    (((files + ${tree:-0}) >> 20 < MOST_MIB)) || { echo "more than $MOST_MIB MiB together"; exit 1; }
}

case ${1:-} in
    --check) check ;;
    '' | -*) echo "usage: scripts/gpu/pack.sh DIR | --check"; exit 2 ;;
    *) pack "$1" ;;
esac
