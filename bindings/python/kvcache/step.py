"""A step: one forward pass over a batch.

`begin` with the new tokens of each sequence; for each layer `append` their keys and values and
`attend`; then `commit`, or `cancel`. The rows of a step are the new tokens of all its sequences, in
the order of the work. A call checks what it is given (element type, shape, device, contiguity) and
then crosses into the library once, without the interpreter's lock.
"""

from __future__ import annotations

import weakref
from typing import Any

from . import _structs, arrays
from ._native import ffi, lib
from .arrays import tokens as token_ids
from .cache import Cache, Sequence
from .errors import InvalidState, check, error
from .rope import Rope

_NULL = ffi.NULL
# Shapes of which one is asked for.
_Shapes = tuple[tuple[int, ...], ...]
# The hot calls, looked up once.
_quick, _append, _attend = arrays.quick, lib.kvc_step_append, lib.kvc_step_attend


class Scoring:
    """How scores are made from dot products. `window` 0 is the layer group's, `scale` 0 is
    1 / sqrt(k_dim), `softcap` 0 is none; `sinks` and `alibi` have one number a query head."""

    def __init__(
        self,
        *,
        causal: bool = True,
        window: int = 0,
        scale: float = 0.0,
        softcap: float = 0.0,
        sinks: Any = None,
        alibi: Any = None,
    ) -> None:
        self._sinks, n_sinks = arrays.floats(sinks, "sinks")
        self._alibi, n_alibi = arrays.floats(alibi, "alibi")
        self._heads = {n for n, given in ((n_sinks, sinks), (n_alibi, alibi)) if given is not None}
        self._keep = (sinks, alibi)
        self._struct = _structs.options("kvc_scoring", causal=int(causal), window=window, scale=scale, softcap=softcap)
        self._struct.sinks, self._struct.alibi = self._sinks, self._alibi


class Batch:
    """Work that is made once and used for many steps: one new token for each of `seqs`.

    Write the sampled tokens to `tokens`, a memoryview of unsigned 32-bit integers
    (`numpy.frombuffer(batch.tokens, "uint32")` shares it), and begin a step with it: nothing is built
    and one call crosses.
    """

    def __init__(self, seqs: list[Sequence]) -> None:
        self.seqs = list(seqs)
        self._cache = _one_cache(self.seqs)
        self._tokens = ffi.new("uint32_t[]", max(len(seqs), 1))
        self._work = ffi.new("kvc_work[]", max(len(seqs), 1))
        for i, seq in enumerate(self.seqs):
            self._work[i].seq, self._work[i].token_count = seq.id, 1
            self._work[i].tokens = self._tokens + i
        self._count = self._rows = len(self.seqs)
        self.tokens = memoryview(ffi.buffer(self._tokens, 4 * max(len(seqs), 1))).cast("B").cast("I")[: len(seqs)]


class Work:
    """Work of any shape: the new tokens of each sequence, (sequence, tokens) pairs."""

    def __init__(self, pairs: Any) -> None:
        pairs = list(pairs)
        self._cache = _one_cache([seq for seq, _ in pairs])
        self._work = ffi.new("kvc_work[]", max(len(pairs), 1))
        self._keep = []
        self._rows = 0
        for struct, (seq, new) in zip(self._work, pairs):
            ids, n = token_ids([new] if isinstance(new, int) else new)
            struct.seq, struct.token_count, struct.tokens = seq.id, n, ids
            self._keep.append(ids)
            self._rows += n
        self._count = len(pairs)


