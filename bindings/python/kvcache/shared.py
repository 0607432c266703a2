"""What sequences share, on a device: lookups in a copy of a prefix index, and when a cascade pays.

`Device.cascade` and `Device.merge` are the calls on tensors; addresses in `DevicePrefix.lookup` are those
of tensors on the device or of `DeviceMemory`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _structs, arrays, kernels
from ._native import ffi, lib
from .errors import check

if TYPE_CHECKING:
    from .device import Device
    from .prefix import Prefix


class CascadePrefix(NamedTuple):
    """Neighbouring sequences whose tables begin with the same blocks."""

    first_seq: int
    seqs: int
    blocks: int


class CascadeSegment(NamedTuple):
    """Neighbouring sequences that share a prefix of so many blocks, or 0."""

    first_seq: int
    seqs: int
    shared_blocks: int


class CascadeEstimate(NamedTuple):
    """What the cost model says, in microseconds."""

    pays: int
    plain: float
    cascade: float


def choose_cascade(
    prefixes: Sequence[CascadePrefix | tuple[int, int, int]],
    segments: int,
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    token_bytes: int,
    seqs: int,
    kv_tokens: int,
    memory_bytes: float,
    cache_bytes: float,
    cache_size: int,
    operations: float,
    launch: float,
    multiprocessors: int,
    q_tokens: int = 1,
) -> tuple[list[CascadeSegment], CascadeEstimate]:
    """Which of `prefixes`, in order and apart, a cascade should split off: the list that
    `Device.cascade` takes as an int32 tensor `[segments, 4]` (its last column 0), filled up to its
    length, and what was weighed. Rates are those of the device in a microsecond; see
    `kvc_device_cascade_query`. Where it does not pay the list splits nothing off."""
    query = _structs.options(
        "kvc_device_cascade_query",
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        token_bytes=token_bytes,
        q_tokens=q_tokens,
        seqs=seqs,
        kv_tokens=kv_tokens,
        memory_bytes=memory_bytes,
        cache_bytes=cache_bytes,
        cache_size=cache_size,
        operations=operations,
        launch=launch,
        multiprocessors=multiprocessors,
    )
    given = ffi.new("kvc_device_cascade_prefix[]", [(*prefix, 0) for prefix in prefixes])
    count = _structs.uint(segments, "segments")
    found, said = ffi.new("kvc_device_cascade_segment[]", count), ffi.new("kvc_device_cascade_estimate *")
    check(lib.kvc_device_cascade_choose(query, given, len(prefixes), found, count, said, ffi.sizeof(said[0])))
    return [_structs.record(segment, CascadeSegment) for segment in found], _structs.record(said, CascadeEstimate)


def copy_bytes(prefix: Prefix) -> int:
    """Bytes of device memory that a copy of the index takes."""
    out = ffi.new("uint64_t *")
    check(lib.kvc_device_prefix_size(prefix._handle, out))
    return out[0]


class DevicePrefix:
    """A device's copy of a prefix index, of what the index was at the last `sync`: a block that has been
    evicted since can still be found there. An index has one copy."""

    def __init__(self, device: Device, prefix: Prefix) -> None:
        out = ffi.new("kvc_device_prefix **")
        check(lib.kvc_device_prefix_create(device._handle, prefix._handle, out))
        self.device, self.groups = device, prefix.groups
        self._handle = out[0]
        self._end = weakref.finalize(self, lib.kvc_device_prefix_destroy, out[0])

    def close(self) -> None:
        """Ends the copy. Again does nothing."""
        self._end()

    def __enter__(self) -> DevicePrefix:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def sync(self, *, stream: int | None = None) -> int:
        """Enqueues the upload of what changed in the index, and returns the bytes of it. Syncs and
        lookups must be in one order on the device."""
        out = ffi.new("uint64_t *")
        check(lib.kvc_device_prefix_sync(self._handle, self.device._stream(stream), out))
        return out[0]

    def lookup(
        self,
        tokens: Any,
        indptr: Any,
        matched: Any,
        blocks: Any,
        *,
        requests: int,
        max_blocks: int,
        leave: int = 1,
        name_spaces: Any = None,
        tail_tokens: Any = None,
        tail_blocks: Any = None,
        error_flag: Any = None,
        block_stride: int = 0,
        stream: int | None = None,
    ) -> None:
        """Enqueues the lookups of `requests` token sequences: the longest cached prefix of each, at most
        `max_blocks`, but for its last `leave` tokens. All arrays are the device's: `tokens` uint32,
        `indptr` int32 `[requests + 1]`, `name_spaces` int64, `matched` uint32 `[requests]`, `blocks` int32
        `[requests, max_blocks, groups]`. See `kvc_device_lookup_desc`."""
        desc = _structs.options(
            "kvc_device_lookup_desc", requests=requests, leave=leave, max_blocks=max_blocks, block_stride=block_stride
        )
        words = ("u32", "i32")
        least = requests * max_blocks * self.groups
        given: list[tuple[str, Any, Any, str, int]] = [
            ("tokens", tokens, words, "uint32_t *", 0),
            ("indptr", indptr, "i32", "int32_t *", requests + 1),
            ("name_spaces", name_spaces, "i64", "uint64_t *", requests),
            ("matched", matched, words, "uint32_t *", requests),
            ("blocks", blocks, "i32", "int32_t *", 0 if block_stride else least),
            ("tail_tokens", tail_tokens, words, "uint32_t *", requests),
            ("tail_blocks", tail_blocks, "i32", "int32_t *", requests * self.groups),
            ("error_flag", error_flag, words, "uint32_t *", 1),
        ]
        for name, x, dtypes, pointer, count in given:
            if x is not None:
                setattr(desc, name, ffi.cast(pointer, self._address(x, name, dtypes, count)))
        check(lib.kvc_device_prefix_lookup(self._handle, desc, self.device._stream(stream)))

    def _address(self, x: Any, name: str, dtypes: Any, count: int) -> Any:
        at = getattr(x, "address", None)
        if isinstance(at, int):
            size = x.bytes // (8 if dtypes == "i64" else 4)
        else:
            found = kernels._exact(x, name, dtypes, self.device.kind)
            at, size = ffi.cast("uintptr_t", found.address), arrays.count(found.shape)
        if size < count:
            raise ValueError(f"{name} has {size} elements, and {count} are needed")
        return ffi.cast("uintptr_t", at)
