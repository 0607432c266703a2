"""What a call costs from Python over the same call from C, in one process, in turns.

    python crossing.py INCLUDE_DIR

`refs` is the cheapest call of the library. A batched step is one new token for each of 32 sequences:
beginning and cancelling it are two calls. `append` and `attend` are its kernels on one head of 64
channels, the smallest that there are, with arrays that were looked at once (`Rows`), NumPy arrays and,
where it is installed, torch tensors. Prints medians of 101 rounds, and the difference of the fastest: on
a machine shared with others what the fastest round does not have is not the call's.
"""

import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import kvcache
from kvcache._native import ffi, lib

SEQS, ROUNDS, TURNS = 32, 101, 300


def compiled(include):
    out = Path(tempfile.mkdtemp()) / "crossing.so"
    source = Path(__file__).with_name("crossing.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", f"-I{include}", source, "-o", out], check=True)
    return ctypes.CDLL(str(out))


def address(x):
    return ctypes.c_void_p(int(ffi.cast("uintptr_t", x)))


def per_call(run):
    start = time.perf_counter_ns()
    for _ in range(TURNS):
        run()
    return (time.perf_counter_ns() - start) / TURNS


def main():
    c = compiled(sys.argv[1])
    pool = kvcache.Pool(64)
    block = pool.allocate(1)[0]
    group = kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64, format="f32")
    cache, step = kvcache.Cache(group, threads=1), kvcache.Step()
    batch = kvcache.Batch([cache.start([n]) for n in range(SEQS)])
    k, out = np.ones((SEQS, 1, 64), "f4"), np.zeros((SEQS, 1, 64), "f4")
    data, result = address(ffi.from_buffer(k)), address(ffi.from_buffer(out))
    handles = address(cache._handle), address(step._handle)

    def call(name, *functions):
        function = getattr(c, name)
        function.restype = ctypes.c_double
        pointers = [address(ffi.addressof(lib, f)) for f in functions]
        return lambda *arguments: function(*pointers, *arguments, ctypes.c_uint32(TURNS))

    refs, begin = call("refs", "kvc_pool_refs"), call("step", "kvc_step_begin", "kvc_step_cancel")
    append, attend = call("append", "kvc_step_append"), call("attend", "kvc_step_attend")
    work = (address(batch._work), ctypes.c_uint32(SEQS))

    def one_step():
        step.begin(cache, batch)
        step.cancel()

    cases = [
        ("pool.refs", lambda: refs(address(pool._handle), ctypes.c_int32(block)), lambda: pool.refs(block), False),
        ("step of 32: begin and cancel", lambda: begin(*handles, *work), one_step, False),
        ("step of 32: append, NumPy", lambda: append(*handles, data, data), lambda: step.append(0, 0, k, k), True),
        ("step of 32: attend, NumPy", lambda: attend(*handles, data, result), lambda: step.attend(0, 0, k, out), True),
    ]
    rk, ro = kvcache.Rows(k), kvcache.Rows(out)
    cases += [
        ("step of 32: append, Rows", cases[2][1], lambda: step.append(0, 0, rk, rk), True),
        ("step of 32: attend, Rows", cases[3][1], lambda: step.attend(0, 0, rk, ro), True),
    ]
    if torch := sys.modules.get("torch") or _torch():
        tk, to = torch.from_numpy(k), torch.from_numpy(out)
        cases += [
            ("step of 32: append, torch", cases[2][1], lambda: step.append(0, 0, tk, tk), True),
            ("step of 32: attend, torch", cases[3][1], lambda: step.attend(0, 0, tk, to), True),
        ]
    print(kvcache.build_info())
    print(f"{'call':32} {'C':>8} {'Python':>8} {'over C, fastest, ns':>22}")
    for name, in_c, in_python, opened in cases:
        if opened:
            step.begin(cache, batch)
        pairs = [(in_c(), per_call(in_python)) for _ in range(ROUNDS)]
        if opened:
            step.cancel()
        assert all(a > 0 for a, _ in pairs), name
        in_c, in_python = zip(*pairs)
        over = min(in_python) - min(in_c)
        print(f"{name:32} {statistics.median(in_c):8.0f} {statistics.median(in_python):8.0f} {over:22.0f}")
    code = "import time; t = time.perf_counter(); import kvcache; print(time.perf_counter() - t)"
    times = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(11)]
    print(f"import kvcache: {1000 * statistics.median(times):.0f} ms ({1000 * min(times):.0f} to {1000 * max(times):.0f})")


def _torch():
    try:
        import torch
    except ImportError:
        return None
    return torch


if __name__ == "__main__":
    main()
