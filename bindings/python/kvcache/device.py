"""A GPU (or its emulator): memory, and kernels on the caller's own tensors and stream.

The streams of calls are torch's current one where torch is loaded and none is given, so that work is
ordered with the tensors' own. Everything is enqueued; nothing waits but what says so.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _structs, arrays, kernels, names
from ._native import ffi, lib
from .errors import check

if TYPE_CHECKING:
    from .cache import Cache


class DeviceFacts(NamedTuple):
    """What a device is."""

    kind: int
    ordinal: int
    multiprocessors: int


class DeviceRates(NamedTuple):
    """What a device does in a microsecond, by which ways to compute the same are chosen: bytes from memory
    and from its second-level cache (of `cache_size` bytes), operations of the prefill kernel; and the
    microseconds from one launch's end to the next one's work."""

    multiprocessors: int
    memory_bytes: float
    cache_bytes: float
    cache_size: int
    operations: float
    launch: float


def current_stream(ordinal: int) -> int:
    """torch's current stream of a CUDA device as an integer; 0, the default one, without torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    return torch.cuda.current_stream(ordinal).cuda_stream


def joined(cache: Cache) -> Callable[[], None] | None:
    """Makes the cache's stream wait for torch's current one; what is returned does the reverse after
    the call. None where they are the same stream."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    current = torch.cuda.current_stream(cache.device_ordinal)
    if current.cuda_stream == cache.stream:
        return None
    own = torch.cuda.ExternalStream(cache.stream, device=cache.device_ordinal)
    own.wait_stream(current)
    return lambda: current.wait_stream(own)


class DeviceMemory:
    """Memory of a device, freed by `free` or with its last reference. `address` is an integer."""

    def __init__(self, device: Device, bytes: int) -> None:
        out = ffi.new("void **")
        check(lib.kvc_device_alloc(device._handle, _structs.uint(bytes, "bytes", 64), out))
        self.device, self.bytes = device, bytes
        self.address = int(ffi.cast("uintptr_t", out[0]))
        # The device must outlive its memory: the finalizer holds it.
        self._end = weakref.finalize(self, _free, device, out[0])

    def free(self) -> None:
        """Frees it, after everything that is enqueued. Again does nothing."""
        self._end()

    def upload(self, data: Any, *, stream: int | None = None) -> None:
        """Copies a contiguous array of the host to its beginning, and waits."""
        found = arrays.rows(data, "data")
        size = _bytes(found)
        if found.device != "cpu" or size > self.bytes:
            raise ValueError(f"data has {size} bytes on {found.device}: {self.bytes} bytes on the CPU fit")
        at = ffi.cast("void *", self.address)
        check(lib.kvc_device_upload(self.device._handle, at, found.address, size, self.device._stream(stream)))

    def download(self, data: Any, *, stream: int | None = None) -> None:
        """Copies its beginning to a contiguous array of the host, after what is enqueued, and waits."""
        found = arrays.rows(data, "data", True)
        size = _bytes(found)
        if found.device != "cpu" or size > self.bytes:
            raise ValueError(f"data has {size} bytes on {found.device}: {self.bytes} bytes are here")
        at = ffi.cast("void *", self.address)
        check(lib.kvc_device_download(self.device._handle, found.address, at, size, self.device._stream(stream)))

    def zero(self, *, stream: int | None = None) -> None:
        """Enqueues its zeroing."""
        at = ffi.cast("void *", self.address)
        check(lib.kvc_device_zero(self.device._handle, at, self.bytes, self.device._stream(stream)))


def _free(device: Device, address: Any) -> None:
    check(lib.kvc_device_free(device._handle, address))


def _bytes(found: arrays.Array) -> int:
    sizes: dict[Any, int] = {arrays.F32: 4, arrays.F16: 2, arrays.BF16: 2, "i64": 8, "u8": 1}
    return arrays.count(found.shape) * sizes.get(found.dtype, 4)


class Device:
    """A device that is open: "cuda", or "emu" in builds that have the emulator. `NoKernels` where the
    library has no kernels for it, `NoDevice` where it is not there."""

    def __init__(self, kind: str = "cuda", ordinal: int = 0) -> None:
        out = ffi.new("kvc_device **")
        check(lib.kvc_device_open(names.number(names.DEVICES, kind, "kind"), _structs.uint(ordinal, "ordinal"), out))
        self.kind, self.ordinal = kind, ordinal
        self._handle = out[0]
        self._end = weakref.finalize(self, lib.kvc_device_close, out[0])

    def close(self) -> None:
        """Closes the device. Again does nothing."""
        self._end()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _stream(self, stream: int | None) -> Any:
        if stream is None:
            stream = current_stream(self.ordinal) if self.kind == "cuda" else 0
        return ffi.cast("void *", stream)

    @property
    def name(self) -> str:
        """The device's name."""
        buf = ffi.new("char[]", 256)
        check(lib.kvc_device_name(self._handle, buf, 256))
        return ffi.string(buf).decode()

    def info(self) -> DeviceFacts:
        """What the device is."""
        return _structs.counts(self._handle, lib.kvc_device_info, "kvc_device_facts", DeviceFacts)

    def rates(self) -> DeviceRates:
        """The rates that caches on this device go by, for `choose_cascade(**rates._asdict(), ...)` too.
        `Unsupported` where the driver does not say what they follow from."""
        return _structs.counts(self._handle, lib.kvc_device_rates_read, "kvc_device_rates", DeviceRates)

    def alloc(self, bytes: int) -> DeviceMemory:
        """Device memory, aligned to 256, of no particular content."""
        return DeviceMemory(self, bytes)

    def sync(self, stream: int | None = None) -> None:
        """Waits for everything that is enqueued on the stream."""
        check(lib.kvc_device_sync(self._handle, self._stream(stream)))

    def attend(
        self,
        q: Any,
        k: Any,
        v: Any,
        table: Any,
        kv_lens: Any,
        out: Any,
        *,
        workspace: Any,
        max_kv_tokens: int,
        q_indptr: Any = None,
        max_q_tokens: int = 1,
        layout: str = "HND",
        v_dim: int | None = None,
        causal: bool = True,
        window: int = 0,
        scale: float = 0.0,
        softcap: float = 0.0,
        lse: Any = None,
        sinks: Any = None,
        alibi: Any = None,
        piece_tokens: int = 0,
        planned: bool = False,
        tail_mask: Any = None,
        stream: int | None = None,
    ) -> None:
        """`kernels.attend` for tensors on this GPU, enqueued. `workspace` is a uint8 tensor on it, of
        `attend_workspace_size` bytes; `planned` says that it holds the plan of an earlier call with
        the same lengths. `tail_mask`: see `kvc_device_attend_options`."""
        call = kernels._Call(q, k, v, table, kv_lens, out, q_indptr, layout, v_dim, self.kind)
        call.scoring(causal, window, scale, softcap, lse, sinks, alibi)
        desc, options = self._described(call, workspace, max_q_tokens, max_kv_tokens, piece_tokens, planned, tail_mask)
        check(lib.kvc_device_attend(self._handle, desc, options, self._stream(stream)))

    def _described(
        self,
        call: kernels._Call,
        workspace: Any,
        max_q_tokens: int,
        max_kv_tokens: int,
        piece_tokens: int,
        planned: bool,
        tail_mask: Any = None,
    ) -> tuple[Any, Any]:
        work = arrays.rows(workspace, "workspace", True)
        if work.dtype != "u8" or work.device != self.kind:
            raise ValueError(f"workspace is {arrays.NAMES[work.dtype]} on {work.device}, not u8 on {self.kind}")
        desc = call.desc
        desc.workspace, desc.workspace_bytes = work.address, arrays.count(work.shape)
        options = _structs.options(
            "kvc_device_attend_options",
            max_q_tokens=max_q_tokens,
            max_kv_tokens=max_kv_tokens,
            total_q_tokens=call.q_tokens if desc.q_indptr != ffi.NULL else 0,
            piece_tokens=piece_tokens,
            planned=int(planned),
        )
        if tail_mask is not None:
            mask = kernels._exact(tail_mask, "tail_mask", ("u32", "i32"), self.kind)
            if arrays.count(mask.shape) != call.q_tokens:
                raise ValueError(f"tail_mask has {arrays.count(mask.shape)} words for {call.q_tokens} query tokens")
            options.tail_mask = ffi.cast("uint32_t *", mask.address)
        return desc, options

    def cascade(
        self,
        q: Any,
        k: Any,
        v: Any,
        table: Any,
        kv_lens: Any,
        out: Any,
        segments: Any,
        *,
        workspace: Any,
        max_kv_tokens: int,
        q_indptr: Any = None,
        max_q_tokens: int = 1,
        layout: str = "HND",
        v_dim: int | None = None,
        causal: bool = True,
        scale: float = 0.0,
        softcap: float = 0.0,
        lse: Any = None,
        sinks: Any = None,
        piece_tokens: int = 0,
        planned: bool = False,
        stream: int | None = None,
    ) -> None:
        """`attend` as a cascade: `segments` is int32 `[count, 4]` on this GPU, as `choose_cascade` lists
        them, and `workspace` has `cascade_workspace_size` bytes."""
        call = kernels._Call(q, k, v, table, kv_lens, out, q_indptr, layout, v_dim, self.kind)
        call.scoring(causal, 0, scale, softcap, lse, sinks, None)
        desc, options = self._described(call, workspace, max_q_tokens, max_kv_tokens, piece_tokens, planned)
        found = kernels._exact(segments, "segments", "i32", self.kind)
        if len(found.shape) != 2 or found.shape[1] != 4:
            raise ValueError(f"segments has the shape {found.shape}, not (count, 4)")
        listed = ffi.cast("kvc_device_cascade_segment *", found.address)
        check(lib.kvc_device_cascade(self._handle, desc, options, listed, found.shape[0], self._stream(stream)))

    def merge(
        self, parts: Any, lse: Any, out: Any, *, out_lse: Any = None, sinks: Any = None, stream: int | None = None
    ) -> None:
        """Enqueues the merge of attention over disjoint sets of keys: `parts` `[part, row, head, dim]` and
        f32 `lse` `[part, row, head]` to `out` `[row, head, dim]` and `out_lse` `[row, head]`, all contiguous
        tensors on this GPU, parts and out of f32, f16 or bf16."""
        a, b = arrays.rows(parts, "parts"), arrays.rows(out, "out", True)
        if len(a.shape) != 4 or b.shape != a.shape[1:]:
            raise ValueError(f"parts is (part, row, head, dim) and out (row, head, dim): {a.shape}, {b.shape}")
        for found, name in ((a, "parts"), (b, "out")):
            if found.device != self.kind:
                raise ValueError(f"{name} is on {found.device}, not {self.kind}")
        count, rows, heads, dim = a.shape
        desc = _structs.options(
            "kvc_device_merge_desc",
            count=count,
            rows=rows,
            heads=heads,
            dim=dim,
            part_dtype=kernels._row(a, "parts"),
            out_dtype=kernels._row(b, "out"),
            parts=a.address,
            out=b.address,
        )
        lists: list[tuple[str, Any, tuple[int, ...]]] = [
            ("lse", lse, (count, rows, heads)),
            ("out_lse", out_lse, (rows, heads)),
            ("sinks", sinks, (heads,)),
        ]
        for name, x, shape in lists:
            if x is not None:
                found = kernels._exact(x, name, arrays.F32, self.kind)
                if found.shape != shape:
                    raise ValueError(f"{name} has the shape {found.shape}, not {shape}")
                setattr(desc, name, ffi.cast("float *", found.address))
        check(lib.kvc_device_merge(self._handle, desc, self._stream(stream)))

    def append(
        self,
        k: Any,
        v: Any,
        slots: Any,
        k_rows: Any,
        v_rows: Any,
        *,
        layout: str = "HND",
        positions: Any = None,
        cosines: Any = None,
        sines: Any = None,
        style: str = "halves",
        first_channel: int = 0,
        stream: int | None = None,
    ) -> None:
        """`kernels.append` for tensors on this GPU, enqueued. Keys are rotated by f32 tables `cosines`
        and `sines` `[positions, rotary_dim / 2]` where they are given. `slots` is int64."""
        desc, _keep = kernels.append_description(
            k, v, slots, k_rows, v_rows, layout, None, positions, self.kind
        )
        options = _structs.options(
            "kvc_device_append_options",
            rope_style=names.number(names.ROPE_STYLES, style, "style"),
            first_channel=first_channel,
        )
        if cosines is not None:
            cos, sin = (kernels._exact(x, n, arrays.F32, self.kind) for x, n in ((cosines, "cosines"), (sines, "sines")))
            if len(cos.shape) != 2 or sin.shape != cos.shape or positions is None:
                raise ValueError("cosines and sines are [positions, rotary_dim / 2], and rows have positions")
            options.table_positions, options.rotary_dim = cos.shape[0], 2 * cos.shape[1]
            options.cosines, options.sines = ffi.cast("float *", cos.address), ffi.cast("float *", sin.address)
        check(lib.kvc_device_append(self._handle, desc, options, self._stream(stream)))

    def copy_blocks(
        self,
        pairs: Any,
        from_: int | DeviceMemory,
        to: int | DeviceMemory,
        *,
        block_bytes: int,
        from_blocks: int,
        to_blocks: int,
        stream: int | None = None,
    ) -> None:
        """Enqueues the copying of blocks that lie in one piece each, `block_bytes` long, from one pool to
        another or the same. `pairs` is int32 `[count, 2]` on the device, from and to."""
        list_at, count = self._list(pairs, 2)
        desc = _structs.options(
            "kvc_device_copy_desc",
            count=count,
            run_bytes=block_bytes,
            from_blocks=from_blocks,
            to_blocks=to_blocks,
            list=list_at,
            to=_address(to),
            from_block_stride=block_bytes,
            to_block_stride=block_bytes,
        )
        setattr(desc, "from", _address(from_))
        check(lib.kvc_device_copy(self._handle, desc, self._stream(stream)))

    def zero_blocks(
        self, blocks: Any, to: int | DeviceMemory, *, block_bytes: int, to_blocks: int, stream: int | None = None
    ) -> None:
        """Enqueues the zeroing of blocks, int32 ids on the device."""
        list_at, count = self._list(blocks, 1)
        desc = _structs.options(
            "kvc_device_copy_desc",
            count=count,
            run_bytes=block_bytes,
            to_blocks=to_blocks,
            zero=1,
            list=list_at,
            to=_address(to),
            to_block_stride=block_bytes,
        )
        check(lib.kvc_device_copy(self._handle, desc, self._stream(stream)))

    def _list(self, x: Any, width: int) -> tuple[Any, int]:
        if isinstance(x, DeviceMemory):
            return ffi.cast("void *", x.address), x.bytes // (4 * width)
        found = kernels._exact(x, "blocks", "i32", self.kind)
        return found.address, arrays.count(found.shape) // width


