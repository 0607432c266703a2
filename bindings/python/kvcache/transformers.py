"""Hugging Face models on a cache of this library: paged, prefix-shared, batched without padding.

    paged = kvcache.transformers.attach(model, blocks=1024)
    model.generate(**inputs, past_key_values=paged.cache())

`attach` registers the attention implementation "kvcache" through transformers' own interface, sets it
on the model, and makes the storage that all calls share. A `PagedCache` is what one call of `generate`
(or of the model) hands through as its cache. Around the model's forward pass the batch is packed: the
tokens that are new, of all sequences one after the other, without padding (left, right or anywhere)
and without what the prefix index has already. So positions, attention and logits are those of each
sequence alone. Prompts that are alike are computed once and forked. What is skipped has no logits: a
call that wants those of all columns (`logits_to_keep` 0, which `generate` does not ask for) computes all.

Works with decoder models whose attention goes through the interface with keys rotated before the
cache: Llama, Qwen, Mistral and what follows them. It does not know what is in K and V.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from .cache import Cache, Sequence
from .errors import StaleHandle
from .layout import GroupSpec
from .step import Scoring, Step, Work

NAME = "kvcache"
_FORMATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# What the forward pass calls its cache: the second until transformers 5.20.
_ARGUMENTS = ("cache", "past_key_values")


@dataclass
class Counts:
    """What the calls of a model came to, in tokens and sequences."""

    prompt_tokens: int = 0
    computed_tokens: int = 0
    skipped_tokens: int = 0
    forked_sequences: int = 0


@dataclass
class _Packed:
    """A forward pass that is under way."""

    step: Step
    # For each row of the batch and each of its kept columns the packed row of its logits, or -1.
    index: torch.Tensor
    # Rows that repeat an earlier row's prompt: (row, that row).
    copies: list[tuple[int, int]]
    columns: int


class Paged:
    """A model's storage, made by `attach`. Calls of the model go one at a time."""

    def __init__(self, model: Any, groups: list[GroupSpec], layers: list[tuple[int, int]], options: dict[str, Any]):
        self.model, self.layers = model, layers
        self.store = Cache(groups, **options)
        self.counts = Counts()
        self._step = Step()
        self._scoring: dict[Any, Scoring] = {}
        self._hooks = [
            model.register_forward_pre_hook(self._pack, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._unpack, with_kwargs=True, always_call=True),
        ]

    def cache(self, *, name_space: int = 0) -> PagedCache:
        """A cache for one batch. Its sequences end with it; what they computed stays for later ones.
        `name_space` separates what may share prefixes from what may not."""
        return PagedCache(self, name_space)

    def detach(self) -> None:
        """Takes the hooks off the model and ends the storage."""
        for hook in self._hooks:
            hook.remove()
        self.store.close()

    def _pack(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = next((kwargs[name] for name in _ARGUMENTS if kwargs.get(name) is not None), None)
        if not isinstance(cache, PagedCache) or cache.paged is not self:
            raise ValueError(
                f"a model with the attention {NAME!r} needs the cache that attach(model).cache() makes, not {type(cache).__name__}"
            )
        kwargs = dict(kwargs)
        if args:
            kwargs["input_ids"], args = args[0], args[1:]
        ids = kwargs.get("input_ids")
        if args or ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("the cache compares tokens: give input_ids, not inputs_embeds, and the rest by name")
        if kwargs.get("labels") is not None:
            raise ValueError("attention from the cache has no gradient: no labels")
        batch, columns = ids.shape
        mask = kwargs.get("attention_mask")
        if mask is not None and (mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < columns):
            raise ValueError(f"attention_mask has the shape {tuple(mask.shape)} for {batch} rows of {columns} tokens")
        given = torch.ones(batch, columns, dtype=torch.bool) if mask is None else mask[:, -columns:].bool().cpu()
        keep = kwargs.get("logits_to_keep", 0)
        if not isinstance(keep, int):
            raise ValueError("logits_to_keep must be a number of columns")
        packed = cache._begin(ids.cpu(), given, keep if 0 < keep < columns else columns)
        try:
            positions = packed.step.positions()
            rows = torch.tensor([cache._new], device=ids.device, dtype=ids.dtype)
            wanted, packed.index = packed.index[packed.index >= 0].unique(return_inverse=False), packed.index
            # Logits of the wanted rows alone; the index then counts within those.
            place = torch.full((packed.step.rows,), -1)
            place[wanted] = torch.arange(len(wanted))
            packed.index = torch.where(packed.index >= 0, place[packed.index.clamp(min=0)], -1)
            kwargs.update(
                input_ids=rows,
                position_ids=torch.tensor([positions], device=ids.device),
                attention_mask=None,
                logits_to_keep=wanted.to(ids.device),
                use_cache=True,
            )
        except BaseException:
            cache._cancel()
            raise
        return args, kwargs

    def _unpack(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        cache = next((kwargs[name] for name in _ARGUMENTS if isinstance(kwargs.get(name), PagedCache)), None)
        if cache is None or cache._packed is None:
            return None
        if output is None:
            # The forward pass failed: the sequences are as before.
            cache._cancel()
            return None
        index = cache._commit().to(output.logits.device)
        logits = output.logits[0][index.clamp(min=0)]
        logits[index < 0] = 0
        output.logits = logits
        return output

    def _attend(self, module: Any, q: torch.Tensor, window: int, scale: float, softcap: float) -> torch.Tensor:
        group, layer = self.layers[module.layer_idx]
        spec = self.store.groups[group]
        if window != spec.window:
            raise ValueError(f"layer {module.layer_idx} has a window of {window}, its blocks of {spec.window}")
        key = (scale, softcap)
        scoring = self._scoring.get(key)
        if scoring is None:
            scoring = self._scoring[key] = Scoring(scale=scale, softcap=softcap)
        rows = q.transpose(1, 2)[0].contiguous()
        out = torch.empty_like(rows)
        self._step.attend(group, layer, rows, out, scoring=scoring)
        return out.unsqueeze(0)


class PagedCache(transformers.Cache):  # type: ignore[misc]
    """The cache of one batch, as transformers hands it through. Columns are the batch's, padding
    included; each row is a sequence of the library, without."""

    def __init__(self, paged: Paged, name_space: int) -> None:
        super().__init__(layers=[])
        self.paged, self.name_space = paged, name_space
        self.sequences: list[Sequence] = []
        self._columns = 0
        self._packed: _Packed | None = None
        self._new: list[int] = []
        self._end = weakref.finalize(self, _release, self.sequences)

    def close(self) -> None:
        """Ends the batch's sequences; their full blocks stay for later prompts."""
        self._end()

    # One forward pass.

    def _begin(self, ids: torch.Tensor, given: torch.Tensor, keep: int) -> _Packed:
        """Opens a step for the new tokens `ids[row, column]` where `given`, of whose logits the last
        `keep` of each row are wanted."""
        if self._packed is not None:
            raise ValueError("the last forward pass of this cache has not ended")
        tokens = [row[mask].tolist() for row, mask in zip(ids, given)]
        first, counts = not self.sequences, self.paged.counts
        if not first and len(tokens) != len(self.sequences):
            raise ValueError(f"{len(tokens)} rows for a cache of {len(self.sequences)}")
        if not all(tokens):
            raise ValueError("a row has no new token")
        # Where all logits are wanted nothing can be skipped; else what lies before the wanted ones.
        wanted = [int(row[-keep:].sum()) if keep < ids.shape[1] else len(new) for row, new in zip(given, tokens)]
        wanted = [max(n, 1) for n in wanted]
        started, copies = (self._start(tokens, wanted) if first else (self.sequences, []))
        repeats = dict(copies)
        skipped = [len(new) - n for new, n in zip(tokens, self._to_compute(started, tokens, first))]
        work = [(started[row], tokens[row][skipped[row] :]) for row in range(len(tokens)) if row not in repeats]
        try:
            step = self.paged._step.begin(self.paged.store, Work(work))
        except BaseException:
            if first:
                _release([started[row] for row in range(len(tokens)) if row not in repeats])
            raise
        if first:
            self.sequences[:] = started
            counts.prompt_tokens += sum(map(len, tokens))
            counts.skipped_tokens += sum(skipped)
        self._new = [token for _, new in work for token in new]
        counts.computed_tokens += len(self._new)
        self._packed = _Packed(step, self._index(given, tokens, skipped, wanted, keep, repeats), copies, ids.shape[1])
        return self._packed

    def _start(self, tokens: list[list[int]], wanted: list[int]) -> tuple[list[Sequence], list[tuple[int, int]]]:
        """A sequence for each prompt; those that repeat an earlier one get theirs when it is done."""
        seen: dict[tuple[int, ...], int] = {}
        started: list[Sequence] = []
        copies: list[tuple[int, int]] = []
        try:
            for row, prompt in enumerate(tokens):
                other = seen.setdefault(tuple(prompt), row)
                if other != row:
                    copies.append((row, other))
                    started.append(started[other])
                    continue
                # The last token of what is looked up is never taken from the index, so nothing that
                # has wanted logits is. (Truncating later is refused where a window has passed.)
                known = prompt[: len(prompt) - wanted[row] + 1]
                started.append(self.paged.store.start(known, name_space=self.name_space))
        except BaseException:
            _release(list({id(seq): seq for seq in started}.values()))
            raise
        return started, copies

    @staticmethod
    def _to_compute(started: list[Sequence], tokens: list[list[int]], first: bool) -> list[int]:
        return [len(new) - (seq.cached_tokens if first else 0) for seq, new in zip(started, tokens)]

    @staticmethod
    def _index(
        given: torch.Tensor,
        tokens: list[list[int]],
        skipped: list[int],
        wanted: list[int],
        keep: int,
        repeats: dict[int, int],
    ) -> torch.Tensor:
        """The packed row of each wanted column's logits. Where the last column is padding the last
        token's logits stand there too: they are what comes next."""
        batch, columns = given.shape
        index, base, at = torch.full((batch, columns), -1), [0] * batch, 0
        for row in range(batch):
            if row in repeats:
                base[row] = base[repeats[row]]
            else:
                base[row], at = at, at + len(tokens[row]) - skipped[row]
            computed = torch.arange(len(tokens[row])) - skipped[row]
            index[row, given[row]] = torch.where(computed >= 0, computed + base[row], -1)
            if keep < columns and not given[row, -1]:
                index[row, -1] = base[row] + len(tokens[row]) - skipped[row] - 1
        return index[:, -keep:]

    def _commit(self) -> torch.Tensor:
        packed = self._packed
        assert packed is not None
        packed.step.commit()
        self._packed = None
        self._columns += packed.columns
        for row, other in packed.copies:
            self.sequences[row] = self.sequences[other].fork()
        self.paged.counts.forked_sequences += len(packed.copies)
        return packed.index

    def _cancel(self) -> None:
        packed, self._packed = self._packed, None
        if packed is not None:
            packed.step.cancel()
            if self._columns == 0:
                repeated = {row for row, _ in packed.copies}
                _release([seq for row, seq in enumerate(self.sequences) if row not in repeated])
                self.sequences.clear()

    # What transformers calls.

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Writes a layer's new keys and values, `[1, head, packed row, channel]`, to its blocks."""
        if self._packed is None:
            raise ValueError("a PagedCache is updated by the model that it was attached to")
        group, layer = self.paged.layers[layer_idx]
        k, v = (x.transpose(1, 2)[0].contiguous() for x in (key_states, value_states))
        self._packed.step.append(group, layer, k, v)
        # The attention function sees the keys, and finds the cache by them.
        key_states._kvcache = self.paged
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch so far, padding included."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Lengths of a mask, which the attention does not need."""
        return self._columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum but the blocks."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Begins anew, for another batch."""
        _release(self.sequences)
        self._columns = 0

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i continues what row beam_idx[i] holds (beam search): forks, nothing is copied."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps the rows of these indices."""
        self._select(torch.arange(len(self.sequences))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._select([row for row in range(len(self.sequences)) for _ in range(repeats)])

    def _select(self, rows: Iterable[int]) -> None:
        taken: list[Sequence] = []
        try:
            taken.extend(self.sequences[row].fork() for row in rows)
        except BaseException:
            _release(taken)
            raise
        _release(self.sequences)
        self.sequences.extend(taken)
        self.paged.counts.forked_sequences += len(taken)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -`tokens_to_remove` tokens of each row (assisted generation)."""
        if tokens_to_remove > 0:
            tokens_to_remove -= self._columns
        for seq in self.sequences:
            seq.truncate(max(len(seq) + tokens_to_remove, 0))
        self._columns = max(self._columns + tokens_to_remove, 0)

    def __len__(self) -> int:
        return len(self.paged.layers)

    def __repr__(self) -> str:
        return f"PagedCache({len(self.sequences)} sequences, {self._columns} columns)"

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(self.sequences)

    is_compileable = False
    is_initialized = True
    is_croppable = True

    @property
    def is_sliding(self) -> list[bool]:
        """Which layers have a window."""
        return [bool(self.paged.store.groups[group].window) for group, _ in self.paged.layers]

    @property
    def is_linear(self) -> list[bool]:
        """None is linear attention."""
        return [False] * len(self.paged.layers)

    is_dummy = is_linear


def _release(sequences: list[Sequence]) -> None:
    for seq in sequences:
        try:
            seq.release()
        except StaleHandle:
            pass  # The storage ended before.
    sequences.clear()


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention implementation "kvcache": the packed rows over what their sequences hold."""
    paged = getattr(key, "_kvcache", None)
    if paged is None:
        raise ValueError("the attention 'kvcache' works on a cache of attach(model).cache() only")
    if attention_mask is not None or dropout or kwargs.get("s_aux") is not None:
        raise ValueError("the attention 'kvcache' has no masks, dropout or sinks here")
    out = paged._attend(module, query, sliding_window or 0, scaling or 0.0, softcap or 0.0)
    return out, None


transformers.AttentionInterface.register(NAME, attention)


def attach(
    model: Any,
    *,
    blocks: int = 1024,
    block_tokens: int = 16,
    max_seqs: int = 256,
    format: str | None = None,
    **options: Any,
) -> Paged:
    """Puts a causal language model on the library: sets its attention implementation, and makes a
    storage of `blocks` blocks for each kind of layer. `format` is how K and V are stored, the model's
    own element type by default; `options` are those of `kvcache.Cache`."""
    config = model.config.get_text_config(decoder=True)
    if not hasattr(model, "lm_head") and model.get_output_embeddings() is None:
        raise TypeError(f"{type(model).__name__} is not a causal language model")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    windows = _windows(config)
    kinds = sorted(set(windows))
    groups = [
        GroupSpec(windows.count(window), kv_heads, dim, format=format or _FORMATS[model.dtype], window=window)
        for window in kinds
    ]
    layers = [(kinds.index(window), windows[:n].count(window)) for n, window in enumerate(windows)]
    if model.device.type == "cuda":
        options = {"device": "cuda", "device_ordinal": model.device.index or 0, **options}
    elif model.device.type != "cpu":
        raise ValueError(f"the model is on {model.device}, not on the CPU or a CUDA device")
    model.set_attn_implementation(NAME)
    return Paged(model, groups, layers, {"blocks": blocks, "block_tokens": block_tokens, "max_seqs": max_seqs, **options})


def _windows(config: Any) -> list[int]:
    """The window of each layer, 0 for none."""
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window if getattr(config, "use_sliding_window", True) else 0] * config.num_hidden_layers
    known = {"full_attention": 0, "sliding_attention": window}
    if unknown := set(kinds) - set(known):
        raise ValueError(f"layers of type {', '.join(sorted(unknown))} are not attention over a cache")
    return [known[kind] for kind in kinds]
