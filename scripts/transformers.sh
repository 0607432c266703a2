#!/usr/bin/env bash
# Hugging Face models on the library's cache, against their own. torch and transformers come from PyPI,
# 3 GB of wheels: the stage says how long fetching them took.
source "$(dirname "$0")/common.sh"
wheel=$(scripts/python-wheel.sh)
uv=$TOOLS/python/bin/uv env=$TOOLS/transformers
# One thread each for torch and its OpenMP: the models are tiny, and spinning threads cost more.
export OMP_NUM_THREADS=1
start=$SECONDS
pins=$(cat bindings/python/requirements*.txt)
if ! [ "$(cat "$env/pins" 2>/dev/null)" = "$pins" ]; then
    rm -rf "$env"
    "$uv" venv --quiet --python "$(command -v python3)" "$env"
    "$uv" pip install --quiet --python "$env/bin/python" \
        -r bindings/python/requirements.txt -r bindings/python/requirements-transformers.txt
    echo "$pins" >"$env/pins"
fi
echo "torch and transformers: $((SECONDS - start)) s"
"$uv" pip install --quiet --python "$env/bin/python" --reinstall-package kvcache "$wheel"
"$env/bin/python" -m pytest -q -rs -p no:cacheprovider -W ignore::FutureWarning \
    bindings/python/tests/test_transformers.py bindings/python/tests/test_arrays.py

# README.md's program, as it stands there.
python3 scripts/readme.py '## From Python' python 1 >"$env/hello.py"
"$env/bin/python" "$env/hello.py" | tee /dev/stderr | grep -qx '59 tokens found'
