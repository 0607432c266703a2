#!/usr/bin/env bash
# The Python wheel: built, installed into an environment that has nothing else of ours, its types
# checked, its tests run there, and the example's tokens compared with the Rust one's.
source "$(dirname "$0")/common.sh"
wheel=$(scripts/python-wheel.sh)
env=$TARGET_DIR/python
rm -rf "$env"
python3 -m venv "$env"
# As a user does it: the wheel, and what it names as its dependencies.
"$env/bin/pip" install --quiet --disable-pip-version-check "$wheel"
(cd / && "$env/bin/python" -c 'import kvcache; print(kvcache.build_info())')
"$env/bin/pip" install --quiet --disable-pip-version-check -r bindings/python/requirements.txt
"$env/bin/python" -m mypy --config-file bindings/python/pyproject.toml -p kvcache
"$env/bin/python" -m pytest -q -rs -p no:cacheprovider bindings/python/tests
cargo build --quiet --release --example generate
OPENBLAS_NUM_THREADS=1 KVCACHE_MODEL_DIR=$ROOT/examples/generate/model \
    python3 scripts/same-tokens.py "$TARGET_DIR/release/examples/generate" \
    "$env/bin/python" bindings/python/examples/generate.py --model examples/generate/model

# README.md's program, as it stands there; and its install line, whose wheel is the one from above.
[ "$(python3 scripts/readme.py '## From Python' sh)" = 'pip install ./bindings/python numpy' ]
python3 scripts/readme.py '## From Python' python >"$env/hello.py"
[ "$(cd "$env" && bin/python hello.py | tee /dev/stderr)" = '0 tokens cached, 4 held' ]
