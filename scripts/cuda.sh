#!/usr/bin/env bash
# Compiles the CUDA kernels of a default build with a pinned nvcc and holds what ptxas made of them against
# the committed table cuda/resources.txt: registers, stack, spills, and how often the instructions stand in
# the machine code that the kernels are built on. A spill, or an attention kernel without matrix products
# and 16-byte copies, is an error whatever the table says. `--write` writes the table, of all kernels.
# `--release` (in deep.sh) compiles every kernel for every architecture of a release, and holds what has no
# table to the same rules.
source "$(dirname "$0")/common.sh"
archs=(80 90a)
[ "${1:-}" != --release ] || archs=(80 86 89 90a 100a 120)
table=cuda/resources.txt
# The head dimensions that a default build leaves out.
others='_d(80|96|192)'
[ $# = 0 ] || others=none

python3 -m pip --version >/dev/null 2>&1 || skip "no python3 with pip to fetch nvcc with"
command -v "${CXX:-c++}" >/dev/null || skip "no C++ compiler, which nvcc needs"
nvcc=$(scripts/cuda-toolchain.sh "$TOOLS/cuda")
# cuobjdump calls nvdisasm by name.
export PATH=${nvcc%/*}:$PATH

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
build() { # source, architecture
    local name
    name=$(basename "$1" .cu)
    nvcc -cubin -std=c++17 -O3 -arch="sm_$2" -Xptxas -v "$1" -o "$out/$name-$2.cubin" \
        2>"$out/$name-$2.log" || { cat "$out/$name-$2.log"; return 1; }
    cuobjdump -sass "$out/$name-$2.cubin" >"$out/$name-$2.sass"
    awk -v arch="sm_$2" '
        FNR == 1 { file++ }
        file == 1 && /Function properties for/ { kernel = $NF }
        file == 1 && /bytes stack frame/ {
            for (i = 1; i < NF; i++) if ($(i + 1) == "bytes") {
                if ($(i + 2) == "stack") stack[kernel] = $i
                else spill[kernel] += $i
            }
            names[++n] = kernel
        }
        file == 1 && /Used [0-9]+ registers/ {
            for (i = 1; i < NF; i++) if ($i == "Used") registers[kernel] = $(i + 1)
        }
        file == 2 && /Function :/ { kernel = $NF }
        file == 2 && /HMMA/ { hmma[kernel]++ }
        file == 2 && /LDSM/ { ldsm[kernel]++ }
        file == 2 && /MOVM/ { movm[kernel]++ }
        file == 2 && /LDGSTS.*\.128(\.ZFILL)? / { copy[kernel]++ }
        file == 2 && /LDG\.[.A-Z0-9_]*\.128/ { load[kernel]++ }
        file == 2 && /STG\.[.A-Z0-9_]*\.128/ { store[kernel]++ }
        file == 2 && /UBLKCP/ { bulk[kernel]++ }
        END {
            for (i = 1; i <= n; i++) {
                k = names[i]
                printf "%-7s %-24s %9d %5d %6d %5d %5d %5d %8d %7d %8d %4d\n", arch, k,
                    registers[k], stack[k], spill[k], hmma[k], ldsm[k], movm[k], copy[k], load[k],
                    store[k], bulk[k]
            }
        }' "$out/$name-$2.log" "$out/$name-$2.sass" >"$out/$name-$2.rows"
}
export -f build
export out
for arch in "${archs[@]}"; do
    for source in cuda/*.cu; do
        [[ $source =~ $others[.]cu$ ]] || echo "$source $arch"
    done
done | xargs -P "$(nproc)" -L 1 bash -c 'build "$0" "$1"' || exit 1
# The emulator's sound probes must be valid device code too: a GPU can run them.
for source in cuda/emu/probes*.cu; do
    nvcc -cubin -std=c++17 -O3 -arch=sm_90a "$source" -o "$out/probes.cubin"
done

{
    echo "# Written by scripts/cuda.sh --write with nvcc $(nvcc --version | sed -n 's/.* V//p')."
    printf '%-7s %-24s %9s %5s %6s %5s %5s %5s %8s %7s %8s %4s\n' '# arch' kernel registers stack \
        spills HMMA LDSM MOVM copy128 load128 store128 bulk
    sort "$out"/*.rows
} >"$out/table"
awk '!/^#/ && ($4 != 0 || $5 != 0) { print "spills or stack: " $0; bad = 1 }
    !/^#/ && $2 ~ /^kvc_decode_(f16|bf16)/ && ($6 == 0 || $7 == 0 || $8 == 0 || $9 == 0) {
        print "no matrix instructions or no 16-byte copies: " $0; bad = 1 }
    !/^#/ && $1 == "sm_90a" && $2 ~ /^kvc_decode_(f16|bf16)/ && $12 == 0 {
        print "no bulk copies: " $0; bad = 1 }
    !/^#/ && $2 ~ /^kvc_decode_(fp8|int8|int4|nvfp4)/ && ($6 == 0 || $7 == 0 || $8 == 0 || $9 == 0) {
        print "no matrix instructions or no 16-byte copies: " $0; bad = 1 }
    !/^#/ && $2 ~ /^kvc_decode_kt/ && ($6 == 0 || $8 == 0 || $9 == 0) {
        print "no matrix instructions or no 16-byte copies: " $0; bad = 1 }
    !/^#/ && $1 == "sm_90a" && $2 ~ /^kvc_decode_kt/ && $12 == 0 {
        print "no bulk copies: " $0; bad = 1 }
    !/^#/ && $2 ~ /^kvc_mla_/ && ($6 == 0 || $7 == 0 || $9 == 0) {
        print "no matrix instructions or no 16-byte copies: " $0; bad = 1 }
    !/^#/ && $2 ~ /^kvc_prefill_/ && ($6 == 0 || $7 == 0 || $9 == 0 || $11 == 0) {
        print "no matrix instructions, or no 16-byte copies or stores: " $0; bad = 1 }
    !/^#/ && $2 ~ /^kvc_(append|append_plain|copy|merge|zero)$/ && (($10 == 0 && $2 != "kvc_zero") || $11 == 0) {
        print "no 16-byte loads or stores: " $0; bad = 1 }
    END { exit bad }' "$out/table"
if [ "${1:-}" = --release ]; then
    diff -u <(grep '^sm_' "$table") <(grep -E '^sm_(80|90a) ' "$out/table") ||
        { echo "cuda/resources.txt is stale: scripts/cuda.sh --write"; exit 1; }
    echo "$(grep -vc '^#' "$out/table") kernels for ${archs[*]}: no spills, no stack"
    exit
fi
if [ "${1:-}" = --write ]; then cp "$out/table" "$table"; fi
diff -u <(grep -vE "$others " "$table") "$out/table" ||
    { echo "cuda/resources.txt is stale: scripts/cuda.sh --write"; exit 1; }
cat "$out/table"

# What packs the tests for a GPU machine, and runs them there, names what there is.
scripts/gpu/pack.sh --check

# The build script: compiled, embedded, aligned; of the sources above a part, for one architecture.
KVCACHE_REQUIRE_NVCC=1 NVCC=$nvcc KVCACHE_CUDA_ARCHS='90a;90-virtual' KVCACHE_CUDA_HEAD_DIMS=64 \
    cargo test "${UNOPTIMISED[@]}" -p libkvcache --features cuda --lib kernels::
