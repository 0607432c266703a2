"""Hugging Face models on the library's cache against their own eager attention with DynamicCache."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvcache  # noqa: E402
from kvcache.transformers import attach  # noqa: E402

BASE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # Weights of this spread give attention and logits some contrast.
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama-gqa": ("Llama", {"num_key_value_heads": 2}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral-window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 12}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2-windows": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2}),
}


def build(family, attn="eager", seed=0):
    name, more = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**BASE, **more}, attn_implementation=attn)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def padded(prompts, side="left"):
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        at = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def ragged(seed=1, lengths=(5, 37, 18, 50)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 211, (n,), generator=generator).tolist() for n in lengths]


def generate(model, inputs, n=24, **more):
    return model.generate(**inputs, max_new_tokens=n, do_sample=more.pop("do_sample", False), **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_eager(family):
    want_model, model = build(family), build(family)
    paged, inputs = attach(model, blocks=128), padded(ragged())
    want = generate(want_model, inputs)
    assert len(set(want[:, -24:].flatten().tolist())) > 8  # not one token over and over
    got = generate(model, inputs, past_key_values=paged.cache())
    assert torch.equal(got, want)
    # A batch of one, of the same prompts, without padding.
    for prompt in ragged():
        ids = {"input_ids": torch.tensor([prompt])}
        assert torch.equal(generate(model, ids, past_key_values=paged.cache()), generate(want_model, ids))
    paged.store.audit()
    assert paged.store.stats().sequences == 0


@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window"])
def test_a_shared_prefix_is_not_computed_again(family):
    want_model, model = build(family), build(family)
    paged = attach(model, blocks=128)
    system = ragged(9, (64,))[0]
    first, second = padded([system + [7, 8, 9]]), padded([system + p for p in ragged(3, (3, 11, 30))])
    generate(model, first, past_key_values=paged.cache())
    assert paged.counts.skipped_tokens == 0 and paged.counts.computed_tokens == 67 + 23
    before = paged.counts.computed_tokens
    got = generate(model, second, past_key_values=paged.cache())
    assert torch.equal(got, generate(want_model, second))
    # 64 tokens of each prompt are whole blocks of the first's.
    assert paged.counts.skipped_tokens == 3 * 64
    assert paged.counts.computed_tokens - before == 3 + 11 + 30 + 3 * 23
    assert paged.store.stats().hit_tokens == 3 * 64
    # Nothing is shared with another name space.
    generate(model, first, past_key_values=paged.cache(name_space=5))
    assert paged.counts.skipped_tokens == 3 * 64
    paged.store.audit()


def test_several_continuations_fork():
    want_model, model = build("llama-gqa"), build("llama-gqa")
    paged, inputs = attach(model, blocks=128), padded(ragged(2, (20, 33)))
    sampled = {"num_return_sequences": 3, "do_sample": True, "temperature": 1.3, "top_k": 0}
    torch.manual_seed(5)
    want = generate(want_model, inputs, **sampled)
    torch.manual_seed(5)
    got = generate(model, inputs, past_key_values=paged.cache(), **sampled)
    assert torch.equal(got, want) and len({tuple(row) for row in got.tolist()}) == 6
    assert paged.counts.forked_sequences == 4 and paged.counts.computed_tokens == 20 + 33 + 6 * 23
    paged.store.audit()


def test_beams():
    want_model, model = build("qwen2"), build("qwen2")
    paged, inputs = attach(model, blocks=256), padded(ragged(2, (20, 33)))
    want = generate(want_model, inputs, num_beams=3)
    assert torch.equal(generate(model, inputs, past_key_values=paged.cache(), num_beams=3), want)
    paged.store.audit()
    assert paged.store.stats().sequences == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-windows"])
def test_logits_of_every_column(family, side):
    want_model, model = build(family), build(family)
    paged, inputs = attach(model, blocks=128), padded(ragged(), side)
    cache = paged.cache()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = want_model(**inputs, position_ids=positions).logits
        got = model(**inputs, past_key_values=cache).logits
        mask = inputs["attention_mask"].bool()
        assert (got - want)[mask].abs().max() < 1e-3 and not got[~mask].any()
        # Twice, with what is cached now; then a chunk of several tokens on top.
        again = model(**inputs, past_key_values=paged.cache()).logits
        assert (again - want)[mask].abs().max() < 1e-3
        chunk = torch.tensor(ragged(4, (6, 6, 6, 6)))
        got = model(chunk, past_key_values=cache).logits
    for row, prompt in enumerate(ragged()):
        alone = torch.tensor([prompt + chunk[row].tolist()])
        with torch.no_grad():
            assert (got[row] - want_model(alone).logits[0, -6:]).abs().max() < 1e-3
    assert cache.batch_size == 4 and [len(s) for s in cache.sequences] == [11, 43, 24, 56]
    cache.crop(-6)
    assert [len(s) for s in cache.sequences] == [5, 37, 18, 50]
    cache.close()


def test_right_padding_generates_as_left():
    model = build("llama-gqa")
    paged = attach(model, blocks=128)
    prompts = ragged()
    left = generate(model, padded(prompts), past_key_values=paged.cache())
    right = generate(model, padded(prompts, "right"), past_key_values=paged.cache())
    assert torch.equal(left[:, -24:], right[:, -24:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype):
    """16-bit models run; their tokens depend on rounding, so logits are compared, loosely."""
    want_model, model = build("llama-gqa").to(dtype), build("llama-gqa").to(dtype)
    paged, inputs = attach(model, blocks=64), padded(ragged())
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        want = want_model(**inputs, position_ids=positions).logits[mask].float()
        got = model(**inputs, past_key_values=paged.cache()).logits[mask].float()
    assert (got - want).abs().max() < 0.1 * want.abs().max()
    assert paged.store.groups[0].format == {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]


def test_what_is_refused():
    model = build("llama-gqa")
    paged, ids = attach(model, blocks=4), torch.tensor([ragged()[1]])
    refused = [
        (ValueError, "needs the cache", {"input_ids": ids}),
        (ValueError, "needs the cache", {"input_ids": ids, "past_key_values": transformers.DynamicCache()}),
        (ValueError, "input_ids", {"inputs_embeds": torch.zeros(1, 3, 64), "past_key_values": paged.cache()}),
        (ValueError, "no labels", {"input_ids": ids, "labels": ids, "past_key_values": paged.cache()}),
        (ValueError, "no new token", {"input_ids": ids, "attention_mask": 0 * ids, "past_key_values": paged.cache()}),
    ]
    for kind, text, arguments in refused:
        with pytest.raises(kind, match=text), torch.no_grad():
            model(**arguments)
    with pytest.raises(kvcache.OutOfBlocks), torch.no_grad():
        model(torch.tensor([ragged()[3] * 2]), past_key_values=paged.cache())
    # A forward pass that fails leaves nothing open.
    broken = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        model(ids, past_key_values=paged.cache())
    broken.remove()
    assert paged.store.stats().sequences == 0
    with torch.no_grad():
        model(ids, past_key_values=paged.cache())
    paged.store.audit()
    paged.detach()


def test_the_trained_model_writes_what_it_writes_in_rust():
    """The model of examples/generate, whose tensors have transformers' names, and its golden tokens."""
    folder = Path(__file__).parents[3] / "examples" / "generate" / "model"
    golden = json.loads((folder / "golden.json").read_text())
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    paged = attach(model, blocks=64)
    inputs = {"input_ids": torch.tensor([golden["prompt"]])}
    greedy = golden["greedy"]
    got = generate(model, inputs, n=len(greedy), past_key_values=paged.cache())
    assert got[0, -len(greedy) :].tolist() == greedy
