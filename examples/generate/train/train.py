#!/usr/bin/env python3
"""Trains the small language model that `examples/generate` serves.

One run does everything: corpus -> tokenizer -> training -> export -> evaluation.

    python train.py --python-docs /usr/share/doc/python3/html

It needs `torch` and `numpy`, a Rust toolchain with its documentation component
(`rustup component add rust-docs`) and, optionally, a copy of Python's HTML
documentation (the run that produced `../model` used it). The schedule is
counted in steps, every batch is a function of (seed, step), and a run that was
interrupted continues from the last checkpoint in `--work`.
"""

import argparse
import hashlib
import html
import json
import math
import re
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent

# --------------------------------------------------------------------------
# Corpus: prose from HTML documentation
# --------------------------------------------------------------------------

# The embedded book is left out because its prose is CC-BY-SA, unlike the rest
# (MIT OR Apache-2.0); `core` and `alloc` because `std` re-exports their pages.
RUST_BOOKS = [
    "book", "cargo", "clippy", "edition-guide", "error_codes", "nomicon", "reference",
    "rust-by-example", "rustc", "rustdoc", "style-guide", "unstable-book",
]
RUST_CRATES = ["std", "proc_macro", "test"]
PYTHON_PARTS = [
    "tutorial", "library", "reference", "howto", "faq", "using", "whatsnew", "c-api",
    "extending", "install", "installing", "distributing", "distutils",
]
# print.html repeats a whole book, changelogs are lists of issue numbers,
# std::arch is tables of machine instructions, and some books are translated.
SKIP = re.compile(r"/(print|toc|changelog|CHANGELOG)\.html$|/arch/|:rust-by-example/(es|ja|ko|zh)/")

# A block is a leaf: it ends at the next block-level tag, so `<li><p>..</p></li>`
# yields one item and not two.
BLOCK = re.compile(
    r"<(p|li|h[1-3]|pre)(?:\s(?!class=\"toctree)[^>]*)?>(.*?)(?=</?(?:p|li|ul|ol|h[1-6]|pre|div|table|dl|dd|dt|details|section|main)\b)",
    re.S,
)
TAG = re.compile(r"<[^>]*>")
ASCII = str.maketrans({
    "‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " ",
    "¶": "", "§": "", "\u200b": "", "→": "->", "×": "x", "≤": "<=", "≥": ">=",
})
# Integer types and numbers differ between otherwise identical paragraphs.
SAME = re.compile(r"\b[iuf](?:8|16|32|64|128|size)\b|\d+|[^a-z#]+")


