"""Serves a small language model from the cache: the Rust example of the same name in Python, with NumPy
for everything but attention, and with the same prompts, options and tokens.

    python bindings/python/examples/generate.py --model examples/generate/model

Continuous batching over one cache: a prompt is admitted a step, so that each later one finds the shared
system prompt in the prefix index; running sequences decode beside it.
"""

import argparse
import json
import math
import re
import struct
from collections import deque
from pathlib import Path

import numpy as np

import kvcache

END = 256
F = np.float32


class Model:
    """A Llama model without attention: weights from safetensors as f32."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        data = (folder / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        body = memoryview(data)[8 + size :]
        self.tensors = {}
        for name, tensor in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                values = np.frombuffer(body[begin:end], "<f2").astype(F).reshape(tensor["shape"])
                # [input][output], contiguous: a row times this is a sum over inputs.
                self.tensors[name] = np.ascontiguousarray(values.T) if values.ndim == 2 else values
        self.embedding = self.tensors["model.embed_tokens.weight"].T

    def norm(self, x, name):
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True, dtype=F) + F(self.config["rms_norm_eps"]))
        return x * scale * self.tensors[name]

    def forward(self, tokens, wanted, attend):
        """Logits of the rows `wanted`, after running all tokens."""
        x = self.embedding[tokens].copy()
        for n in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{n}."
            weight = lambda part: self.tensors[f"{layer}{part}.weight"]  # noqa: E731
            h = self.norm(x, f"{layer}input_layernorm.weight")
            q, k, v = (h @ weight(f"self_attn.{part}_proj") for part in "qkv")
            x += attend(n, q, k, v) @ weight("self_attn.o_proj")
            h = self.norm(x, f"{layer}post_attention_layernorm.weight")
            gate = h @ weight("mlp.gate_proj")
            x += (gate / (1 + np.exp(-gate)) * (h @ weight("mlp.up_proj"))) @ weight("mlp.down_proj")
        return self.norm(x[wanted], "model.norm.weight") @ self.tensors["model.embed_tokens.weight"]


class Tokenizer:
    """Byte-level BPE; the rule that cuts text into pieces is stated in the model's README.md."""

    PIECE = re.compile(rb" ?[A-Za-z]+| ?[^A-Za-z \t\n\r]+|[ \t\n\r]+(?= [^ \t\n\r])|[ \t\n\r]+")

    def __init__(self, folder):
        self.bytes = [bytes([b]) for b in range(256)] + [b""]
        self.ranks = {}
        for line in (folder / "tokenizer.txt").read_text().splitlines():
            left, right = map(int, line.split())
            self.ranks[left, right] = len(self.bytes)
            self.bytes.append(self.bytes[left] + self.bytes[right])

    def encode(self, text):
        return [token for piece in self.PIECE.findall(text.encode()) for token in self.piece(list(piece))]

    def piece(self, ids):
        while True:
            merge = min((self.ranks[p] for p in zip(ids, ids[1:]) if p in self.ranks), default=None)
            if merge is None:
                return ids
            joined, at = [], 0
            while at < len(ids):
                found = self.ranks.get(tuple(ids[at : at + 2])) == merge
                joined.append(merge if found else ids[at])
                at += 1 + found
            ids = joined

    def decode(self, tokens):
        return b"".join(self.bytes[t] for t in tokens).decode("utf-8", "replace")


class Sampler:
    """The most likely token at temperature 0, or a draw by SplitMix64."""

    def __init__(self, temperature, seed):
        self.temperature, self.state = F(temperature), seed

    def pick(self, logits):
        best = int(logits.argmax())
        if self.temperature == 0:
            return best
        weights = [math.exp(w) for w in ((logits - logits[best]) / self.temperature).tolist()]
        left = sum(weights) * self.uniform()
        for token, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return token
        return best

    def uniform(self):
        mask = (1 << 64) - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        z = ((self.state ^ self.state >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return ((z ^ z >> 31) >> 11) / 2.0**53


def serve(model, cache, prompts, batch, max_tokens, sampler):
    """Runs all prompts to their end: what each wrote, and how many prompt tokens were computed."""
    c = model.config
    heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    rope, step = kvcache.Rope(dim, theta=c["rope_theta"]), kvcache.Step()
    waiting, running, outputs, computed = deque(enumerate(prompts)), [], [[] for _ in prompts], 0
    while waiting or running:
        if waiting and len(running) < batch:
            number, prompt = waiting.popleft()
            seq = cache.start(prompt)
            computed += len(prompt) - seq.cached_tokens
            running.append([number, seq, prompt[seq.cached_tokens :]])
        tokens = [token for _, _, new in running for token in new]
        last = np.cumsum([len(new) for _, _, new in running]) - 1
        with step.begin(cache, [(seq, new) for _, seq, new in running]):
            positions = step.positions()

            def attend(layer, q, k, v):
                q = q.reshape(-1, heads, dim)
                rope.rotate(q, positions)
                out = np.empty_like(q)
                step.append(0, layer, k.reshape(-1, kv_heads, dim), v.reshape(-1, kv_heads, dim), rope=rope)
                step.attend(0, layer, q, out)
                return out.reshape(-1, heads * dim)

            logits = model.forward(tokens, last, attend)
        for run, row in zip(running, logits):
            token = sampler.pick(row)
            outputs[run[0]].append(token)
            run[2] = [token]
        for run in [r for r in running if r[2] == [END] or len(outputs[r[0]]) == max_tokens]:
            run[1].release()
            running.remove(run)
    return outputs, computed


def main():
    parser = argparse.ArgumentParser(description="Serve a small language model from the cache.")
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--prompt", action="append", help="a prompt after the system prompt; repeat for more")
    parser.add_argument("--batch", type=int, default=4, help="sequences that run at once")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens to generate for each prompt")
    parser.add_argument("--dtype", choices=["f32", "f16", "bf16"], default="bf16", help="how K and V are stored")
    parser.add_argument("--temperature", type=float, default=0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    model, tokenizer = Model(args.model), Tokenizer(args.model)
    system = (args.model.parent / "system.txt").read_text().rstrip()
    questions = args.prompt or (args.model.parent / "prompts.txt").read_text().splitlines()
    prompts = [[END, *tokenizer.encode(f"{system}\n\n{question}")] for question in questions]
    c = model.config
    longest = max(map(len, prompts)) + args.max_tokens
    if longest > c["max_position_embeddings"]:
        parser.error(f"{longest} tokens are past the model's {c['max_position_embeddings']}")
    group = kvcache.GroupSpec(c["num_hidden_layers"], c["num_key_value_heads"], c["head_dim"], format=args.dtype)
    blocks = (args.batch + len(prompts)) * -(-longest // 16)
    with kvcache.Cache(group, blocks=blocks, max_seqs=args.batch) as cache:
        sampler = Sampler(args.temperature, args.seed)
        outputs, computed = serve(model, cache, prompts, args.batch, args.max_tokens, sampler)
        cache.audit()
    texts = [tokenizer.decode(output) for output in outputs]
    if args.json:
        sequences = [
            {"prompt": q, "text": text, "tokens": output} for q, text, output in zip(questions, texts, outputs)
        ]
        total = sum(map(len, prompts))
        print(json.dumps({"sequences": sequences, "prompt_tokens": total, "prefill_tokens": computed}))
        return
    for question, text in zip(questions, texts):
        print(f"{question}{text}\n")
    print(f"{sum(map(len, prompts))} prompt tokens, {computed} computed")


if __name__ == "__main__":
    main()
