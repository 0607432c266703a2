"""The tiers of a cache, host memory and disk: where blocks go that the device has no room for, and the
way back. A store of the engine's own is given in C (`kvc_tier_store`): its functions are called from
several threads of the library at once, which the interpreter's lock would put in a row.
"""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _structs, names
from ._native import ffi, lib
from .arrays import tokens as token_ids
from .errors import check
from .prefix import media_list

if TYPE_CHECKING:
    from .cache import Cache, Sequence


class TierSlice(NamedTuple):
    """The part of a layer group that a cache holds: its first layer and KV head in the whole model."""

    first_layer: int
    first_head: int


class TierCounts(NamedTuple):
    """What a tier counted since it was attached, in blocks where the name says nothing else. `kind` is
    "host", "disk" or "store"."""

    kind: str
    down: int
    stored: int
    stored_bytes: int
    present: int
    dropped: int
    full: int
    loaded: int
    loaded_bytes: int
    missed: int
    bad: int
    failures: int
    timeouts: int
    evicted: int
    queued: int
    objects: int
    bytes: int
    load_latency: float
    load_bandwidth: float
    page_locked: int


class TierDecision(NamedTuple):
    """What tiers have of a prompt and what is done about it. `why` is one of `names.WHYS`; seconds are
    0 where they are not known."""

    device_tokens: int
    host_tokens: int
    found_blocks: int
    load_blocks: int
    load_seconds: float
    compute_seconds: float
    why: str


class LoadProgress(NamedTuple):
    """How a load by layers stands: `state` is "complete", "loading" or "failed". `missing_group` and
    `missing_layer` are the first layer, in the order in which they come, that is not there; `why` is why it
    never will be, one of `names.MISSED`, or None."""

    state: str
    ready_layers: int
    device_tokens: int
    loading_tokens: int
    missing_group: int
    missing_layer: int
    why: str | None


def attach(
    cache: Cache,
    model: str,
    *,
    host_blocks: int = 0,
    transit_blocks: int | None = None,
    disk_dir: str | os.PathLike[str] | None = None,
    disk_bytes: int | None = None,
    slices: Iterable[TierSlice] | None = None,
    least_priority: int | None = None,
    least_uses: int = 0,
    on_commit: bool = False,
    direct: bool = True,
    readers: int | None = None,
    queued_blocks: int | None = None,
    prefill_seconds: float = 0.0,
    remote: str | None = None,
    remote_timeout_ms: int | None = None,
    plain_memory: bool = False,
    ahead_blocks: int = 0,
) -> None:
    """Gives a cache tiers: see `Cache.attach_tiers`."""
    parts, count = _parts(slices)
    # Texts and arrays live until the call is over.
    name = ffi.new("char[]", _text(model, "model"))
    folder = None if disk_dir is None else ffi.new("char[]", _text(disk_dir, "disk_dir"))
    address = None if remote is None else ffi.new("char[]", _text(remote, "remote"))
    options = _structs.options(
        "kvc_tier_options",
        model=name,
        host_blocks=host_blocks,
        transit_blocks=transit_blocks,
        disk_dir=folder,
        disk_bytes=disk_bytes,
        slices=parts,
        slice_count=count,
        least_priority=least_priority,
        least_uses=least_uses,
        on_commit=int(on_commit),
        direct=int(direct),
        readers=readers,
        queued_blocks=queued_blocks,
        prefill_seconds=prefill_seconds,
        remote=address,
        remote_timeout_ms=remote_timeout_ms,
        plain_memory=int(plain_memory),
        ahead_blocks=ahead_blocks,
    )
    check(lib.kvc_tier_attach(cache._handle, options))


def _text(text: str | os.PathLike[str], name: str) -> bytes:
    found = os.fsencode(text)
    if b"\0" in found:
        # C would read to there, and another model's or directory's name.
        raise ValueError(f"{name} has a NUL")
    return found


def onboard(cache: Cache, prompt: Any, name_space: int, media: Any) -> Sequence:
    """See `Cache.onboard`."""
    from .cache import Sequence

    ids, n = token_ids(prompt, "prompt")
    given = media_list(media) if len(media) else ffi.NULL
    seq, cached = ffi.new("kvc_seq *"), ffi.new("uint32_t *")
    space = _structs.uint(name_space, "name_space", 64)
    check(lib.kvc_onboard_start(cache._handle, ids, n, given, len(media), space, seq, cached))
    return Sequence(cache, seq[0], cached[0])


def load_progress(seq: Sequence) -> LoadProgress:
    """See `Sequence.load_progress`."""
    struct = ffi.new("kvc_onboard_progress *")
    check(lib.kvc_onboard_state(seq.cache._handle, seq.id, struct, ffi.sizeof("kvc_onboard_progress")))
    progress = _structs.record(struct, LoadProgress)
    why = names.word(names.MISSED, struct.why) if struct.why else None
    return progress._replace(state=names.word(names.LOADS, struct.state), why=why)