def digest(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def main_part(page, kind):
    """The page without its navigation."""
    start, end = {
        "rustdoc": ('<section id="main-content"', "</main>"),
        "mdbook": ("<main>", "</main>"),
        "sphinx": ('<div class="body" role="main">', '<div class="sphinxsidebar"'),
    }[kind]
    at = page.find(start)
    if at < 0:
        return ""
    stop = page.find(end, at)
    return page[at + len(start) : stop if stop > 0 else len(page)]


def document(page, kind, seen):
    """The prose of one page, or None if little is left of it."""
    out, heading = [], None
    for tag, body in BLOCK.findall(main_part(page, kind)):
        text = html.unescape(TAG.sub("", body)).translate(ASCII)
        if tag == "pre":
            # A little code only: one short listing in eight.
            text = text.strip("\n").rstrip()
            short = 20 < len(text) < 400 and text.isascii() and max(map(len, text.split("\n"))) < 90
            if not out or not short or digest(text) % 8 or digest(text) in seen:
                continue
            seen.add(digest(text))
            out.append(("pre", "\n".join(("    " + line).rstrip() for line in text.split("\n"))))
            continue
        text = " ".join(text.split()).removesuffix("Read more").strip()
        if tag[0] == "h":
            # Rustdoc's headings are item names and "Examples".
            heading = text if kind != "rustdoc" and text.isascii() and 3 < len(text) < 90 else None
            continue
        words = text.split()
        letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
        foreign = sum(not c.isascii() for c in text)
        if len(words) < 5 or letters < 0.84 * len(text) or foreign > 2:
            continue
        key = digest(SAME.sub("#", text.lower()))
        if key in seen:
            continue
        seen.add(key)
        if heading:
            out.append(("h", "# " + heading))
            heading = None
        out.append(("li", "- " + text) if tag == "li" else ("p", text))
    if sum(len(t) for _, t in out) < 200:
        return None
    text = out[0][1]
    for (before, _), (tag, block) in zip(out, out[1:]):
        text += ("\n" if before == tag == "li" else "\n\n") + block
    return text


def build_corpus(rust_docs, python_docs):
    """A list of (name, text), in a fixed order."""
    sources = [(rust_docs, d, "mdbook") for d in RUST_BOOKS]
    sources += [(rust_docs, d, "rustdoc") for d in RUST_CRATES]
    if python_docs:
        sources += [(python_docs, d, "sphinx") for d in PYTHON_PARTS]
    seen, documents = set(), []
    for root, part, kind in sources:
        size = 0
        for path in sorted((root / part).rglob("*.html")):
            name = f"{kind}:{path.relative_to(root).as_posix()}"
            if SKIP.search(name):
                continue
            text = document(path.read_text("utf-8", "replace"), kind, seen)
            if text:
                documents.append((name, text))
                size += len(text)
        print(f"  {part}: {size} bytes", flush=True)
    return documents


# --------------------------------------------------------------------------
# Tokenizer: byte-level BPE
# --------------------------------------------------------------------------

END = 256  # <|end|>
FIRST_MERGE = 257

# Pieces, in order of preference at each position:
#   1. an optional single space, then a maximal run of ASCII letters;
#   2. an optional single space, then a maximal run of bytes that are neither
#      ASCII letters nor whitespace;
#   3. a maximal run of whitespace (space, \t, \n, \r), without its last byte if
#      that is a space, the run is longer than one byte, and text follows: that
#      space then belongs to the next piece.
PIECE = re.compile(
    rb" ?[A-Za-z]+| ?[^A-Za-z \t\n\r]+|[ \t\n\r]+(?= [^ \t\n\r])|[ \t\n\r]+"
)


def pieces(text):
    return PIECE.findall(text.encode() if isinstance(text, str) else text)


def train_bpe(texts, vocab):
    """Merges in rank order; ties go to the smallest pair."""
    counts = Counter()
    for text in texts:
        counts.update(pieces(text))
    words = [(list(word), count) for word, count in counts.items()]
    pairs, where = Counter(), defaultdict(set)
    for index, (ids, count) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += count
            where[pair].add(index)
    merges = []
    while FIRST_MERGE + len(merges) < vocab:
        best = max(pairs, key=lambda p: (pairs[p], -p[0], -p[1]))
        new = FIRST_MERGE + len(merges)
        merges.append(best)
        for index in where.pop(best):
            ids, count = words[index]
            for pair in zip(ids, ids[1:]):
                pairs[pair] -= count
            ids[:] = merge(ids, best, new)
            for pair in zip(ids, ids[1:]):
                pairs[pair] += count
                where[pair].add(index)
        del pairs[best]
    return merges


def merge(ids, pair, new):
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


class Tokenizer:
    def __init__(self, merges):
        self.merges = merges
        self.rank = {pair: FIRST_MERGE + k for k, pair in enumerate(merges)}
        self.bytes = [bytes([b]) for b in range(256)] + [b"<|end|>"]
        for left, right in merges:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self.cache = {}

    def encode(self, text):
        out = []
        for piece in pieces(text):
            ids = self.cache.get(piece)
            if ids is None:
                ids = list(piece)
                while len(ids) > 1:
                    best = min(zip(ids, ids[1:]), key=lambda p: self.rank.get(p, math.inf))
                    if best not in self.rank:
                        break
                    ids = merge(ids, best, self.rank[best])
                self.cache[piece] = ids
            out += ids
        return out

    def decode(self, ids):
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")

    def save(self, path):
        path.write_text("".join(f"{a} {b}\n" for a, b in self.merges))

    @classmethod
    def load(cls, path):
        return cls([tuple(map(int, line.split())) for line in path.read_text().splitlines()])


# --------------------------------------------------------------------------
# Model: Llama with tied embeddings, in Hugging Face's names and conventions
# --------------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": END,
    "eos_token_id": END,
    "torch_dtype": "float16",
}


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, CONFIG["rms_norm_eps"])


