#!/usr/bin/env bash
# libkvcache as C and C++ programs get it: installed below a DESTDIR, moved, found through pkg-config
# and find_package, shared and static; then the C++ examples: the Rust example's tokens, and a server
# under 64 clients. Last what README.md says under "Installed", word for word.
source "$(dirname "$0")/common.sh"
need_debian cmake pkg-config nlohmann-json3-dev libcpp-httplib-dev libssl-dev zlib1g-dev libbrotli-dev
python3 --version >/dev/null 2>&1 || skip "no python3 for the clients"
work=$TARGET_DIR/cpp
rm -rf "$work"
mkdir -p "$work"

# Installed for /opt/kvcache below a DESTDIR, then moved elsewhere.
scripts/install.sh --prefix /opt/kvcache --destdir "$work/dest" --libdir lib64
[ -z "$(grep -rlI "$work" "$work/dest")" ] || { echo "an installed file knows where it was made"; exit 1; }
mv "$work/dest/opt/kvcache" "$work/moved"
export PKG_CONFIG_PATH=$work/moved/lib64/pkgconfig
soname=$(readelf -d "$work/moved/lib64/libkvcache.so" | sed -n 's/.*(SONAME).*\[\(.*\)\]/\1/p')
[ -e "$work/moved/lib64/$soname" ] || { echo "no $soname beside libkvcache.so"; exit 1; }

# links PROGRAM shared|static: how it is linked, and that it runs.
links() {
    local count
    count=$(readelf -d "$1" | grep -c "(NEEDED).*$soname" || true)
    [ "$count" = "$([ "$2" = shared ] && echo 1 || echo 0)" ] ||
        { echo "$1 is not linked $2"; exit 1; }
    LD_LIBRARY_PATH=$work/moved/lib64 "$1" || { echo "$1 failed"; exit 1; }
}

echo "-- pkg-config"
for how in shared static; do
    module=kvcache$([ $how = shared ] || echo -static)
    # shellcheck disable=SC2046 # Flags are words.
    cc -std=c11 -Wall -Wextra -Werror ffi-tests/c/serve.c -o "$work/c-$how" \
        $(pkg-config --cflags --libs "$module") -lm
    links "$work/c-$how" $how
    # shellcheck disable=SC2046
    c++ -std=c++17 -Wall -Wextra -Werror bindings/cpp/tests/exceptions.cpp -o "$work/cpp-$how" \
        $(pkg-config --cflags --libs "$module")
    links "$work/cpp-$how" $how
done
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
[ "$(pkg-config --modversion kvcache)" = "$version" ] || { echo "kvcache.pc has another version"; exit 1; }

echo "-- find_package"
asked=$work/asked
mkdir -p "$asked"
cat >"$asked/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.16)
project(asked C)
find_package(kvcache ${ASKED} CONFIG)
if(NOT kvcache_FOUND)
  message(FATAL_ERROR "refused")
endif()
CMAKE
for ask in "0.1 yes" "0.1.0 yes" "0.2 no" "0.1.9 no" "0.0 no" "1.0 no" "10.1 no"; do
    read -r ask answer <<<"$ask"
    said=yes
    cmake -S "$asked" -B "$asked/$ask" -DASKED="$ask" -DCMAKE_PREFIX_PATH="$work/moved" \
        >"$asked/$ask.log" 2>&1 || said=no
    [ $said = "$answer" ] || { cat "$asked/$ask.log"; echo "find_package(kvcache $ask): $said"; exit 1; }
done
for how in shared static; do
    cmake -S bindings/cpp/examples -B "$work/$how" -DCMAKE_PREFIX_PATH="$work/moved" \
        -DKVCACHE_STATIC=$([ $how = static ] && echo ON || echo OFF) -DCMAKE_CXX_FLAGS=-Werror >/dev/null
    target=$([ $how = static ] && echo all || echo generate)
    cmake --build "$work/$how" --target "$target" -j "$(nproc)" -- --no-print-directory --quiet
    links "$work/$how/generate" $how >"$work/$how.txt"