def flush(cache: Cache, wait_ms: int) -> bool:
    """Copies what is cached to the disk: see `Cache.flush_tiers`."""
    done = ffi.new("uint32_t *")
    check(lib.kvc_tier_flush(cache._handle, _structs.uint(wait_ms, "wait_ms"), done))
    return done[0] != 0


def stats(cache: Cache) -> list[TierCounts]:
    """What each tier counted, from the host down."""
    struct = ffi.new("kvc_tier_counts *")
    found: list[TierCounts] = []
    while True:
        status = lib.kvc_tier_stats(cache._handle, len(found), struct, ffi.sizeof("kvc_tier_counts"))
        # An index past the last tier.
        if status == lib.KVC_ERR_INVALID_ARGUMENT:
            return found
        check(status)
        counts = _structs.record(struct, TierCounts)
        found.append(counts._replace(kind=names.word(names.TIERS, struct.kind)))


def export_blocks(cache: Cache, seq: Sequence, model: str, file: Any, slices: Iterable[TierSlice] | None) -> int:
    """See `Cache.export_blocks`."""
    if seq.cache is not cache:
        raise ValueError("the sequence is of another cache")
    name, (parts, count), out = ffi.new("char[]", _text(model, "model")), _parts(slices), ffi.new("uint64_t *")
    check(lib.kvc_transfer_export(cache._handle, seq.id, name, parts, count, _descriptor(file), out))
    return out[0]


def import_blocks(cache: Cache, files: Any, model: str, name_space: int, slices: Iterable[TierSlice] | None) -> int:
    """See `Cache.import_blocks`."""
    listed = [_descriptor(file, True) for file in (files if isinstance(files, (list, tuple)) else [files])]
    name, (parts, count), out = ffi.new("char[]", _text(model, "model")), _parts(slices), ffi.new("uint64_t *")
    fds, space = ffi.new("int32_t[]", listed), _structs.uint(name_space, "name_space", 64)
    check(lib.kvc_transfer_import(cache._handle, space, name, parts, count, fds, len(listed), out))
    return out[0]


def _parts(slices: Iterable[TierSlice] | None) -> tuple[Any, int]:
    listed = [] if slices is None else list(slices)
    return (ffi.new("kvc_tier_slice[]", listed) if listed else ffi.NULL), len(listed)


def _descriptor(file: Any, read: bool = False) -> int:
    """The descriptor of a file: what is written must be out of its buffer, what is read not in one."""
    if isinstance(file, int):
        return _structs.uint(file, "file", 31)
    if not hasattr(file, "fileno"):
        raise TypeError(f"file must be a descriptor or have fileno(), not {type(file).__name__}")
    if read and isinstance(file, (io.BufferedIOBase, io.TextIOBase)):
        raise ValueError("a file that is read must be unbuffered: open it with buffering=0")
    if isinstance(file, io.IOBase):
        file.flush()
    return int(file.fileno())


class Prefetch:
    """A prompt whose blocks are on their way from lower tiers to host memory, from where
    `Cache.start` takes them, given the same media. `decision` says what was found and what is loaded. One call at a time."""

    def __init__(self, cache: Cache, prompt: Any, name_space: int = 0, media: Any = ()) -> None:
        ids, n = token_ids(prompt, "prompt")
        out, decision = ffi.new("kvc_prefetch **"), ffi.new("kvc_tier_decision *")
        space = _structs.uint(name_space, "name_space", 64)
        if len(media) == 0:
            check(lib.kvc_prefetch_create(cache._handle, ids, n, space, out, decision))
        else:
            given = media_list(media)
            check(lib.kvc_prefetch_create_media(cache._handle, ids, n, given, len(given), space, out, decision))
        self.cache = cache
        self.decision = _structs.record(decision, TierDecision)._replace(why=names.word(names.WHYS, decision.why))
        self._handle = out[0]
        self._end = weakref.finalize(self, lib.kvc_prefetch_destroy, out[0])

    def wait(self, wait_ms: int = 0) -> bool:
        """Takes what has arrived, after at most `wait_ms` of waiting for the rest, during which other
        threads may use the cache. True where nothing more comes."""
        done = ffi.new("uint32_t *")
        wait_ms = _structs.uint(wait_ms, "wait_ms")
        check(lib.kvc_prefetch_wait(self.cache._handle, self._handle, wait_ms, done))
        return done[0] != 0

    def close(self) -> None:
        """Gives up what has not arrived. Again does nothing."""
        self._end()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
