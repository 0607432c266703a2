"""The whole cache and its sequences.

A `Cache` has block pools, a prefix index, storage of K and V and kernels; calls on it are
thread-safe. A `Sequence` is a number inside it. Steps are in `step`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _structs, names
from ._native import ffi, lib
from .arrays import floats
from .arrays import tokens as token_ids
from .errors import check
from .layout import GroupSpec, groups_array
from .prefix import Retention, media_list, retention_array

if TYPE_CHECKING:
    from .device import DeviceRates
    from .events import Event, Events
    from .metrics import Metrics
    from .step import Step
    from .tier import LoadProgress, Prefetch, TierCounts, TierSlice


class CacheCounts(NamedTuple):
    """What a cache holds now, and what happened since it was created. Block counts are of the first
    layer group: `blocks` = `free_blocks` + `cached_blocks` + `referenced_blocks`."""

    blocks: int
    free_blocks: int
    cached_blocks: int
    referenced_blocks: int
    sequences: int
    sequence_tokens: int
    waste_tokens: int
    block_bytes: int
    pool_bytes: int
    looked_up_tokens: int
    hit_tokens: int
    evicted_blocks: int
    copied_blocks: int
    merged_blocks: int
    staging_blocks: int
    staged_blocks: int
    staging_bytes: int
    unsealed_blocks: int
    cascades: int


class Cache:
    """A KV cache for one model: `groups` are its layer groups, `blocks` the size of each group's pool.

    `device` is "cpu" or "cuda"; there `stream` is the CUstream (an integer, as
    `torch.cuda.current_stream().cuda_stream`) that everything is enqueued on, and None stands for
    torch's current stream where torch is loaded, else for the default stream. `threads` 0 is one a
    core. `staging_blocks` are raw blocks of each group with sealed tiles, 0 for two a sequence.
    `scrub` zeroes what becomes free; `group_blocks` are the blocks of each group where they differ.
    `cascade`: on a device, a prefix that neighbours in a step share is read once for all of them where
    that is estimated to be faster (never where `deterministic`); it has not run on a GPU yet.
    """

    def __init__(
        self,
        groups: GroupSpec | Iterable[GroupSpec],
        *,
        blocks: int = 1024,
        block_tokens: int = 16,
        max_seqs: int = 256,
        threads: int = 0,
        prefix_reuse: bool = True,
        device: str = "cpu",
        device_ordinal: int = 0,
        stream: int | None = None,
        deterministic: bool = False,
        eviction: str = "lru",
        staging_blocks: int = 0,
        scrub: bool = False,
        group_blocks: list[int] | None = None,
        cascade: bool = False,
    ) -> None:
        self.groups = (groups,) if isinstance(groups, GroupSpec) else tuple(groups)
        self.device, self.device_ordinal, self.block_tokens = device, device_ordinal, block_tokens
        if stream is None and device == "cuda":
            from .device import current_stream

            stream = current_stream(device_ordinal)
        self.stream = stream or 0
        options = _structs.options(
            "kvc_cache_options",
            block_tokens=block_tokens,
            blocks=blocks,
            max_seqs=max_seqs,
            threads=threads,
            prefix_reuse=int(prefix_reuse),
            device=names.number(names.DEVICES, device, "device"),
            device_ordinal=device_ordinal,
            stream=ffi.cast("void *", self.stream),
            deterministic=int(deterministic),
            eviction=names.number(names.EVICTIONS, eviction, "eviction"),
            staging_blocks=staging_blocks,
            scrub=int(scrub),
            cascade=int(cascade),
        )
        specs = groups_array(self.groups)
        if group_blocks is not None:
            each, n = token_ids(group_blocks, "group_blocks")
            if n != len(specs):
                raise ValueError(f"group_blocks has {n} numbers for {len(specs)} groups")
            options.group_blocks = each
        out = ffi.new("kvc_cache **")
        check(lib.kvc_cache_create(options, specs, len(specs), out))
        self._handle = out[0]
        self._end = weakref.finalize(self, lib.kvc_cache_destroy, out[0])

    def close(self) -> None:
        """Ends the cache with all its sequences and gives its memory back; again does nothing.
        `InvalidState` while another thread is inside it."""
        if self._end.alive:
            check(lib.kvc_cache_destroy(self._handle))
            self._end.detach()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def start(self, prompt: Any, *, name_space: int = 0, media: Any = ()) -> Sequence:
        """Starts a sequence with what the prefix index has of `prompt`: its `cached_tokens`, fewer
        than the prompt has. Feed the rest to a step. `name_space` separates what may share prefixes
        from what may not (tenant, adapter).

        `media` are pairs of a position in the prompt and 32 bytes, in order: there begins what the
        tokens do not name (an image, a clip, an embedding), whose content has that digest. What is
        before the first is shared with all prompts, what comes from then on only with those that have
        the same media there."""
        ids, n = token_ids(prompt, "prompt")
        seq, cached = ffi.new("kvc_seq *"), ffi.new("uint32_t *")
        space = _structs.uint(name_space, "name_space", 64)
        if len(media) == 0:
            check(lib.kvc_seq_start(self._handle, ids, n, space, seq, cached))
        else:
            given = media_list(media)
            check(lib.kvc_seq_start_media(self._handle, ids, n, given, len(given), space, seq, cached))
        return Sequence(self, seq[0], cached[0])

    def step(self, work: Any) -> Step:
        """A new step, begun with `work`: see `Step.begin`. In a `with` it commits at the end, and
        cancels where an exception comes out."""
        from .step import Step

        return Step().begin(self, work)

    def sync(self) -> None:
        """Waits for everything that is enqueued on the device; on the CPU there is nothing."""
        check(lib.kvc_cache_sync(self._handle))

    def advance(self, now_ms: int) -> None:
        """Sets the time of the prefix index, in ms, for priorities that end and uses that come."""
        check(lib.kvc_cache_advance(self._handle, now_ms))

    def clear_prefix(self) -> None:
        """Drops everything from the prefix index that no sequence uses."""
        check(lib.kvc_cache_clear_prefix(self._handle))

    def audit(self) -> None:
        """Checks that pools, tables and index agree; what does not hold is a bug in the library."""
        check(lib.kvc_cache_audit(self._handle))

    def set_scales(self, group: int, layer: int, k: Any, v: Any) -> None:
        """Sets the scales by which keys and values of a layer's heads are divided when they are stored
        (fp8, nvfp4): one positive number a KV head each; `v` is None for latents. Before anything is
        stored: `InvalidState` with a sequence alive or a block cached."""
        spec = self.groups[group] if 0 <= group < len(self.groups) else None
        keys, heads = floats(k, "k")
        values, n = floats(v, "v")
        if spec is None or heads != spec.kv_heads or n != (0 if v is None else heads):
            raise ValueError(f"{heads} and {n} scales for group {group}: one a KV head")
        check(lib.kvc_cache_set_scales(self._handle, group, layer, keys, values, heads))

    def set_device_rates(self, rates: DeviceRates) -> None:
        """Has the cache go by these rates, as somebody measured them, instead of by what its device says of
        itself. `InvalidState` where it is on the CPU."""
        check(lib.kvc_cache_set_device_rates(self._handle, _structs.options("kvc_device_rates", **rates._asdict())))

    def stats(self) -> CacheCounts:
        """What the cache holds and has done."""
        return _structs.counts(self._handle, lib.kvc_cache_stats, "kvc_cache_counts", CacheCounts)

    def metrics(self) -> Metrics:
        """Everything that the cache counts and times."""
        from .metrics import read

        return read(self._handle)

    def metrics_text(self) -> str:
        """The same as Prometheus reads it."""
        from .metrics import text

        return text(self._handle)

    def watch(self, every: int) -> None:
        """Keeps the times of every `every`-th block for the histograms; 0 for none."""
        check(lib.kvc_metrics_watch(self._handle, every))

    def set_time(self, now_ms: int) -> None:
        """Sets the clock of the metrics, in ms; the system's is not read from now on."""
        check(lib.kvc_metrics_set_time(self._handle, now_ms))

    def describe(self, name_space: int, *, salt: str | None = None, lora: str | None = None) -> None:
        """Says what a name space is in the server's words, before anything is cached in it, so that
        its digests are the same in every process that says the same."""
        words = [ffi.NULL if word is None else ffi.new("char[]", word.encode()) for word in (salt, lora)]
        check(lib.kvc_events_describe(self._handle, name_space, *words))

    def attach_tiers(self, model: str, **options: Any) -> None:
        """Gives the cache tiers, before anything is cached: blocks that the device has no room for go to
        `host_blocks` of host memory and to files in `disk_dir`, of `disk_bytes` at most, and come back
        for prompts that have them. `model` changes whenever the weights do. `remote` is the address of a
        store that other machines share, in a build that has it (feature remote). The other options are
        those of `kvc_tier_options`. `TierFailed` where the directory cannot be used."""
        from .tier import attach

        attach(self, model, **options)

    def flush_tiers(self, wait_ms: int) -> bool:
        """Copies everything cached to the lower tiers and waits `wait_ms` at most; True where all is there."""
        from .tier import flush

        return flush(self, wait_ms)

    def tier_stats(self) -> list[TierCounts]:
        """What each tier counted, from the host down; none without tiers."""
        from .tier import stats

        return stats(self)

    def prefetch(self, prompt: Any, *, name_space: int = 0, media: Any = ()) -> Prefetch:
        """Begins to load what lower tiers have of a prompt, for a `start` that comes later: see `Prefetch`."""
        from .tier import Prefetch

        return Prefetch(self, prompt, name_space, media)

    def onboard(self, prompt: Any, *, name_space: int = 0, media: Any = ()) -> Sequence:
        """`start` for an engine that begins before all blocks are on the device: what tiers have of the
        prompt counts in `cached_tokens`, and comes layer by layer. Before a layer is attended it must be
        there (`Step.wait_layer`, `Sequence.wait_layer`), and all before the step is committed. Waits for
        nothing."""
        from .tier import onboard

        return onboard(self, prompt, name_space, media)

    def export_blocks(self, seq: Sequence, model: str, file: Any, *, slices: Iterable[TierSlice] | None = None) -> int:
        """Writes the full blocks of a sequence to `file`, a descriptor or whatever has `fileno()` (a file, a
        pipe, a socket; it must block, and stays open); how many tokens. The cache is in use meanwhile."""
        from .tier import export_blocks

        return export_blocks(self, seq, model, file, slices)

    def import_blocks(
        self, files: Any, model: str, *, name_space: int = 0, slices: Iterable[TierSlice] | None = None
    ) -> int:
        """Takes blocks that `export_blocks` wrote into the prefix index; how many tokens. Several files, a
        list, are the parts of one: of the same tokens, and together all layers and heads of this cache. They
        are read from where they stand, to the ends of their streams, and must be unbuffered."""
        from .tier import import_blocks

        return import_blocks(self, files, model, name_space, slices)

    def events(self, callback: Callable[[Event], None] | None = None, **options: Any) -> Events:
        """Publishes what becomes cached and what ceases to be: see `Events`."""
        from .events import Events

        return Events(self, callback, **options)


