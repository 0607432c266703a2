"""The library's attention beside other implementations, on the same tensors in the same run.

    KVCACHE_LIB=libkvcache.so python3 peers.py [--seconds N] [--json FILE] [FILTER]
    KVCACHE_LIB=libkvcache.so python3 peers.py --dry
    KVCACHE_LIB=libkvcache.so FLASHINFER_READY=DIR python3 peers.py --compile BACKEND...

Ours is called through the C ABI with PyTorch's pointers and stream. Peers: PyTorch's
scaled_dot_product_attention on contiguous K and V, and FlashInfer where it can be imported, with
the best of its back ends for each shape (CUDA cores, fa2, fa3 and XQA). They are compiled when they
are first called, which takes minutes: `--compile` does it beside other work, and a back end that is
not ready by then is named as missing and not waited for. Calls are captured in a CUDA graph over as many sets of
buffers as exceed the level-2 cache, and timed by events. `--dry` needs neither a GPU nor PyTorch:
it checks this file's structs against the library.
"""

import argparse
import ctypes
import json
import math
import os
import sys
import time

BLOCK, DIM = 16, 128
F16, BF16 = 2, 3


class AttendDesc(ctypes.Structure):
    """kvc_attend_desc of include/kvcache.h."""

    _fields_ = (
        [(name, ctypes.c_uint32) for name in (
            "struct_size", "q_heads", "kv_heads", "k_dim", "v_dim", "v_in_k", "format", "q_dtype",
            "out_dtype", "block_tokens", "num_blocks", "seqs", "causal", "window")]
        + [("scale", ctypes.c_float), ("softcap", ctypes.c_float)]
        + [("threads", ctypes.c_uint32), ("reserved", ctypes.c_uint32)]
        + [("k", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in (
            "k_block_stride", "k_head_stride", "k_token_stride")]
        + [("v", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in (
            "v_block_stride", "v_head_stride", "v_token_stride")]
        + [("table", ctypes.c_void_p), ("table_stride", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("table_indptr", "q_indptr", "kv_lens", "q")]
        + [("q_token_stride", ctypes.c_int64), ("q_head_stride", ctypes.c_int64)]
        + [("out", ctypes.c_void_p)]
        + [("out_token_stride", ctypes.c_int64), ("out_head_stride", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("lse", "sinks", "alibi", "bad_block", "workspace")]
        + [("workspace_bytes", ctypes.c_uint64)]
    )


class AttendOptions(ctypes.Structure):
    """kvc_device_attend_options."""

    _fields_ = [(name, ctypes.c_uint32) for name in (
        "struct_size", "max_q_tokens", "max_kv_tokens", "piece_tokens", "total_q_tokens", "planned",
        "multiprocessors", "multiprocessor_shared_bytes")] + [("tail_mask", ctypes.c_void_p)]


class Library:
    def __init__(self):
        self.so = ctypes.CDLL(os.environ.get("KVCACHE_LIB", "libkvcache.so"))
        self.so.kvc_last_error.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
        for name in ("kvc_device_attend", "kvc_device_attend_workspace_size"):
            getattr(self.so, name).argtypes = [ctypes.c_void_p] * 4
        self.so.kvc_device_attend_kernel.argtypes = (
            [ctypes.c_void_p] * 3 + [ctypes.c_char_p, ctypes.c_uint64])
        self.so.kvc_device_open.argtypes = [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p]

    def call(self, name, *args):
        status = getattr(self.so, name)(*args)
        if status != 0:
            text = ctypes.create_string_buffer(256)
            self.so.kvc_last_error(text, 256)
            raise RuntimeError(f"{name}: {status} ({text.value.decode()})")

    def desc(self):
        desc = AttendDesc()
        self.so.kvc_attend_desc_init.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self.call("kvc_attend_desc_init", ctypes.byref(desc), ctypes.sizeof(desc))
        return desc

    def options(self):
        options = AttendOptions()
        self.so.kvc_device_attend_options_init.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self.call("kvc_device_attend_options_init", ctypes.byref(options),
                  ctypes.sizeof(options))
        return options

    def open(self):
        device = ctypes.c_void_p()
        self.call("kvc_device_open", 1, 0, ctypes.byref(device))
        return device

    def plan(self, device, desc, options):
        """Workspace bytes and kernel of a call."""
        needed, name = ctypes.c_uint64(), ctypes.create_string_buffer(64)
        args = (device, ctypes.byref(desc), ctypes.byref(options))
        self.call("kvc_device_attend_workspace_size", *args, ctypes.byref(needed))
        self.call("kvc_device_attend_kernel", *args, name, 64)
        return needed.value, name.value.decode()


def describe(library, shape):
    """Description and options of a shape, without pointers."""
    desc, options = library.desc(), library.options()
    desc.q_heads, desc.kv_heads = shape["q_heads"], shape["kv_heads"]
    desc.k_dim = desc.v_dim = DIM
    desc.format = desc.q_dtype = desc.out_dtype = BF16
    desc.block_tokens, desc.seqs = BLOCK, shape["batch"]
    desc.num_blocks = shape["batch"] * math.ceil(shape["context"] / BLOCK)
    options.max_q_tokens, options.max_kv_tokens = shape["tokens"], shape["context"]
    return desc, options


def grid():
    for q_heads, kv_heads in ((32, 8), (64, 8), (32, 32)):
        for batch in (1, 8, 64, 256):
            for context in (1024, 4096, 16384, 32768):
                yield dict(op="decode", q_heads=q_heads, kv_heads=kv_heads, batch=batch,
                           context=context, tokens=1)
    for context in (2048, 4096, 8192, 16384):
        yield dict(op="prefill", q_heads=32, kv_heads=8, batch=1, context=context, tokens=context)
    yield dict(op="prefill", q_heads=32, kv_heads=8, batch=1, context=16384, tokens=512)


def name_of(shape):
    return "{op} {q_heads}/{kv_heads} batch {batch} context {context} tokens {tokens}".format(
        **shape)


def dry():
    library = Library()
    for shape in grid():
        desc, options = describe(library, shape)
        options.multiprocessors = 132
        needed, kernel = library.plan(None, desc, options)
        wanted = "kvc_decode_bf16_d128" if shape["tokens"] == 1 else "kvc_prefill_bf16_d128"
        assert kernel == wanted, (shape, kernel)
        assert (needed == 0) == (shape["tokens"] > 8), (shape, needed)
    print("peers: the structs agree with the library")


class Peers:
    """One shape's tensors, and the calls on them."""

    def __init__(self, torch, library, device, shape):
        self.torch, self.library, self.device, self.shape = torch, library, device, shape
        s, cuda, bf16 = shape, "cuda", torch.bfloat16
        width = math.ceil(s["context"] / BLOCK)
        blocks, rows = s["batch"] * width, s["batch"] * s["tokens"]
        bytes_of_a_set = 2 * (2 * blocks * BLOCK * s["kv_heads"] * DIM + 2 * rows * s["q_heads"] * DIM)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.sets = max(1, min(64, math.ceil(2 * max(l2, 50 << 20) / bytes_of_a_set)))
        # Paged sets, and the same content contiguous for those that take no pages.
        free = torch.cuda.mem_get_info()[0]
        if self.sets * bytes_of_a_set * 2.2 > free:
            raise MemoryError("does not fit")
        generator = torch.Generator(device=cuda).manual_seed(1)
        draw = lambda *dims: torch.randn(*dims, device=cuda, dtype=bf16, generator=generator)
        cache = lambda: draw(blocks, s["kv_heads"], BLOCK, DIM)
        self.k, self.v = ([cache() for _ in range(self.sets)] for _ in range(2))
        self.q = [draw(rows, s["q_heads"], DIM) for _ in range(self.sets)]
        self.out = [torch.full_like(q, float("nan")) for q in self.q]
        order = torch.randperm(blocks, device=cuda, generator=generator)
        self.table = order.to(torch.int32).reshape(s["batch"], width).contiguous()
        ints = lambda values: torch.tensor(values, device=cuda, dtype=torch.int32)
        self.lens = ints([s["context"]] * s["batch"])
        self.q_indptr = ints([i * s["tokens"] for i in range(s["batch"] + 1)])
        self.desc, self.options = describe(library, shape)
        needed, self.kernel = library.plan(device, self.desc, self.options)
        self.workspace = torch.empty(max(needed, 256), device=cuda, dtype=torch.uint8)

    def ours(self, i):
        d = self.desc
        d.k, d.v = self.k[i].data_ptr(), self.v[i].data_ptr()
        d.q, d.out = self.q[i].data_ptr(), self.out[i].data_ptr()
        d.table, d.table_stride = self.table.data_ptr(), self.table.shape[1]
        d.kv_lens, d.q_indptr = self.lens.data_ptr(), self.q_indptr.data_ptr()
        d.workspace, d.workspace_bytes = self.workspace.data_ptr(), self.workspace.numel()
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        self.library.call("kvc_device_attend", self.device, ctypes.byref(d),
                          ctypes.byref(self.options), stream)

    def contiguous(self, cache):
        """`[batch][kv_heads][context][dim]` of a paged cache."""
        s = self.shape
        rows = cache[self.table.long()].transpose(1, 2)
        return rows.reshape(s["batch"], s["kv_heads"], -1, DIM)[:, :, : s["context"]].contiguous()

    def sdpa(self):
        """PyTorch on contiguous K and V: no pages to follow."""
        torch, s = self.torch, self.shape
        sets = [(self.contiguous(k), self.contiguous(v)) for k, v in zip(self.k, self.v)]
        queries = [q.reshape(s["batch"], s["tokens"], s["q_heads"], DIM).transpose(1, 2)
                   for q in self.q]
        attend = torch.nn.functional.scaled_dot_product_attention
        if s["tokens"] == 1:
            how = {}
        elif s["tokens"] == s["context"]:
            how = dict(is_causal=True)
        else:
            from torch.nn.attention.bias import causal_lower_right
            how = dict(attn_mask=causal_lower_right(s["tokens"], s["context"]))
        return lambda i: attend(queries[i], *sets[i], enable_gqa=True, **how)

    def flashinfer(self, **backend):
        """FlashInfer on the same pages."""
        import flashinfer

        torch, s = self.torch, self.shape
        workspace = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)
        width = self.table.shape[1]
        indptr = torch.arange(s["batch"] + 1, device="cuda", dtype=torch.int32) * width
        last = torch.full_like(self.lens, (s["context"] - 1) % BLOCK + 1)
        heads = (s["q_heads"], s["kv_heads"], DIM)
        types = dict(q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        if s["tokens"] == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", **backend)
            wrapper.plan(indptr, self.table.flatten(), last, *heads, BLOCK, **types)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", **backend)
            wrapper.plan(self.q_indptr, indptr, self.table.flatten(), last, *heads, BLOCK,
                         causal=True, **types)
        return lambda i: wrapper.run(self.q[i], (self.k[i], self.v[i]))

    def xqa(self):
        """FlashInfer's copy of TensorRT-LLM's decode kernel, on the same pages. Its own factor of
        the scores is 1 / sqrt(dim)."""
        import flashinfer

        torch, s = self.torch, self.shape
        rows = (s["batch"], 1, s["q_heads"], DIM)
        lens = self.lens.to(torch.uint32).reshape(s["batch"], 1)
        workspace = torch.zeros(256 << 20, device="cuda", dtype=torch.uint8)
        semaphores = torch.zeros(1 << 20, device="cuda", dtype=torch.uint32)
        outs = [torch.empty(rows, device="cuda", dtype=torch.bfloat16) for _ in self.q]

        def call(i):
            flashinfer.xqa(self.q[i].reshape(rows), self.k[i], self.v[i], self.table, lens,
                           outs[i], workspace, semaphores, s["kv_heads"], BLOCK, kv_layout="HND")
            return outs[i]

        return call

    def time(self, call):
        """Microseconds of a call, median of replays, and the last output."""
        torch = self.torch
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for i in range(min(3, self.sets)):
                call(i)
        torch.cuda.synchronize()
        calls = max(self.sets, 8)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            results = [call(i % self.sets) for i in range(calls)]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for replay in range(25):
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if replay >= 5:
                times.append(start.elapsed_time(end) * 1e3 / calls)
        del graph
        return sorted(times)[len(times) // 2], results[0]


def backends(shape):
    """FlashInfer's back ends for a shape: name -> how to make the call."""
    if shape["tokens"] > 1:
        return {f"prefill {b}": lambda peers, b=b: peers.flashinfer(backend=b)
                for b in ("fa2", "fa3")}
    tensor_cores = lambda b: lambda peers: peers.flashinfer(use_tensor_cores=True, backend=b)
    return {
        "cuda cores": lambda peers: peers.flashinfer(use_tensor_cores=False),
        "xqa": lambda peers: peers.xqa(),
        "fa2": tensor_cores("fa2"),
        "fa3": tensor_cores("fa3"),
    }


def compiled(name):
    """Whether a back end may be called without waiting for a compiler: `--compile` has left a file
    in $FLASHINFER_READY for it, or nobody asked for such files."""
    folder = os.environ.get("FLASHINFER_READY")
    return folder is None or os.path.exists(os.path.join(folder, name.replace(" ", "-")))


def compile_ahead(names):
    """Has FlashInfer compile back ends by a small call of each."""
    import torch
    import flashinfer  # noqa: F401

    library = Library()
    device = library.open()
    shapes = [dict(op=op, q_heads=q_heads, kv_heads=8, batch=1, context=64, tokens=tokens)
              for op, q_heads, tokens in (("decode", 32, 1), ("decode", 64, 1), ("decode", 8, 1),
                                          ("prefill", 32, 64))]
    # A kernel is made for a group of heads in some of them: a name is ready when all groups are.
    for name in names:
        begin = time.monotonic()
        try:
            for shape in shapes:
                if name in backends(shape):
                    peers = Peers(torch, library, device, shape)
                    backends(shape)[name](peers)(0)
                    torch.cuda.synchronize()
        except Exception as error:  # Said again, and reported, where it is timed.
            print(f"{name}: {str(error).splitlines()[0][:200]}", flush=True)
        open(os.path.join(os.environ["FLASHINFER_READY"], name.replace(" ", "-")), "w").close()
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)


def measure(torch, library, device, shape, has_flashinfer):
    peers = Peers(torch, library, device, shape)
    result = dict(name=name_of(shape), shape=shape, kernel=peers.kernel, us={})
    # The plan is made once a step in both: a layer's call has it.
    peers.ours(0)
    torch.cuda.synchronize()
    peers.options.planned = 1
    result["us"]["ours"], _ = peers.time(peers.ours)
    ours = peers.out[0].float()
    candidates = {"torch sdpa": peers.sdpa}
    if has_flashinfer:
        for name, make in backends(shape).items():
            if compiled(name):
                candidates[f"flashinfer {name}"] = lambda make=make: make(peers)
            else:
                result.setdefault("failed", {})[f"flashinfer {name}"] = "not compiled yet"
    for name, make in candidates.items():
        try:
            us, out = peers.time(make())
        except Exception as error:  # A peer that cannot do a shape is a line of the report.
            result.setdefault("failed", {})[name] = str(error).splitlines()[0][:200]
            continue
        result["us"][name] = us
        if name == "torch sdpa":
            out = out.transpose(1, 2)
        difference = (out.reshape(ours.shape).float() - ours).abs().max().item()
        result.setdefault("difference", {})[name] = difference
    others = {name: us for name, us in result["us"].items() if name != "ours"}
    flash = {name: us for name, us in others.items() if name.startswith("flashinfer")}
    best = min(flash or others, key=(flash or others).get, default=None)
    if best:
        result["best"], result["ratio"] = best, others[best] / result["us"]["ours"]
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--compile", nargs="+", metavar="BACKEND")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--json")
    parser.add_argument("filter", nargs="?", default="")
    args = parser.parse_args()
    if args.dry:
        return dry()
    if args.compile:
        return compile_ahead(args.compile)
    import torch

    try:
        import flashinfer

        version = getattr(flashinfer, "__version__", "?")
    except Exception as error:
        version = None
        print(f"skipped: flashinfer ({str(error).splitlines()[0]})")
    library = Library()
    device = library.open()
    begin, results, wrong = time.monotonic(), [], 0
    print(f"{'call':<58} {'ours us':>9} {'best us':>9} {'ratio':>6}  peer")
    for shape in grid():
        if args.filter not in name_of(shape):
            continue
        if time.monotonic() - begin > args.seconds:
            print("skipped: the rest, for time")
            break
        try:
            result = measure(torch, library, device, shape, version is not None)
        except MemoryError as error:
            print(f"{name_of(shape):<58} {error}")
            continue
        torch.cuda.empty_cache()
        results.append(result)
        best = result.get("best")
        print(f"{result['name']:<58} {result['us']['ours']:>9.2f} "
              f"{result['us'].get(best, math.nan):>9.2f} {result.get('ratio', math.nan):>6.2f}  {best}")
        for name, difference in result.get("difference", {}).items():
            # Outputs are means of values drawn from a normal distribution, rounded to bf16.
            if not difference <= 0.05:
                wrong += 1
                print(f"  WRONG: {difference} from {name}")
        for name, why in result.get("failed", {}).items():
            print(f"  failed: {name}: {why}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(torch=torch.__version__, flashinfer=version, lines=results), file,
                      indent=1)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
