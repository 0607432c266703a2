"""What a run of gpu.sh has so far, as one JSON, one readable table and one log.

    python3 report.py WORK OUT VERSION

WORK has a line `NAME STATE SECONDS` in `parts` and a log NAME.log for each part that has ended, and
what benchmark and peers have written. A file that is cut off is left out, and nothing else with it.
"""

import json
import os
import sys

# What belongs into the table, in this order.
TABLE = ("facts", "bench", "peers", "conformance", "graph", "generate")


def load(folder, name):
    """A JSON file, or None where there is none or only a part of one."""
    try:
        with open(os.path.join(folder, name)) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def text(folder, name):
    try:
        with open(os.path.join(folder, name), errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def replace(path, content):
    """Whole or not at all: the run may be killed at any time."""
    with open(path + ".part", "w") as file:
        file.write(content)
    os.replace(path + ".part", path)


def main():
    work, out, version = sys.argv[1:]
    states = [line.split() for line in text(work, "parts").splitlines()]
    logs = {name: text(work, name + ".log") for name, _, _ in states}
    parts = {name: dict(state=state, seconds=int(seconds)) for name, state, seconds in states}
    everything = dict(
        version=text(os.path.dirname(version), os.path.basename(version)).splitlines(),
        parts=parts, facts=logs.get("facts"),
        kernels=load(work, "kernels.json"), peers=load(work, "peers.json"))
    replace(os.path.join(out, "gpu.json"), json.dumps(everything, indent=1))
    table = [f"== {name}\n{logs[name]}\n" for name in TABLE if name in logs]
    table += [f"{name} {state} {seconds} s\n" for name, state, seconds in states]
    replace(os.path.join(out, "gpu.txt"), "".join(table))
    replace(os.path.join(out, "gpu.log"),
            "".join(f"== {name}\n{log[-1 << 20:]}\n" for name, log in logs.items()))


if __name__ == "__main__":
    main()