done
cmp "$work/shared.txt" "$work/static.txt"

echo "-- the tokens of examples/generate"
cargo build --quiet --release --example generate
for flags in "" "--temperature 0.8 --seed 7 --batch 3" "--dtype f32 --temperature 1.2 --seed 99" \
    "--dtype f16 --max-tokens 70"; do
    # shellcheck disable=SC2086 # Flags are words.
    "$work/static/generate" --json $flags >"$work/cpp.json"
    # shellcheck disable=SC2086
    "$TARGET_DIR/release/examples/generate" --json $flags >"$work/rust.json" 2>/dev/null
    python3 - "$work/cpp.json" "$work/rust.json" <<'PYTHON'
import json, sys
ours, rust = (json.load(open(path, encoding="utf-8")) for path in sys.argv[1:])
assert ours["sequences"] == rust["sequences"], "other tokens or texts than from Rust"
assert ours["prefix_hit_tokens"] == rust["prefix_hit_tokens"], "other hits than from Rust"
print(sum(len(s["tokens"]) for s in ours["sequences"]), "tokens equal")
PYTHON
done

echo "-- the server"
# Ragged prompts: the examples', and pieces of the held-out text of 15 to 960 characters.
prompts=()
while IFS= read -r line; do prompts+=(--prompt "$line"); done <examples/generate/prompts.txt
text=$(tr -s '\n' ' ' <examples/generate/model/heldout.txt)
for i in 1 2 3 4 5 6 7 8; do prompts+=(--prompt "${text:$((i * 700)):$((i * i * 15))}"); done
"$TARGET_DIR/release/examples/generate" --json --dtype f32 --max-tokens 40 "${prompts[@]}" \
    >"$work/expected.json" 2>/dev/null
# Once with room for all, once with so few blocks that requests give theirs back and wait.
for blocks in 1024 120; do
    python3 scripts/clients.py "$work/expected.json" -- \
        "$work/static/server" --dtype f32 --blocks $blocks
done

echo "-- README.md, \"Installed\""
# The home folder will be another one; cargo and rustup stay where they are.
export CARGO_HOME=${CARGO_HOME:-$HOME/.cargo} RUSTUP_HOME=${RUSTUP_HOME:-$HOME/.rustup}
python3 - "$work/readme" <<'PYTHON'
import os, pathlib, subprocess, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
text = pathlib.Path("README.md").read_text(encoding="utf-8")
part = text.split("### Installed, from C and C++", 1)[1].split("\n## ", 1)[0]
blocks = [block.split("```", 1)[0] for block in part.split("```")[1::2]]
name, code = "hello.cpp", next(b for b in blocks if b.startswith("cpp\n"))
(folder / name).write_text(code.removeprefix("cpp\n"), encoding="utf-8")
program = next(b for b in text.split("## From C", 1)[1].split("```")[1::2] if b.startswith("c\n"))
(folder / "serve.c").write_text(program.removeprefix("c\n"), encoding="utf-8")
install, build = (b.removeprefix("sh\n") for b in blocks if b.startswith("sh\n"))
# The home folder is this one, so that nothing of the machine is touched.
script = f'set -e\nexport HOME="{folder}"\n{install}\ncd "{folder}"\n{build}'
kept = {name: value for name, value in os.environ.items()
        if name == "PATH" or name.startswith(("CARGO", "RUSTUP"))}
output = subprocess.run(["bash", "-c", script], env=kept, check=True, stdout=subprocess.PIPE,
                        text=True).stdout
print(output, end="")
assert output.count("0 tokens cached") == 2, "the README's programs must run"
PYTHON

if cargo cinstall --version >/dev/null 2>&1 || [ -x "$TOOLS/bin/cargo-cinstall" ]; then
    scripts/cinstall.sh
else
    echo "cargo cinstall is tested by scripts/deep.sh, which builds cargo-c"
fi
