"""The library's attention beside other implementations, on the same tensors in the same run.

    KVCACHE_LIB=libkvcache.so python3 peers.py [--seconds N] [--json FILE] [FILTER]
    KVCACHE_LIB=libkvcache.so python3 peers.py --dry
    KVCACHE_LIB=libkvcache.so FLASHINFER_READY=DIR python3 peers.py --compile BACKEND...

Ours is called through the C ABI with PyTorch's pointers and stream. Peers: PyTorch's
scaled_dot_product_attention on contiguous K and V (of ragged lengths: padded under a mask, or one
call a sequence), and FlashInfer where it can be imported (CUDA cores, fa2, fa3 and XQA); the best of
each for a shape is what ours is compared with. FlashInfer's are compiled when they are first called,
which takes minutes: `--compile` does it beside other work, and a back end that is not ready by then
is named as missing and not waited for. Calls are captured in a CUDA graph over as many sets of
buffers as exceed the level-2 cache, and timed by events. FILE is written anew after each shape.
`--dry` needs neither a GPU nor PyTorch: it checks this file's structs against the library.
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
        + [(name, ctypes.c_void_p) for name in ("scales", "tiles")]
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
    lens = lengths(shape)
    desc.num_blocks = sum(math.ceil(length / BLOCK) for length in lens)
    options.max_q_tokens, options.max_kv_tokens = shape["tokens"], max(lens)
    return desc, options


def lengths(shape):
    """Cached tokens of each sequence. Ragged ones go from a quarter of the context to seven
    quarters, as in benches/cuda/attend.rs."""
    batch, context = shape["batch"], shape["context"]
    if not shape.get("ragged"):
        return [context] * batch
    return [context // 4 + s * (context * 3 // 2) // max(batch - 1, 1) for s in range(batch)]


def grid():
    """Shapes, in the order of what would be missed most where time runs out."""
    def decodes(q_heads, kv_heads):
        for batch in (1, 8, 64, 256):
            for context in (1024, 4096, 16384, 32768):
                yield dict(op="decode", q_heads=q_heads, kv_heads=kv_heads, batch=batch,
                           context=context, tokens=1)

    yield from decodes(32, 8)
    for batch, context in ((8, 4096), (64, 4096), (64, 16384)):
        yield dict(op="decode", q_heads=32, kv_heads=8, batch=batch, context=context, tokens=1,
                   ragged=True)
    for context in (2048, 4096, 8192, 16384):
        yield dict(op="prefill", q_heads=32, kv_heads=8, batch=1, context=context, tokens=context)
    yield dict(op="prefill", q_heads=32, kv_heads=8, batch=1, context=16384, tokens=512)
    yield from decodes(64, 8)
    yield from decodes(32, 32)


def name_of(shape):
    name = "{op} {q_heads}/{kv_heads} batch {batch} context {context} tokens {tokens}"
    return name.format(**shape) + (" ragged" if shape.get("ragged") else "")


def ratios(us):
    """The fastest peer of each family: name, microseconds, and how many times ours it takes."""
    found = {}
    for family in ("flashinfer", "torch"):
        names = [name for name in us if name.split()[0] == family]
        if names:
            name = min(names, key=us.get)
            found[family] = dict(name=name, us=us[name], ratio=us[name] / us["ours"])
    return found


HEADER = (f"{'call':<56} {'ours us':>9} {'FlashInfer':>10} {'ratio':>6} {'torch us':>9} {'ratio':>6}"
          "  FlashInfer's back end")


def line(result):
    """A line of the table; a dash where a peer has no figure."""
    text = f"{result['name']:<56} {result['us']['ours']:>9.2f}"
    for family, width in (("flashinfer", 10), ("torch", 9)):
        best = result["best"].get(family)
        text += (f" {best['us']:>{width}.2f} {best['ratio']:>6.2f}" if best
                 else f" {'-':>{width}} {'-':>6}")
    best = result["best"].get("flashinfer")
    return text + (f"  {best['name'].split(maxsplit=1)[1]}" if best else "  -")


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


def round_up(length):
    return math.ceil(length / BLOCK)


class Tensors:
    """One shape's tensors on a device, `sets` times: pages and queries with random content, the
    tables of all sets, and PyTorch's own attention on them."""

    def __init__(self, torch, shape, sets, device):
        self.torch, self.shape, self.sets = torch, shape, sets
        self.lengths = lengths(shape)
        used = [round_up(length) for length in self.lengths]
        blocks, width = sum(used), max(used)
        generator = torch.Generator(device=device).manual_seed(1)
        draw = lambda *dims: torch.randn(*dims, device=device, dtype=torch.bfloat16,
                                         generator=generator)
        cache = lambda: draw(blocks, shape["kv_heads"], BLOCK, DIM)
        rows = shape["batch"] * shape["tokens"]
        self.k, self.v = ([cache() for _ in range(sets)] for _ in range(2))
        self.q = [draw(rows, shape["q_heads"], DIM) for _ in range(sets)]
        self.out = [torch.full_like(q, float("nan")) for q in self.q]
        ints = lambda values: torch.tensor(values, device=device, dtype=torch.int32)
        # Sequence after sequence, as FlashInfer takes them; in rows of a table, as ours does.
        self.pages = torch.randperm(blocks, device=device, generator=generator).to(torch.int32)
        self.pages_indptr = ints([sum(used[:s]) for s in range(shape["batch"] + 1)])
        self.table = torch.full((shape["batch"], width), -1, device=device, dtype=torch.int32)
        first = 0
        for s, count in enumerate(used):
            self.table[s, :count] = self.pages[first : first + count]
            first += count
        self.lens = ints(self.lengths)
        self.last_page = ints([(length - 1) % BLOCK + 1 for length in self.lengths])
        self.q_indptr = ints([i * shape["tokens"] for i in range(shape["batch"] + 1)])

    def contiguous(self, cache):
        """`[batch][kv_heads][longest][dim]` of a paged cache; what is past a length is any of it."""
        s = self.shape
        rows = cache[self.table.clamp(min=0).long()].transpose(1, 2)
        rows = rows.reshape(s["batch"], s["kv_heads"], -1, DIM)
        return rows[:, :, : max(self.lengths)].contiguous()

    def sdpa_of(self, each):
        """PyTorch on contiguous K and V, which have no pages to follow: all sequences padded to
        the longest, or each by itself."""
        torch, s = self.torch, self.shape
        sets = [(self.contiguous(k), self.contiguous(v)) for k, v in zip(self.k, self.v)]
        queries = [q.reshape(s["batch"], s["tokens"], s["q_heads"], DIM).transpose(1, 2)
                   for q in self.q]
        attend = torch.nn.functional.scaled_dot_product_attention
        if each:
            parts = [[(queries[i][b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
                      for b, length in enumerate(self.lengths)] for i, (k, v) in enumerate(sets)]
            return lambda i: [attend(q, k, v, enable_gqa=True) for q, k, v in parts[i]]
        if s.get("ragged"):
            past = torch.arange(max(self.lengths), device=self.lens.device)
            how = dict(attn_mask=(past < self.lens[:, None])[:, None, None, :])
        elif s["tokens"] == 1:
            how = {}
        elif s["tokens"] == s["context"]:
            how = dict(is_causal=True)
        else:
            from torch.nn.attention.bias import causal_lower_right
            how = dict(attn_mask=causal_lower_right(s["tokens"], s["context"]))
        return lambda i: attend(queries[i], *sets[i], enable_gqa=True, **how)

    def sdpa(self):
        """PyTorch's ways of a shape: name -> how to make the call."""
        ways = {"torch sdpa": lambda: self.sdpa_of(each=False)}
        if self.shape.get("ragged"):
            ways["torch sdpa, one by one"] = lambda: self.sdpa_of(each=True)
        return ways

    def rows_of_sdpa(self, out):
        """`[rows][q_heads][dim]` of what a call of `sdpa` gave."""
        out = self.torch.cat(out) if isinstance(out, list) else out
        return out.transpose(1, 2).reshape(self.q[0].shape)


class Peers(Tensors):
    """One shape's tensors on the GPU, and the calls of the library and FlashInfer on them."""

    def __init__(self, torch, library, device, shape):
        lens = lengths(shape)
        blocks, width = sum(map(round_up, lens)), max(map(round_up, lens))
        of_a_block = 2 * 2 * BLOCK * shape["kv_heads"] * DIM
        queries = 2 * 2 * shape["batch"] * shape["tokens"] * shape["q_heads"] * DIM
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        sets = max(1, min(64, math.ceil(2 * max(l2, 50 << 20) / (blocks * of_a_block + queries))))
        # Paged sets, and the same content contiguous for those that take no pages.
        needed = sets * ((blocks + shape["batch"] * width) * of_a_block + 2 * queries)
        if 1.1 * needed > torch.cuda.mem_get_info()[0]:
            raise MemoryError("does not fit")
        super().__init__(torch, shape, sets, "cuda")
        self.library, self.device = library, device
        self.desc, self.options = describe(library, shape)
        needed, self.kernel = library.plan(device, self.desc, self.options)
        self.workspace = torch.empty(max(needed, 256), device="cuda", dtype=torch.uint8)

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

    def flashinfer(self, **backend):
        """FlashInfer on the same pages."""
        import flashinfer

        torch, s = self.torch, self.shape
        workspace = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)
        pages = (self.pages_indptr, self.pages, self.last_page)
        heads = (s["q_heads"], s["kv_heads"], DIM)
        types = dict(q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        if s["tokens"] == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", **backend)
            wrapper.plan(*pages, *heads, BLOCK, **types)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", **backend)
            wrapper.plan(self.q_indptr, *pages, *heads, BLOCK, causal=True, **types)
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
    candidates = peers.sdpa()
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
        if name.startswith("torch"):
            out = peers.rows_of_sdpa(out)
        difference = (out.reshape(ours.shape).float() - ours).abs().max().item()
        result.setdefault("difference", {})[name] = difference
    result["best"] = ratios(result["us"])
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
    print(HEADER)
    for shape in grid():
        if args.filter not in name_of(shape):
            continue
        if time.monotonic() - begin > args.seconds:
            print("skipped: the rest, for time")
            break
        try:
            result = measure(torch, library, device, shape, version is not None)
        except MemoryError as error:
            print(f"{name_of(shape):<56} {error}")
            continue
        except Exception as error:  # Ours failed: that is wrong, and the other shapes are to be seen.
            wrong += 1
            print(f"  WRONG: {name_of(shape)}: {str(error).splitlines()[0][:200]}")
            continue
        torch.cuda.empty_cache()
        results.append(result)
        print(line(result))
        for name, difference in result.get("difference", {}).items():
            # Outputs are means of values drawn from a normal distribution, rounded to bf16.
            if not difference <= 0.05:
                wrong += 1
                print(f"  WRONG: {difference} from {name}")
        for name, why in result.get("failed", {}).items():
            print(f"  failed: {name}: {why}")
        if args.json:
            with open(args.json + ".part", "w") as file:
                json.dump(dict(torch=torch.__version__, flashinfer=version, lines=results), file,
                          indent=1)
            os.replace(args.json + ".part", args.json)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