def rotary(length):
    half = CONFIG["head_dim"] // 2
    freq = CONFIG["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * freq
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)  # pairs (i, i + head_dim / 2)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        c, d = CONFIG, CONFIG["head_dim"]
        self.q_proj = nn.Linear(c["hidden_size"], c["num_attention_heads"] * d, bias=False)
        self.k_proj = nn.Linear(c["hidden_size"], c["num_key_value_heads"] * d, bias=False)
        self.v_proj = nn.Linear(c["hidden_size"], c["num_key_value_heads"] * d, bias=False)
        self.o_proj = nn.Linear(c["num_attention_heads"] * d, c["hidden_size"], bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        heads = lambda y: y.view(batch, length, -1, CONFIG["head_dim"]).transpose(1, 2)
        q = rotate(heads(self.q_proj(x)), cos, sin)
        k = rotate(heads(self.k_proj(x)), cos, sin)
        v = heads(self.v_proj(x))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        d, h = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(d, h, bias=False)
        self.up_proj = nn.Linear(d, h, bias=False)
        self.down_proj = nn.Linear(h, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = RMSNorm(CONFIG["hidden_size"])
        self.self_attn = Attention()
        self.post_attention_layernorm = RMSNorm(CONFIG["hidden_size"])
        self.mlp = MLP()

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"]),
            "layers": nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"])),
            "norm": RMSNorm(CONFIG["hidden_size"]),
        })
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Smaller at the ends of the residual branches, so that the
                # stream starts at the same scale whatever the depth.
                ends = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * CONFIG["num_hidden_layers"]) if ends else 1))

    def forward(self, ids):
        x = self.model["embed_tokens"](ids)
        cos, sin = rotary(ids.shape[1])
        for layer in self.model["layers"]:
            x = layer(x, cos, sin)
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)


class Muon:
    """Momentum orthogonalised by Newton-Schulz, for the 2-D matrices of the
    layers. Matrices of one shape are processed as one batch."""

    def __init__(self, params, momentum=0.95, decay=0.02):
        self.groups = defaultdict(list)
        for p in params:
            self.groups[tuple(p.shape)].append(p)
        self.buffers = {s: torch.zeros(len(g), *s) for s, g in self.groups.items()}
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, lr):
        for shape, group in self.groups.items():
            grad = torch.stack([p.grad for p in group])
            buffer = self.buffers[shape]
            buffer.lerp_(grad, 1 - self.momentum)
            x = grad.lerp(buffer, self.momentum).bfloat16()
            tall = shape[0] > shape[1]
            if tall:
                x = x.mT
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            if tall:
                x = x.mT
            scale = lr * math.sqrt(max(1, shape[0] / shape[1]))
            for p, update in zip(group, x):
                p.mul_(1 - lr * self.decay).add_(update.float(), alpha=-scale)


# --------------------------------------------------------------------------
# Export and evaluation
# --------------------------------------------------------------------------


def save_safetensors(tensors, path):
    header, blob = {}, b""
    for name in sorted(tensors):
        data = tensors[name].detach().to(torch.float16).contiguous().numpy().tobytes()
        header[name] = {
            "dtype": "F16",
            "shape": list(tensors[name].shape),
            "data_offsets": [len(blob), len(blob) + len(data)],
        }
        blob += data
    text = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Replaced in one move: a reader never sees half a file.
    partial = path.with_suffix(".partial")
    partial.write_bytes(len(text).to_bytes(8, "little") + text + blob)
    partial.rename(path)


def load_safetensors(path):
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        a, b = entry["data_offsets"]
        array = np.frombuffer(raw[8 + size + a : 8 + size + b], dtype=np.float16)
        out[name] = torch.from_numpy(array.astype(np.float32)).view(entry["shape"])
    return out


@torch.no_grad()
def bits_per_byte(model, stream, size, context, limit=None):
    """Mean over `stream` in consecutive windows: a token is predicted from at
    most `context` tokens, and from fewer at the start of its window. The end
    markers cost bits but are not counted as bytes."""
    nats = tokens = 0
    starts = range(0, len(stream) - 1, context)
    for start in starts[:limit]:
        ids = torch.from_numpy(stream[start : start + context + 1].astype(np.int64))[None]
        logits = model(ids[:, :-1]).float()
        nats += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return nats / tokens * (len(stream) - 1) / size / math.log(2), nats / tokens


