#!/usr/bin/env bash
# The disk tier beside fio, measured: minutes, and only a machine with nothing else to do shows much.
# KVCACHE_BENCH_DIR is where both write.
source "$(dirname "$0")/common.sh"
need_debian fio
cargo bench -p libkvcache --features io-uring --bench disk
