"""vLLM's CPU attention over its paged cache, as a peer of the bench `tiles`.

    python vllm.py _C_AVX512.abi3.so

with the library of a vLLM wheel and the PyTorch that it was built for; vLLM itself is not imported. Reads a
line a command on stdin and answers each with one line, as ggml.c does:

    kinds                      answers its name and the formats of K and V that there are
    decode KIND SEQS TOKENS    builds one query token for each sequence, 32 query and 8 KV heads of 128
                               channels, blocks of 128 tokens in random order; answers the bytes of K
                               and V of a token and the largest difference from attention in f32, of a sequence
    run INDEX THREADS          runs what the INDEX-th `decode` built; answers the seconds it took
"""

import sys
import time

import torch

DIM, Q_HEADS, KV_HEADS, BLOCK = 128, 32, 8, 128
KINDS = {"bf16": "auto", "fp8_e4m3": "fp8_e4m3"}


class Decode:
    def __init__(self, kind, seqs, tokens):
        self.kv_dtype = KINDS[kind]
        blocks_a_seq = -(-tokens // BLOCK)
        blocks = seqs * blocks_a_seq
        generator = torch.Generator().manual_seed(seqs * tokens)
        store = torch.bfloat16 if self.kv_dtype == "auto" else torch.uint8
        cache = torch.zeros(blocks, KV_HEADS, BLOCK * 2, DIM, dtype=store)
        self.keys, self.values = cache.chunk(2, dim=2)
        order = torch.randperm(blocks, generator=generator)
        self.table = order.reshape(seqs, blocks_a_seq).to(torch.int32)
        self.bytes = 2 * KV_HEADS * DIM * cache.element_size()
        # Rows sequence by sequence, so that little more than the cache is held.
        for seq in range(seqs):
            k, v = (
                (torch.rand(tokens, KV_HEADS, DIM, generator=generator) * 2 - 1).bfloat16()
                for _ in range(2)
            )
            at = torch.arange(tokens)
            slots = self.table[seq].long()[at // BLOCK] * BLOCK + at % BLOCK
            torch.ops._C.cpu_attn_reshape_and_cache(
                k, v, self.keys, self.values, slots, "vec", 1.0, 1.0, self.kv_dtype
            )
        self.q = (torch.rand(seqs, Q_HEADS, DIM, generator=generator) * 2 - 1).bfloat16()
        self.out = torch.zeros_like(self.q)
        self.starts = torch.arange(seqs + 1, dtype=torch.int32)
        self.lens = torch.full((seqs,), tokens, dtype=torch.int32)
        self.run()
        group = Q_HEADS // KV_HEADS
        wide = (x.float().repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        want = torch.nn.functional.scaled_dot_product_attention(
            self.q[-1].float().unsqueeze(1), *wide
        ).squeeze(1)
        self.difference = (want - self.out[-1].float()).abs().max().item()

    def run(self):
        # A step plans once for all its layers; the plan is not what is timed.
        plan = torch.ops._C.get_scheduler_metadata(
            len(self.lens), Q_HEADS, KV_HEADS, DIM, self.lens, self.q.dtype, self.starts, True, -1,
            "vec", True, None, self.kv_dtype,
        )
        start = time.perf_counter()
        torch.ops._C.cpu_attention_with_kv_cache(
            self.q, self.keys, self.values, self.out, self.starts, self.lens, DIM**-0.5, True, None,
            -1, self.table, 0.0, plan, None, None, 1.0, 1.0, self.kv_dtype,
        )
        return time.perf_counter() - start


def main():
    torch.ops.load_library(sys.argv[1])
    built = []
    for line in sys.stdin:
        command, *words = line.split()
        if command == "kinds":
            answer = " ".join(["vllm", *KINDS])
        elif command == "decode":
            built.append(Decode(words[0], int(words[1]), int(words[2])))
            answer = f"{built[-1].bytes} {built[-1].difference}"
        else:
            torch.set_num_threads(int(words[1]))
            answer = built[int(words[0])].run()
        print(answer, flush=True)


with torch.inference_mode():
    main()