@torch.no_grad()
def greedy(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == END:
            break
    return ids


# --------------------------------------------------------------------------


def prepare(args):
    """Tokenizer and token streams, kept in the work folder between runs."""
    cached = args.work / "streams.npz"
    if not cached.exists():
        print("corpus", flush=True)
        documents = build_corpus(args.rust_docs, args.python_docs)
        held = [d for d in documents if digest(d[0]) % 100 < args.held_out]
        kept = [d for d in documents if digest(d[0]) % 100 >= args.held_out]
        # By hash: neighbours in the stream then come from unrelated pages.
        held.sort(key=lambda d: digest("order" + d[0]))
        kept.sort(key=lambda d: digest("order" + d[0]))
        print(f"documents: {len(kept)} for training, {len(held)} held out", flush=True)
        tokenizer = Tokenizer(train_bpe([t for _, t in kept], CONFIG["vocab_size"]))
        tokenizer.save(args.out / "tokenizer.txt")
        sample = ""
        for _, text in held:
            if len(sample.encode()) + len(text.encode()) < args.sample_bytes:
                sample += text + "\n<|end|>\n"
        (args.out / "heldout.txt").write_text(sample)
        encode = lambda ds: np.array([END] + [i for _, t in ds for i in tokenizer.encode(t) + [END]], np.uint16)
        size = lambda ds: sum(len(t.encode()) for _, t in ds)
        np.savez(cached, train=encode(kept), held=encode(held), bytes=[size(kept), size(held)])
    data = np.load(cached)
    return Tokenizer.load(args.out / "tokenizer.txt"), data["train"], data["held"], data["bytes"]


def schedule(step, args):
    """Warm-up, then flat, then linear to zero."""
    flat = args.steps * args.flat
    return min((step + 1) / args.warmup, 1.0, max(0.0, (args.steps - step) / (args.steps - flat)))


def train(args, model, stream, held, held_bytes):
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    step, spent = 0, 0.0
    saved = args.work / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.buffers = state["muon"]
        step, spent = state["step"], state["spent"]
        print(f"continuing at step {step}", flush=True)
    began = time.monotonic() - spent
    while step < args.steps:
        at = np.random.default_rng([args.seed, step]).integers(0, len(stream) - args.context, args.batch)
        ids = torch.from_numpy(np.stack([stream[a : a + args.context + 1] for a in at]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        scale = schedule(step, args)
        muon.step(args.muon_lr * scale)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * scale
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0 or step <= 3:
            print(f"step {step} loss {loss.item():.4f} lr {scale:.3f} {time.monotonic() - began:.0f} s", flush=True)
        if step % args.every == 0 or step == args.steps:
            state = {
                "model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.buffers,
                "step": step, "spent": time.monotonic() - began,
            }
            torch.save(state, saved.with_suffix(".partial"))
            saved.with_suffix(".partial").rename(saved)
        if step % (3 * args.every) == 0:
            save_safetensors(model.state_dict(), args.out / "model.safetensors")
            bits, _ = bits_per_byte(model, held, held_bytes, args.context, limit=16)
            print(f"step {step} held out (first 16 windows) {bits:.4f} bits per byte", flush=True)
    save_safetensors(model.state_dict(), args.out / "model.safetensors")
    print(f"trained {step} steps, {step * args.batch * args.context} tokens, {time.monotonic() - began:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rust-docs", type=Path, help="default: the toolchain's, from `rustc --print sysroot`")
    parser.add_argument("--python-docs", type=Path, help="Python's HTML documentation")
    parser.add_argument("--out", type=Path, default=HERE.parent / "model")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="streams and checkpoint")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=30, help="steps")
    parser.add_argument("--flat", type=float, default=0.6, help="share of the steps before the decay")
    parser.add_argument("--held-out", type=int, default=3, help="per cent of the documents")
    parser.add_argument("--sample-bytes", type=int, default=190_000, help="size of heldout.txt")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.rust_docs is None:
        sysroot = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True, check=True)
        args.rust_docs = Path(sysroot.stdout.strip()) / "share/doc/rust/html"
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer, stream, held, (train_bytes, held_bytes) = prepare(args)
    print(f"training split: {train_bytes} bytes, {len(stream)} tokens")
    print(f"held-out split: {held_bytes} bytes, {len(held)} tokens", flush=True)
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")

    model = Llama()
    print(f"parameters: {sum(p.numel() for p in model.parameters())}")
    with torch.no_grad():  # causal: a later token changes no earlier logit
        a = torch.from_numpy(stream[:64].astype(np.int64))[None]
        b = a.clone()
        b[0, 40] = (b[0, 40] + 1) % 256
        same = (model(a) == model(b)).all(-1)[0]
        assert same[:40].all() and not same[40:].any()
    train(args, model, stream, held, held_bytes)

    model.load_state_dict(load_safetensors(args.out / "model.safetensors"))
    bits, nats = bits_per_byte(model, held, held_bytes, args.context)
    print(f"held out, exported weights: {bits:.4f} bits per byte, {nats:.4f} nats per token")
    print(tokenizer.decode(greedy(model, [END] + tokenizer.encode("A reference is"), 64)[1:]))


if __name__ == "__main__":
    main()