def _address(memory: int | DeviceMemory) -> Any:
    return ffi.cast("void *", memory.address if isinstance(memory, DeviceMemory) else memory)


def _attend_query(sizes: dict[str, Any]) -> tuple[Any, Any]:
    options = _structs.options(
        "kvc_device_attend_options",
        **{name: sizes.pop(name) for name in ("max_q_tokens", "max_kv_tokens", "multiprocessors", "piece_tokens")},
    )
    seqs = sizes.pop("seqs")
    desc = kernels.description(*sizes.values())
    desc.seqs = seqs
    return desc, options


def attend_workspace_size(
    device: Device | None = None,
    *,
    q_heads: int,
    kv_heads: int,
    k_dim: int,
    v_dim: int | None = None,
    block_tokens: int = 16,
    format: str = "bf16",
    v_in_k: bool = False,
    seqs: int = 1,
    max_q_tokens: int = 1,
    max_kv_tokens: int,
    multiprocessors: int = 0,
    piece_tokens: int = 0,
) -> int:
    """Bytes of workspace for `Device.attend` within these sizes. Without a device, say how many
    multiprocessors it has."""
    sizes = {name: value for name, value in locals().items() if name != "device"}
    desc, options = _attend_query(sizes)
    out = ffi.new("uint64_t *")
    handle = ffi.NULL if device is None else device._handle
    check(lib.kvc_device_attend_workspace_size(handle, desc, options, out))
    return out[0]


