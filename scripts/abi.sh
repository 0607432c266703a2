#!/usr/bin/env bash
# The header's promise: Python's cffi parses it; no function and no field that an older header had
# has gone or moved. Older are the snapshots of ffi-tests and the last release's tag, if there is
# one. abidiff compares libraries made of the headers alone, so no old library has to be built.
source "$(dirname "$0")/common.sh"
need_debian abigail-tools
cffi=cffi==2.0.0
python3 -m pip --version >/dev/null 2>&1 || skip "no pip to fetch $cffi with"
[ -d "$TOOLS/cffi/cffi" ] || python3 -m pip install --quiet --disable-pip-version-check \
    --root-user-action=ignore --target "$TOOLS/cffi" "$cffi"
PYTHONPATH=$TOOLS/cffi python3 scripts/abi.py cffi include/kvcache.h
work=$TARGET_DIR/abi
rm -rf "$work"
mkdir -p "$work"

# library FOLDER: a library with the functions and types of FOLDER/kvcache.h and no code.
library() {
    python3 scripts/abi.py stubs "$1/kvcache.h" "$1/stubs.c"
    cc -g -w -shared -fPIC "$1/stubs.c" -o "$1/stubs.so"
}
mkdir "$work/now"
cp include/kvcache.h "$work/now"
library "$work/now"

# compare NAME: the header in $work/NAME against today's.
compare() {
    local code=0
    library "$work/$1"
    python3 scripts/abi.py offsets "$work/$1/kvcache.h" "$work/offsets.c"
    for header in "$1" now; do
        cc -I"$work/$header" "$work/offsets.c" -o "$work/$1/offsets-$header"
        "$work/$1/offsets-$header" >"$work/$1/$header.txt"
    done
    diff "$work/$1/$1.txt" "$work/$1/now.txt" || { echo "fields have moved since $1"; exit 1; }
    # 1 and 2: could not run; 8: something that programs use has gone. 4 alone: it has grown.
    abidiff "$work/$1/stubs.so" "$work/now/stubs.so" >"$work/$1/abidiff.txt" || code=$?
    if [ $((code & 11)) != 0 ]; then
        cat "$work/$1/abidiff.txt"
        exit 1
    fi
    echo "$1: $(wc -l <"$work/$1/$1.txt") fields where they were;" \
        "$(sed -n 's/^Functions changes summary: //p' "$work/$1/abidiff.txt")"
}
for folder in ffi-tests/snapshots/*/; do
    name=$(basename "$folder")
    mkdir "$work/$name"
    cp "$folder/kvcache.h" "$work/$name"
    compare "$name"
done
if tag=$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null); then
    mkdir "$work/$tag"
    git show "$tag:include/kvcache.h" >"$work/$tag/kvcache.h"
    compare "$tag"
else
    echo "no release has been tagged yet"
fi

# The checks find what they are for: a field that moved, and a function that is gone.
mkdir "$work/planted"
sed 's/^    uint32_t max_seqs;$/    uint64_t max_seqs;/' include/kvcache.h >"$work/planted/kvcache.h"
! (compare planted) >"$work/planted.txt" 2>&1 || { echo "a moved field was not found"; exit 1; }
grep -q 'fields have moved' "$work/planted.txt"
rm -r "$work/planted" && mkdir "$work/planted"
sed 's/^void kvc_abi_0_1(void);$/void kvc_abi_0_1(void);\nvoid kvc_gone(void);/' include/kvcache.h \
    >"$work/planted/kvcache.h"
! (compare planted) >"$work/planted.txt" 2>&1 || { echo "a missing function was not found"; exit 1; }
grep -q 'kvc_gone' "$work/planted.txt"
echo "a moved field and a missing function would be found"
