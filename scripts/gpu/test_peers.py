"""Tests of what peers.py and report.py do without a GPU: structs as in the header, the shapes, the ratios and the table, a report
of a run that was cut short; with PyTorch (on the CPU) the paged and the contiguous tensors too."""

import ctypes
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import peers  # noqa: E402

try:
    import torch
except ImportError:
    torch = None
    print("skipped: the tensors of peers.py (no PyTorch)")


class Shapes(unittest.TestCase):
    def test_the_grid(self):
        shapes = list(peers.grid())
        names = [peers.name_of(shape) for shape in shapes]
        self.assertEqual(len(set(names)), len(names))
        count = lambda **want: sum(
            all(shape.get(key) == value for key, value in want.items()) for shape in shapes)
        for q_heads, kv_heads in ((32, 8), (64, 8), (32, 32)):
            self.assertEqual(count(op="decode", q_heads=q_heads, kv_heads=kv_heads, ragged=None), 16)
        self.assertEqual(count(ragged=True), 3)
        self.assertEqual(count(op="prefill"), 5)

    def test_ragged_lengths(self):
        shape = dict(batch=8, context=4096, ragged=True)
        lens = peers.lengths(shape)
        self.assertEqual((lens[0], lens[-1], len(lens)), (1024, 7168, 8))
        self.assertLess(abs(sum(lens) / 8 - 4096), 1)
        self.assertEqual(peers.lengths(dict(batch=2, context=5)), [5, 5])


class Structs(unittest.TestCase):
    """Structs grow, and this file's must grow with them."""

    types = {"uint32_t": ctypes.c_uint32, "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64,
             "float": ctypes.c_float}

    def test_the_fields_of_the_header(self):
        here = os.path.dirname(os.path.abspath(__file__))
        with open(os.path.join(here, "..", "..", "include", "kvcache.h")) as file:
            header = re.sub(r"/\*.*?\*/|//[^\n]*", "", file.read(), flags=re.S)
        for struct, name in ((peers.AttendDesc, "kvc_attend_desc"),
                             (peers.AttendOptions, "kvc_device_attend_options")):
            body = header[: header.index(f"}} {name};")].rsplit("{", 1)[1]
            fields = []
            for field in filter(None, map(str.strip, body.split(";"))):
                kind, called = re.fullmatch(r"(.*?)(\w+)", field).groups()
                fields.append((called, ctypes.c_void_p if "*" in kind else self.types[kind.strip()]))
            self.assertEqual(struct._fields_, fields, name)


class Ratios(unittest.TestCase):
    us = {"ours": 10.0, "torch sdpa": 30.0, "torch sdpa, one by one": 25.0,
          "flashinfer fa2": 12.0, "flashinfer cuda cores": 11.0}

    def test_the_best_of_each_family(self):
        best = peers.ratios(self.us)
        self.assertEqual(best["flashinfer"],
                         dict(name="flashinfer cuda cores", us=11.0, ratio=1.1))
        self.assertEqual(best["torch"]["ratio"], 2.5)

    def test_a_missing_family(self):
        self.assertEqual(list(peers.ratios({"ours": 1.0, "torch sdpa": 2.0})), ["torch"])

    def test_the_table(self):
        result = dict(name="decode", us=self.us, best=peers.ratios(self.us))
        self.assertEqual(peers.line(result).split(),
                         "decode 10.00 11.00 1.10 25.00 2.50 cuda cores".split())
        result["best"] = {}
        self.assertEqual(peers.line(result).split(), "decode 10.00 - - - - -".split())
        self.assertEqual(peers.HEADER.index("  FlashInfer's"), len(peers.line(result)) - 3)


class Report(unittest.TestCase):
    def test_a_run_that_was_cut_short(self):
        with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as out:
            def put(name, text):
                with open(os.path.join(work, name), "w") as file:
                    file.write(text)

            put("parts", "facts passed 1\nbench OUT-OF-TIME 180\n")
            put("facts.log", "a card\n")
            put("bench.log", "a line\n")
            put("kernels.json", '{"lines": [1]}')
            put("peers.json", '{"lines": [')
            put("VERSION", "commit 0\n")
            script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.py")
            subprocess.run([sys.executable, script, work, out, os.path.join(work, "VERSION")],
                           check=True)
            with open(os.path.join(out, "gpu.json")) as file:
                report = json.load(file)
            self.assertEqual(report["kernels"], {"lines": [1]})
            self.assertIsNone(report["peers"])
            self.assertEqual(report["parts"]["bench"], dict(state="OUT-OF-TIME", seconds=180))
            self.assertEqual(sorted(os.listdir(out)), ["gpu.json", "gpu.log", "gpu.txt"])


@unittest.skipIf(torch is None, "no PyTorch")
class OnTheCpu(unittest.TestCase):
    def attended(self, tensors, i):
        """Attention of every sequence over its pages, in f64."""
        s, rows = tensors.shape, []
        for b, length in enumerate(tensors.lengths):
            first, last = tensors.pages_indptr[b], tensors.pages_indptr[b + 1]
            pages = tensors.pages[first:last].long()
            used = math.ceil(length / peers.BLOCK)
            self.assertEqual(tensors.table[b, :used].tolist(), pages.tolist())
            self.assertTrue((tensors.table[b, used:] == -1).all())
            self.assertEqual((used - 1) * peers.BLOCK + tensors.last_page[b], length)
            of = lambda cache: cache[pages].transpose(0, 1).reshape(
                s["kv_heads"], -1, peers.DIM)[:, :length].double().repeat_interleave(
                    s["q_heads"] // s["kv_heads"], 0)
            k, v = of(tensors.k[i]), of(tensors.v[i])
            q = tensors.q[i].reshape(s["batch"], s["tokens"], s["q_heads"], -1)[b].double()
            scores = torch.einsum("thd,hkd->htk", q, k) / math.sqrt(peers.DIM)
            allowed = torch.ones(s["tokens"], length).tril(length - s["tokens"]).bool()
            weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
            rows.append(torch.einsum("htk,hkd->thd", weights, v))
        return torch.cat(rows)

    def test_contiguous_is_what_the_pages_hold(self):
        for shape in (dict(batch=3, context=40, tokens=1, ragged=True),
                      dict(batch=2, context=37, tokens=1),
                      dict(batch=1, context=48, tokens=48),
                      dict(batch=1, context=48, tokens=20)):
            tensors = peers.Tensors(torch, dict(shape, q_heads=4, kv_heads=2), 2, "cpu")
            for name, make in tensors.sdpa().items():
                call = make()
                for i in range(2):
                    out = tensors.rows_of_sdpa(call(i)).double()
                    difference = (out - self.attended(tensors, i)).abs().max().item()
                    self.assertLess(difference, 0.03, (name, shape))


if __name__ == "__main__":
    unittest.main()
