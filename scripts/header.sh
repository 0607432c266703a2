#!/usr/bin/env bash
# include/kvcache.h is what the sources generate.
source "$(dirname "$0")/common.sh"
fresh=$(mktemp)
trap 'rm -f "$fresh"' EXIT
KVCACHE_HEADER_OUT=$fresh cargo check -p libkvcache --features generate-header
diff -u include/kvcache.h "$fresh" ||
    { echo "include/kvcache.h is stale: cargo check --features generate-header"; exit 1; }
