#!/usr/bin/env bash
# Every benchmark compiles and runs once; nothing is measured.
source "$(dirname "$0")/common.sh"
cargo test --bench '*'