def cascade_workspace_size(
    segments: int,
    device: Device | None = None,
    *,
    q_heads: int,
    kv_heads: int,
    k_dim: int,
    v_dim: int | None = None,
    block_tokens: int = 16,
    format: str = "bf16",
    v_in_k: bool = False,
    seqs: int = 1,
    max_q_tokens: int = 1,
    max_kv_tokens: int,
    multiprocessors: int = 0,
    piece_tokens: int = 0,
) -> int:
    """Bytes of workspace for `Device.cascade` within these sizes, with a list of so many segments."""
    sizes = {name: value for name, value in locals().items() if name not in ("device", "segments")}
    desc, options = _attend_query(sizes)
    out = ffi.new("uint64_t *")
    handle = ffi.NULL if device is None else device._handle
    check(lib.kvc_device_cascade_workspace_size(handle, desc, options, _structs.uint(segments, "segments"), out))
    return out[0]


def attend_kernel(
    device: Device | None = None,
    *,
    q_heads: int,
    kv_heads: int,
    k_dim: int,
    v_dim: int | None = None,
    block_tokens: int = 16,
    format: str = "bf16",
    v_in_k: bool = False,
    seqs: int = 1,
    max_q_tokens: int = 1,
    max_kv_tokens: int,
    multiprocessors: int = 0,
    piece_tokens: int = 0,
) -> str:
    """The kernel that `Device.attend` would run; `Unsupported` where there is none."""
    sizes = {name: value for name, value in locals().items() if name != "device"}
    desc, options = _attend_query(sizes)
    buf = ffi.new("char[]", 128)
    handle = ffi.NULL if device is None else device._handle
    check(lib.kvc_device_attend_kernel(handle, desc, options, buf, 128))
    return ffi.string(buf).decode()
