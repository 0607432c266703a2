#!/usr/bin/env bash
# The C and C++ programs under memcheck, as many at a time as there are cores. It knows no AVX-512, so
# the kernels run their AVX2 form.
source "$(dirname "$0")/common.sh"
need_debian valgrind libc6-dbg
programs=$(cargo run --quiet -p ffi-tests -- build "$TARGET_DIR/valgrind")
KVCACHE_CPU=$(uname -m | sed 's/x86_64/avx2/; s/aarch64/neon/')
check() {
    local said
    # A program's own operator new is left to it (one counts its calls); malloc below is memcheck's.
    if said=$(valgrind --quiet --soname-synonyms=somalloc=nouserintercepts --error-exitcode=99 \
        --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite "$1" 2>&1); then
        echo "valgrind $(basename "$1")"
    else
        printf '%s\nmemcheck found errors in %s\n' "$said" "$(basename "$1")"
        return 1
    fi
}
export -f check
export KVCACHE_CPU
# xargs fails where one has failed, after the others.
xargs -n 1 -P "$(nproc)" bash -c 'check "$0"' <<<"$programs"
