"""PyTorch's scaled_dot_product_attention as a peer of the bench `peers`.

Reads one JSON object a line on stdin and answers each with one line:

  {"op": "prefill", "dtype": "bf16", "tokens": 2048, "threads": 1, ...}  builds inputs, tries every
      form of the call and keeps the fastest; answers its name and a sample of the output
  {"op": "run"}  runs the kept form once; answers the seconds it took

The inputs are those that the bench makes: element i of a tensor is pattern[i % len(pattern)].
"""

import json
import sys
import time

import numpy
import torch
import torch.nn.functional as F

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PERIOD = 1048573


def pattern(seed):
    """SplitMix64 of seed + i, as numbers in -1..1."""
    with numpy.errstate(over="ignore"):
        x = numpy.arange(1, PERIOD + 1, dtype=numpy.uint64) + numpy.uint64(seed << 32)
        x *= numpy.uint64(0x9E3779B97F4A7C15)
        x ^= x >> numpy.uint64(30)
        x *= numpy.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> numpy.uint64(27)
    return ((x >> numpy.uint64(40)).astype(numpy.float32) / 2.0**23) - 1.0


def tensor(seed, dtype, *shape):
    values = torch.from_numpy(pattern(seed)).to(dtype)
    count = int(numpy.prod(shape))
    return values.repeat(-(-count // PERIOD))[:count].reshape(shape)


def prefill(case):
    """One sequence, causal. Forms: heads expanded in memory, expanded as a view, enable_gqa."""
    dtype, tokens = DTYPES[case["dtype"]], case["tokens"]
    heads, kv_heads, dim = case["q_heads"], case["kv_heads"], case["dim"]
    group = heads // kv_heads
    q = tensor(1, dtype, tokens, heads, dim).transpose(0, 1).unsqueeze(0).contiguous()
    k = tensor(2, dtype, 1, kv_heads, tokens, dim)
    v = tensor(3, dtype, 1, kv_heads, tokens, dim)
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    by_head = q.reshape(kv_heads, group, tokens, dim)
    view_k, view_v = (x[0].unsqueeze(1).expand(kv_heads, group, tokens, dim) for x in (k, v))
    sdpa = F.scaled_dot_product_attention
    forms = {
        "expanded": lambda: sdpa(q, wide_k, wide_v, is_causal=True),
        "view": lambda: sdpa(by_head, view_k, view_v, is_causal=True),
        "enable_gqa": lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True),
    }
    # Rows of [token][head], as the bench has them.
    rows = lambda out: out.reshape(heads, tokens, dim).transpose(0, 1)
    return forms, rows


def decode(case):
    """One query token a sequence. Forms: a group's heads as query tokens of their KV head,
    enable_gqa."""
    dtype, tokens, seqs = DTYPES[case["dtype"]], case["tokens"], case["seqs"]
    heads, kv_heads, dim = case["q_heads"], case["kv_heads"], case["dim"]
    rotations = case["rotations"]
    q = tensor(1, dtype, seqs, heads, dim)
    # The same values at every turn, each in memory of its own.
    k = tensor(2, dtype, 1, seqs, kv_heads, tokens, dim).repeat(rotations, 1, 1, 1, 1)
    v = tensor(3, dtype, 1, seqs, kv_heads, tokens, dim).repeat(rotations, 1, 1, 1, 1)
    grouped = q.reshape(seqs, kv_heads, heads // kv_heads, dim)
    single = q.reshape(seqs, heads, 1, dim)
    sdpa = F.scaled_dot_product_attention
    turn = [0]

    def next_turn():
        turn[0] = (turn[0] + 1) % rotations
        return turn[0]

    def by_group():
        at = next_turn()
        return sdpa(grouped, k[at], v[at])

    def by_flag():
        at = next_turn()
        return sdpa(single, k[at], v[at], enable_gqa=True)

    rows = lambda out: out.reshape(seqs, heads, dim)
    return {"grouped": by_group, "enable_gqa": by_flag}, rows


def seconds(call):
    start = time.perf_counter()
    out = call()
    return time.perf_counter() - start, out


def main():
    kept = None
    for line in sys.stdin:
        case = json.loads(line)
        if case["op"] == "run":
            answer = {"seconds": seconds(kept)[0]}
        elif case["op"] == "version":
            answer = {"version": torch.__version__}
        else:
            torch.set_num_threads(case["threads"])
            kept = None
            forms, rows = (prefill if case["op"] == "prefill" else decode)(case)
            times = {}
            for name, call in forms.items():
                # The last call of a form decides; a hopeless one is not run twice.
                times[name] = seconds(call)[0]
                if times[name] <= 3.0 * min(times.values()):
                    times[name] = seconds(call)[0]
            best = min(times, key=times.get)
            kept = forms[best]
            out = rows(kept()).float()
            sample = out.flatten()[:: case["sample_step"]]
            answer = {"form": best, "sample": sample.tolist(), "forms": times}
        print(json.dumps(answer), flush=True)


with torch.inference_mode():
    main()