class Sequence:
    """A sequence of a cache. It lives until `release`, the end of a `with`, or of its cache."""

    __slots__ = ("cache", "id", "cached_tokens")

    def __init__(self, cache: Cache, id: int, cached_tokens: int = 0) -> None:
        self.cache, self.id, self.cached_tokens = cache, id, cached_tokens

    def __repr__(self) -> str:
        return f"Sequence({self.id})"

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def fork(self) -> Sequence:
        """A second sequence with the same tokens, sharing every block."""
        out = ffi.new("kvc_seq *")
        check(lib.kvc_seq_fork(self.cache._handle, self.id, out))
        return Sequence(self.cache, out[0], self.cached_tokens)

    def truncate(self, tokens: int) -> None:
        """Forgets the tokens from position `tokens` on (rejected speculation)."""
        check(lib.kvc_seq_truncate(self.cache._handle, self.id, _structs.uint(tokens, "tokens")))

    def release(self) -> None:
        """Ends the sequence. Its full blocks stay in the prefix index until they are evicted."""
        check(lib.kvc_seq_release(self.cache._handle, self.id))

    def wait_layer(self, group: int, layer: int, wait_ms: int = 0) -> bool:
        """Of a sequence that `Cache.onboard` started: whether a layer of all its blocks is there, after at
        most `wait_ms`, during which other threads may use the cache. `LayerMissing` where it never will be:
        cancel the step, then `cancel_load`."""
        out = ffi.new("uint32_t *")
        numbers = [_structs.uint(n, what) for n, what in ((group, "group"), (layer, "layer"), (wait_ms, "wait_ms"))]
        check(lib.kvc_onboard_wait(self.cache._handle, self.id, *numbers, out))
        return out[0] != 0

    def load_progress(self) -> LoadProgress:
        """How its load stands. Copies nothing and waits for nothing."""
        from .tier import load_progress

        return load_progress(self)

    def cancel_load(self) -> int:
        """Gives up what has not come; how many tokens it holds then."""
        out = ffi.new("uint32_t *")
        check(lib.kvc_onboard_cancel(self.cache._handle, self.id, out))
        self.cached_tokens = min(self.cached_tokens, out[0])
        return out[0]

    def prioritize(self, ranges: Iterable[Retention]) -> None:
        """Gives priorities to the sequence's full blocks in the prefix index."""
        array, n = retention_array(ranges)
        check(lib.kvc_seq_prioritize(self.cache._handle, self.id, array, n))

    def hint(self, hint: str, *, from_block: int = 0, when_ms: int = 0) -> None:
        """Says what is known of the next use of what it holds: see `Prefix.hint`. Before `release`."""
        number = names.number(names.HINTS, hint, "hint")
        check(lib.kvc_seq_hint(self.cache._handle, self.id, from_block, number, when_ms))

    def tokens(self) -> list[int]:
        """The tokens whose K and V it holds."""
        return self._listed("uint32_t[]", lambda *out: lib.kvc_seq_tokens(self.cache._handle, self.id, *out))

    def blocks(self, group: int = 0) -> list[int]:
        """The blocks that hold it in a layer group, in order."""
        return self._listed("int32_t[]", lambda *out: lib.kvc_seq_blocks(self.cache._handle, self.id, group, *out))

    def __len__(self) -> int:
        n = ffi.new("uint64_t *")
        check(lib.kvc_seq_tokens(self.cache._handle, self.id, ffi.NULL, 0, n))
        return n[0]

    def _listed(self, kind: str, read: Any) -> list[int]:
        n = ffi.new("uint64_t *")
        check(read(ffi.NULL, 0, n))
        while True:
            room = n[0]
            out = ffi.new(kind, max(room, 1))
            status = read(out, room, n)
            # Another thread may have made it longer meanwhile.
            if status != lib.KVC_ERR_BUFFER_TOO_SMALL:
                check(status)
                return ffi.unpack(out, n[0])
            check(read(ffi.NULL, 0, n))
