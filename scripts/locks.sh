#!/usr/bin/env bash
# Every lock file of the repository fits its manifest: packages outside the workspace have their
# own, which a new dependency of the library outdates.
source "$(dirname "$0")/common.sh"
for lock in Cargo.lock benches/routers/Cargo.lock fuzz/Cargo.lock scripts/shuttle/Cargo.lock; do
    cargo metadata --locked --format-version 1 --manifest-path "${lock%.lock}.toml" >/dev/null
done
