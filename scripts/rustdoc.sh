#!/usr/bin/env bash
# The manual builds without warnings: no broken link, no bare URL.
source "$(dirname "$0")/common.sh"
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --workspace
