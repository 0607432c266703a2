#!/usr/bin/env bash
# Builds the Python wheel and prints its path on stdout; the tools come from PyPI, pinned.
source "$(dirname "$0")/common.sh"
python3 -m venv --help >/dev/null 2>&1 || skip "no python3 with venv" >&2
tools=$TOOLS/python
if ! cmp -s bindings/python/requirements.txt "$tools/pins"; then
    rm -rf "$tools"
    python3 -m venv "$tools" >&2
    "$tools/bin/pip" install --quiet --disable-pip-version-check -r bindings/python/requirements.txt >&2
    cp bindings/python/requirements.txt "$tools/pins"
fi
out=$TARGET_DIR/wheels
rm -rf "$out"
(cd bindings/python && "$tools/bin/maturin" build --quiet --release --out "$out" "$@") >&2
ls "$out"/*.whl
