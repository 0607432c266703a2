#!/usr/bin/env bash
# The C and C++ programs under memcheck. It knows no AVX-512, so the kernels run their AVX2 form.
source "$(dirname "$0")/common.sh"
need_debian valgrind libc6-dbg
programs=$(cargo run --quiet -p ffi-tests -- build "$TARGET_DIR/valgrind")
level=$(uname -m | sed 's/x86_64/avx2/; s/aarch64/neon/')
failed=()
for program in $programs; do
    echo "valgrind $(basename "$program")"
    KVCACHE_CPU=$level valgrind --quiet \
        --error-exitcode=99 --leak-check=full --show-leak-kinds=definite \
        --errors-for-leak-kinds=definite "$program" || failed+=("$(basename "$program")")
done
[ ${#failed[@]} = 0 ] || { echo "memcheck found errors in: ${failed[*]}"; exit 1; }
