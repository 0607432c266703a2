"""Whether a command writes the tokens and texts that the Rust example `generate` writes: greedily, and drawn
at a temperature by a seed.

    same-tokens.py RUST_BINARY COMMAND...      options are appended to both, as --name value
"""

import json
import subprocess
import sys

SETTINGS = [
    ["--dtype", "bf16"],
    ["--dtype", "f32", "--temperature", "0.8", "--seed", "7"],
    ["--dtype", "f16", "--temperature", "1.2", "--seed", "99", "--batch", "8"],
]

rust, command = sys.argv[1], sys.argv[2:]
for setting in SETTINGS:
    runs = []
    for words in ([rust], command):
        output = subprocess.run([*words, "--json", *setting], check=True, stdout=subprocess.PIPE).stdout
        runs.append([(s["prompt"], s["tokens"], s["text"]) for s in json.loads(output)["sequences"]])
    if runs[0] != runs[1] or not runs[0]:
        sys.exit(f"{' '.join(setting)}: {runs[0]}\nis not {runs[1]}")
    print(f"{' '.join(setting)}: {len(runs[0])} texts, {sum(len(s[1]) for s in runs[0])} tokens alike")
