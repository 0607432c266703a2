#!/bin/sh
# Installs a pinned nvcc into DIR without root, from the PyPI wheels that NVIDIA publishes, and
# prints the path of nvcc on stdout. Needs python3 with pip and a host C++ compiler, no GPU.
#
# usage: scripts/cuda-toolchain.sh [DIR]        (default: .toolchain/cuda)
#
# 13.0, because PTX of a newer toolkit asks for a newer driver than many machines have; nvvm and crt
# must be those of nvcc, or ptxas refuses the PTX. cuobjdump and nvdisasm only read cubins and exist
# as wheels from 13.2 on. Running it again with the same pins does nothing.
set -eu

dir=${1:-.toolchain/cuda}
python=${PYTHON:-python3}

# name==version, then the hash of the x86_64 wheel and of the aarch64 wheel.
pins='
nvidia-cuda-nvcc==13.0.88 56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03 c7ff28f86a24effdc6c034fa15230c549a273e4771b10a7fec14996f8cf3307f
nvidia-nvvm==13.0.88 c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0 c4376a291d72d22a315d9d2f69bdae8f8cd83a627f75bad395cee49a0fe65dc1
nvidia-cuda-crt==13.0.88 2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4 ee2ea2a97073e02ee62bb27841f437332be2c248e3eac013df07997ada39c003
nvidia-cuda-runtime==13.0.96 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548 ef9bcbe90493a2b9d810e43d249adb3d02e98dd30200d86607d8d02687c43f55
nvidia-cuda-cccl==13.0.85 e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649 6f0203e29fed809ee2b7fe9b1344df66ecab990c37d6a2e0e189b26d6c97ed7c
nvidia-cuda-cuobjdump==13.2.86 d332c2ffe78e703ca0a3894be927f83124244e2acf0d792b8c12b4362d44d837 9a025b92d5faca837f69841317760df9b27f3871bfa089d80cc428399743fd56
nvidia-cuda-nvdisasm==13.2.86 53606e719ecae07a2335f95902d5a1393a0cc1c317499ee7ffcf628a44385f2c d02c627f7aecfcac4dd5e923e94adeaa6607c5fdae8df750b01ad948d38941d3
'

nvcc=$dir/nvidia/cu13/bin/nvcc
stamp=$dir/pins
if [ -x "$nvcc" ] && printf '%s' "$pins" | cmp -s - "$stamp"; then
    (cd "$dir" && printf '%s\n' "$PWD/nvidia/cu13/bin/nvcc")
    exit 0
fi

if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "cuda-toolchain: $python has no pip (Debian: apt-get install python3-pip)" >&2
    exit 1
fi

# Build the new tree beside the old one, so that an interrupted install leaves no half of either.
mkdir -p "$(dirname "$dir")"
new=$dir.new.$$
trap 'rm -rf "$new"' EXIT INT TERM
mkdir -p "$new"
printf '%s' "$pins" | while read -r spec x86_64 aarch64; do
    [ -n "$spec" ] || continue
    printf '%s --hash=sha256:%s --hash=sha256:%s\n' "$spec" "$x86_64" "$aarch64"
done >"$new/requirements.txt"
"$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
    --no-deps --only-binary :all: --require-hashes --target "$new" -r "$new/requirements.txt" >&2
chmod +x "$new"/nvidia/cu13/bin/* "$new"/nvidia/cu13/nvvm/bin/* 2>/dev/null || true
"$new/nvidia/cu13/bin/nvcc" --version >/dev/null
printf '%s' "$pins" >"$new/pins"
rm -rf "$dir"
mv "$new" "$dir"
trap - EXIT INT TERM
(cd "$dir" && printf '%s\n' "$PWD/nvidia/cu13/bin/nvcc")
