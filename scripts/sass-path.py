#!/usr/bin/env python3
"""Counts the instructions that a decode kernel issues for a tile, from its disassembly.

usage: cuobjdump -sass KERNELS.cubin | scripts/sass-path.py KERNEL...

The tile loop is the smallest loop around matrix products and a bulk copy. Of it the way is taken that
passes what every tile needs (the wait for its copy, its products and, where a warp starts its own
copies, such a copy) with as few instructions as can be: what is rare, masks and errors, lies beside
that way. Of a kernel with an instance for 64 tokens and one for 128, whose products lie in a loop of
their own, the first is counted.

Pipes as on sm_90: `alu` (logic, shifts, bytes, compares, half rate), `imad` (half rate), `fma`, `mma`,
`lsu` (shared memory and exchanges), `xu` (exp2), `other`. `least` is the sum of the stalls that the
compiler wrote: cycles that a warp takes at least when it is alone and never waits.
"""
import heapq
import re
import sys

PIPES = [
    ("mma", "HMMA"),
    ("lsu", "LDS STS LDSM SHFL MOVM"),
    ("xu", "MUFU REDUX POPC I2F F2I"),
    ("imad", "IMAD"),
    ("fma", "HFMA2 HMUL2 HADD2 FFMA FMUL FADD"),
    ("alu", "F2FP HMNMX2 VHMNMX FSEL FMNMX FSETP LOP3 SHF PRMT IADD3 LEA ISETP SEL VOTE MOV IMNMX VIMNMX "
            "VIADD PLOP3 R2P R2UR"),
]
PIPE_OF = {name: pipe for pipe, names in PIPES for name in names.split()}


def pipe_of(text):
    name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]
    return PIPE_OF.get(name, "other")


def read_kernels(lines):
    """Of each kernel (address, text, cycles that the next instruction waits)."""
    kernels, current = {}, None
    for line in lines:
        if match := re.search(r"Function : (\S+)", line):
            current = kernels.setdefault(match[1], [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            current.append([int(match[1], 16), match[2].strip(), 0])
        elif (match := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)) and current:
            current[-1][2] = int(match[1], 16) >> 41 & 15
    return kernels


def is_branch(text):
    return re.search(r"\b(BRA|EXIT|CALL|RET|BRX)\b", text) is not None


def target(text):
    match = re.search(r"0x([0-9a-f]+)$", text) if is_branch(text) else None
    return int(match[1], 16) if match else None


def tile_loop(code):
    best = None
    for address, text, _ in code:
        first = target(text)
        if first is None or first >= address:
            continue
        body = [t for a, t, _ in code if first <= a <= address]
        whole = sum("HMMA" in t for t in body) >= 30 and any("UBLKCP" in t for t in body)
        if whole and (best is None or address - first < best[1] - best[0]):
            best = (first, address)
    return best


def blocks_of(code, first, last):
    """Basic blocks by their addresses, and which follow each."""
    starts = {first}
    for i, (address, text, _) in enumerate(code[:-1]):
        if first <= address <= last and is_branch(text):
            starts.update(s for s in (code[i + 1][0], target(text)) if s is not None)
    blocks, at = {}, first
    for instruction in code:
        if first <= instruction[0] <= last:
            at = instruction[0] if instruction[0] in starts else at
            blocks.setdefault(at, []).append(instruction)
    follow, order = {}, sorted(blocks)
    for at, behind in zip(order, order[1:] + [None]):
        text = blocks[at][-1][1]
        always = re.match(r"(BRA|EXIT|RET|BRX) 0x|EXIT|RET", text) is not None
        to = [target(text), None if always else behind]
        follow[at] = [t for t in to if t in blocks and ("CALL" not in text or t == behind)]
    return blocks, follow


def shortest(blocks, follow, begin, end):
    queue, cost, before, done = [(0, begin)], {begin: 0}, {}, set()
    while queue:
        so_far, at = heapq.heappop(queue)
        if at == end:
            break
        if at in done:
            continue
        done.add(at)
        for to in follow[at]:
            if so_far + len(blocks[to]) < cost.get(to, 1 << 30):
                cost[to], before[to] = so_far + len(blocks[to]), at
                heapq.heappush(queue, (cost[to], to))
    way = [end]
    while way[-1] != begin:
        way.append(before[way[-1]])
    return way[-2::-1]


def path(code):
    first, last = tile_loop(code)
    blocks, follow = blocks_of(code, first, last)

    def with_text(text):
        return [at for at in sorted(blocks) if any(text in t for _, t, _ in blocks[at])]

    def products(places):
        return sum("HMMA" in t for at in places for _, t, _ in blocks[at])

    needed = with_text("HMMA")
    for at in sorted(blocks):
        begin, end = target(blocks[at][-1][1]), blocks[at][-1][0]
        if begin is None or not first < begin < end:
            continue
        for beside in ([n for n in needed if n > end], [n for n in needed if n < begin]):
            if products(beside) >= 60:
                needed = beside
    # Where warps take turns to start copies, what a turn costs is not on the way.
    own_copies = len(with_text("PHASECHK")) == 1
    needed += with_text("UBLKCP") if own_copies else []
    needed += with_text("PHASECHK")[-1:] + [at for at in blocks if blocks[at][-1][0] == last]
    way = [first]
    for at in sorted(set(needed) - {first}):
        way += shortest(blocks, follow, way[-1], at)
    return [i for at in way for i in blocks[at]]


def main():
    kernels = read_kernels(sys.stdin)
    columns = ["alu", "imad", "fma", "mma", "lsu", "xu", "other"]
    print(f"{'kernel':<28}{'all':>6}" + "".join(f"{c:>6}" for c in columns) + f"{'least':>7}")
    for name in sys.argv[1:] or sorted(kernels):
        way = path(kernels[name])
        counts = [sum(pipe_of(t) == c for _, t, _ in way) for c in columns]
        least = sum(max(1, stall) for _, _, stall in way)
        print(f"{name:<28}{len(way):>6}" + "".join(f"{c:>6}" for c in counts) + f"{least:>7}")


if __name__ == "__main__":
    main()