class Step:
    """A step, made once and reused: it keeps its buffers. One call at a time."""

    def __init__(self) -> None:
        out = ffi.new("kvc_step **")
        check(lib.kvc_step_create(out))
        self._handle = out[0]
        self._end = weakref.finalize(self, lib.kvc_step_destroy, out[0])
        self.cache: Cache | None = None
        self.rows = 0
        # By group: the shapes of keys and of values, heads and channels apart and together.
        self._shapes: dict[int, tuple[_Shapes, _Shapes]] = {}
        # By group and shape of the queries: their heads, and the shapes of the outputs.
        self._queries: dict[tuple[int, tuple[int, ...]], tuple[int, _Shapes]] = {}

    def close(self) -> None:
        """Ends the step, cancelling it where it is open. Again does nothing."""
        self.cache = None
        self._end()

    def begin(self, cache: Cache, work: Any) -> Step:
        """Opens the step: reserves blocks for the new tokens of the sequences of `work`, a list of
        (sequence, tokens) or a `Batch`, all or nothing; `OutOfBlocks` says how many were missing."""
        if not isinstance(work, (Batch, Work)):
            work = Work(work)
        if work._cache is not cache and work._count:
            raise ValueError("the sequences are of another cache")
        check(lib.kvc_step_begin(cache._handle, self._handle, work._work, work._count))
        self.cache, self.rows = cache, work._rows
        self._shapes.clear()
        self._queries.clear()
        return self

    def __enter__(self) -> Step:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.cache is not None:
            self.cancel() if kind else self.commit()

    def _open(self) -> Cache:
        if self.cache is None:
            raise InvalidState("the step is not open")
        return self.cache

    def _shape(self, group: int) -> tuple[_Shapes, _Shapes]:
        groups, n = self._open().groups, self.rows
        if not 0 <= group < len(groups):
            raise ValueError(f"group {group} is not one of the cache's")
        spec = groups[group]
        # Where values lie in keys there are none to look at: the slow path knows.
        v = () if spec.v_in_k else _either(n, spec.kv_heads, spec.k_dim if spec.v_dim is None else spec.v_dim)
        found = self._shapes[group] = _either(n, spec.kv_heads, spec.k_dim), v
        return found

    def _query(self, group: int, shape: tuple[int, ...]) -> tuple[int, _Shapes]:
        """The query heads of queries of a shape, and the shapes of their outputs; none where the
        shape is not of this step."""
        self._shape(group)
        spec, n = self._open().groups[group], self.rows
        heads = shape[1] if len(shape) == 3 else shape[1] // spec.k_dim if len(shape) == 2 else 0
        fits = shape in _either(n, heads, spec.k_dim)
        out = _either(n, heads, spec.k_dim if spec.v_dim is None else spec.v_dim) if fits else ()
        found = self._queries[group, tuple(shape)] = heads, out
        return found

    def positions(self) -> list[int]:
        """The position of each row in its sequence."""
        self._open()
        out, n = ffi.new("uint32_t[]", max(self.rows, 1)), ffi.new("uint32_t *")
        check(lib.kvc_step_rows(self._handle, out, self.rows, n))
        return ffi.unpack(out, n[0])

    def wait_layer(self, group: int, layer: int, wait_ms: int = 0) -> bool:
        """Whether a layer of all sequences is there, after at most `wait_ms`: before `attend`, where
        `Cache.onboard` started one of them. See `Sequence.wait_layer`."""
        out = ffi.new("uint32_t *")
        cache = self._open()
        numbers = [_structs.uint(n, what) for n, what in ((group, "group"), (layer, "layer"), (wait_ms, "wait_ms"))]
        check(lib.kvc_onboard_wait_step(cache._handle, self._handle, *numbers, out))
        return out[0] != 0

    def append(self, group: int, layer: int, k: Any, v: Any, *, rope: Rope | None = None) -> None:
        """Writes the keys and values of the step's rows in a layer, rounding to the stored format.

        `k` is `[rows, kv_heads, k_dim]` and `v` `[rows, kv_heads, v_dim]` of one element type, heads
        and channels in one dimension or two; `v` is None where values lie in keys. With `rope` keys
        are rotated to their positions on the way. On a GPU the cache's stream waits for torch's.
        """
        cache = self.cache or self._open()
        shapes = self._shapes.get(group) or self._shape(group)
        rotation = _NULL if rope is None else rope._struct
        one = _quick(k, shapes[0], False)
        if one is not None and v is not None:
            two = _quick(v, shapes[1], False)
            if two is not None and one[1] == two[1]:
                status = _append(cache._handle, self._handle, group, layer, one[0], two[0], one[1], rotation)
                if status:
                    raise error(status)
                return
        spec = cache.groups[group]
        stream = cache.stream
        key = arrays.rows(k, "k", False, stream)
        arrays.sized(key, "k", self.rows, spec.kv_heads, spec.k_dim)
        _on(cache, key, "k")
        dtype, value = _row(key.dtype, "k"), _NULL
        if not spec.v_in_k:
            found = arrays.rows(v, "v", False, stream)
            arrays.sized(found, "v", self.rows, spec.kv_heads, spec.k_dim if spec.v_dim is None else spec.v_dim)
            _on(cache, found, "v", key.device)
            if found.dtype != key.dtype:
                raise TypeError(f"k is {arrays.NAMES[key.dtype]} and v is {arrays.NAMES[found.dtype]}")
            value = found.address
        call, after = lib.kvc_step_append, None
        if key.device == "cuda":
            from .device import joined

            call, after = lib.kvc_step_append_device, joined(cache)
        check(call(cache._handle, self._handle, group, layer, key.address, value, dtype, rotation))
        if after is not None:
            after()

    def attend(
        self, group: int, layer: int, q: Any, out: Any, *, scoring: Scoring | None = None, lse: Any = None
    ) -> None:
        """Attention of the step's rows over all that their sequences hold in a layer.

        `q` is `[rows, q_heads, k_dim]`, `out` is `[rows, q_heads, v_dim]` and written, `lse` takes
        `[rows, q_heads]` natural logarithms of the softmax denominators in f32.
        """
        cache = self.cache or self._open()
        if lse is None and (scoring is None or not scoring._heads):
            one = _quick(q, None, False)
            if one is not None:
                shape = q.shape
                heads, results = self._queries.get((group, shape)) or self._query(group, shape)
                two = _quick(out, results, True)
                if two is not None:
                    how = _NULL if scoring is None else scoring._struct
                    status = _attend(
                        cache._handle, self._handle, group, layer, heads, one[0], one[1], two[0], two[1], how, _NULL
                    )
                    if status:
                        raise error(status)
                    return
        self._shape(group)
        spec, stream = cache.groups[group], cache.stream
        query = arrays.rows(q, "q", False, stream)
        shape = query.shape
        heads = shape[1] if len(shape) == 3 else shape[1] // spec.k_dim if len(shape) == 2 else 0
        arrays.sized(query, "q", self.rows, heads, spec.k_dim)
        _on(cache, query, "q")
        to = arrays.rows(out, "out", True, stream)
        arrays.sized(to, "out", self.rows, heads, spec.k_dim if spec.v_dim is None else spec.v_dim)
        _on(cache, to, "out", query.device)
        lse_at = _NULL
        if lse is not None:
            found = arrays.rows(lse, "lse", True, stream)
            if found.dtype != arrays.F32 or found.shape != (self.rows, heads):
                raise ValueError(f"lse is not f32 of shape ({self.rows}, {heads})")
            _on(cache, found, "lse", query.device)
            lse_at = ffi.cast("float *", found.address)
        how = _NULL
        if scoring is not None:
            if scoring._heads - {heads}:
                raise ValueError(f"sinks and alibi have one number for each of {heads} query heads")
            how = scoring._struct
        call, after = lib.kvc_step_attend, None
        if query.device == "cuda":
            from .device import joined

            call, after = lib.kvc_step_attend_device, joined(cache)
        check(
            call(
                cache._handle,
                self._handle,
                group,
                layer,
                heads,
                query.address,
                _row(query.dtype, "q"),
                to.address,
                _row(to.dtype, "out"),
                how,
                lse_at,
            )
        )
        if after is not None:
            after()

    def commit(self) -> None:
        """Makes the step's tokens part of their sequences, publishes the blocks they filled to the
        prefix index, and closes the step."""
        check(lib.kvc_step_commit(self._open()._handle, self._handle))
        self.cache = None

    def cancel(self) -> None:
        """Closes the step without its tokens: the sequences are as before."""
        check(lib.kvc_step_cancel(self._open()._handle, self._handle))
        self.cache = None


def _either(n: int, heads: int, dim: int) -> _Shapes:
    """The shapes that rows may have."""
    return (n, heads, dim), (n, heads * dim)


def _one_cache(seqs: list[Sequence]) -> Cache | None:
    """The cache that all sequences are of: an id means something in its own alone."""
    cache = seqs[0].cache if seqs else None
    if any(seq.cache is not cache for seq in seqs):
        raise ValueError("the sequences are of several caches")
    return cache


def _row(dtype: Any, name: str) -> int:
    if type(dtype) is not int:
        raise TypeError(f"{name} has elements of type {dtype}: rows are f32, f16 or bf16")
    return dtype


def _on(cache: Cache, found: arrays.Array, name: str, beside: str | None = None) -> None:
    """Rows are the host's, which every cache takes, or the device's own, and all in one place."""
    if found.device != "cpu" and (cache.device != found.device or found.ordinal != cache.device_ordinal):
        raise ValueError(f"{name} is on {found.device}:{found.ordinal}, the cache on {cache.device}:{cache.device_ordinal}")
    if beside is not None and found.device != beside:
        raise ValueError(f"{name} is on {found.device}, the other rows on {beside}")
