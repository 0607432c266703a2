"""Quantised K and V in the caller's own memory: codes with their scales beside them (`Scales`), and
sealed tiles with the raw rows of those that are not sealed yet (`Tiles`). For `attend` and `append`; a
`Cache` of these formats scales and seals by itself.

Everything is checked against the arrays' real sizes before the library sees an address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _structs, arrays
from ._native import ffi, lib
from .arrays import Array
from .errors import check
from .names import FORMATS, number

# Formats of codes: bits of one, bytes of a row's own scales (nvfp4 has one for each 16 channels).
CODES = {"fp8_e4m3": (8, 0), "fp8_e5m2": (8, 0), "int8_t": (8, 2), "int4_t": (4, 4), "nvfp4": (4, 0)}


def code_bytes(format: str, dim: int) -> int:
    """Bytes of a row of codes of `dim` channels."""
    if format not in CODES:
        raise ValueError(f"format cannot be {format!r}: codes are {', '.join(CODES)}")
    return -(-dim * CODES[format][0] // 128) * 16


def scale_bytes(format: str, dim: int, parts: int = 1) -> int:
    """Bytes of the scales of one row of codes; 0 where a head has one scale."""
    return dim // 16 if format == "nvfp4" else CODES[format][1] * parts


class Scales:
    """Where the scales of quantised rows are.

    `k` and `v` are uint8 `[block, kv_head, token, bytes]`, or in the order of the call's layout: a
    float16 scale of int8_t (2 bytes), a float16 scale and minimum of int4_t (4), an e4m3 for 16 channels
    of nvfp4 (k_dim / 16). `k_heads` and `v_heads` are float32 `[kv_heads]`, one scale for all of a head
    (fp8, nvfp4); None for 1. `k_rotated` False: keys of int8_t are as they were given.
    """

    def __init__(
        self, *, k: Any = None, v: Any = None, k_heads: Any = None, v_heads: Any = None, k_rotated: bool = True
    ) -> None:
        self.k, self.v, self.k_heads, self.v_heads, self.k_rotated = k, v, k_heads, v_heads, k_rotated

    def put(self, desc: Any, format: str, keys: tuple[int, ...], parts: int, blocks: Any) -> list[Any]:
        """Lets a desc of these codes point here; what must live as long. `keys` is (block, kv_head,
        token) of the codes, `blocks` reads an array as blocks of whole rows."""
        struct = _structs.options("kvc_scales", k_unrotated=int(not self.k_rotated))
        keep: list[Any] = [struct]
        sides = [("k", self.k, desc.k_dim, parts), ("v", self.v, desc.v_dim, 1)]
        for name, x, dim, n in sides[: 1 if desc.v_in_k else 2]:
            width = scale_bytes(format, dim, n)
            if (x is not None) != (width != 0):
                raise ValueError(f"{format} has {width} bytes of scales a row: scales.{name} is {'missing' if width else 'not for it'}")
            if x is not None:
                found = blocks(x, f"scales.{name}")
                if found.dtype != "u8" or found.shape != (*keys, width):
                    raise ValueError(f"scales.{name} has the shape {found.shape}, not uint8 {(*keys, width)}")
                setattr(struct, name, found.address)
                for part, stride in zip(("block", "head", "token"), found.strides):
                    setattr(struct, f"{name}_{part}_stride", stride)
                keep.append(found)
        for name, x in (("k_heads", self.k_heads), ("v_heads", self.v_heads)):
            if x is not None:
                pointer, given = arrays.floats(x, f"scales.{name}")
                if given != keys[1]:
                    raise ValueError(f"scales.{name} has {given} numbers for {keys[1]} heads")
                setattr(struct, name, pointer)
                keep += [pointer, x]
        desc.scales = struct
        return keep


class Tiles:
    """The sealed tiles of one layer (formats kt*), and the raw rows of those that are not sealed.

    A query reads the tile that it is in raw, and every tile before that sealed. `records` is uint8
    `[block, kv_head, record_bytes]`, 16-byte aligned, strides multiples of 16. `staging`, and `scratch`
    where a step fills whole tiles, are `[raw block, elements]` of bfloat16 (or of twice as many uint8):
    `[kv_head, token, k_dim]` keys and then `[kv_head, token, v_dim]` values. Raw slot s is block s of
    staging, or past its end block s - len(staging) of scratch.
    """

    def __init__(
        self,
        records: Any,
        staging: Any,
        *,
        kv_heads: int,
        k_dim: int,
        v_dim: int | None = None,
        v_in_k: bool = False,
        format: str = "kt4v4",
        block_tokens: int = 64,
        scratch: Any = None,
    ) -> None:
        width = k_dim if v_dim is None else v_dim
        self.kv_heads, self.k_dim, self.v_dim, self.v_in_k = kv_heads, k_dim, width, v_in_k
        self.format, self.block_tokens = number(FORMATS, format, "format"), block_tokens
        size = self.record_bytes(
            kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim, v_in_k=v_in_k, format=format, block_tokens=block_tokens
        )
        found = _memory(records, "records", ("u8",))
        if len(found.shape) != 3 or found.shape[1:] != (kv_heads, size):
            raise ValueError(f"records has the shape {found.shape}, not (blocks, {kv_heads}, {size})")
        self.num_blocks = found.shape[0]
        self._view = view = _structs.options("kvc_tile_view")
        view.records, view.block_bytes, view.head_bytes = found.address, found.strides[0], found.strides[1]
        elements = kv_heads * block_tokens * (k_dim + (0 if v_in_k else width))
        self._keep = [found]
        for name, x, blocks, stride in (
            ("staging", staging, "staging_blocks", "staging_block_bytes"),
            ("scratch", scratch, "scratch_blocks", "scratch_block_bytes"),
        ):
            if x is None:
                continue
            raw = _memory(x, name, (arrays.BF16, "u8"))
            unit = 2 if raw.dtype == arrays.BF16 else 1
            if len(raw.shape) != 2 or raw.shape[1] * unit != elements * 2:
                raise ValueError(f"{name} has the shape {raw.shape}, not (raw blocks, {elements * 2 // unit})")
            setattr(view, name, raw.address)
            setattr(view, blocks, raw.shape[0])
            setattr(view, stride, raw.strides[0] * unit)
            self._keep.append(raw)

    @staticmethod
    def record_bytes(
        *,
        kv_heads: int,
        k_dim: int,
        v_dim: int | None = None,
        v_in_k: bool = False,
        format: str = "kt4v4",
        block_tokens: int = 64,
    ) -> int:
        """Bytes of the record of one tile and KV head."""
        width = k_dim if v_dim is None else v_dim
        desc = _seal_desc(kv_heads, k_dim, width, v_in_k, number(FORMATS, format, "format"), block_tokens)
        out = ffi.new("uint64_t *")
        check(lib.kvc_seal_record_size(desc, out))
        return out[0]

    def seal(self, slots: Any, blocks: Any, threads: int = 1) -> list[bool]:
        """Seals full raw tiles: the rows of `slots[i]` into block `blocks[i]`, all heads. Says for each
        whether it was refused (NaN, infinity, scales past float16): then it is to be read raw still."""
        froms, count = arrays.block_ids(slots, "slots")
        to, given = arrays.block_ids(blocks)
        if count != given:
            raise ValueError(f"{count} slots and {given} blocks")
        listed = ffi.new("kvc_seal_tile[]", [(froms[i], to[i]) for i in range(count)])
        refused = ffi.new("uint32_t[]", count)
        desc = _seal_desc(self.kv_heads, self.k_dim, self.v_dim, self.v_in_k, self.format, self.block_tokens)
        desc.num_blocks, desc.count, desc.threads = self.num_blocks, count, _structs.uint(threads, "threads")
        desc.tiles, desc.list, desc.refused = self._view, listed, refused
        check(lib.kvc_seal(desc))
        return [flag != 0 for flag in refused]

    def put(self, desc: Any, raw: Sequence[Sequence[tuple[int, int]]] | None, seqs: int) -> list[Any]:
        """Lets a kvc_attend_desc point here; what must live as long."""
        if raw is None or len(raw) != seqs:
            raise ValueError(f"raw must say for each of {seqs} sequences which tiles are raw, and in which slots")
        # Calls may run side by side: each has its view.
        view = ffi.new("kvc_tile_view *", self._view[0])
        pairs = ffi.new("kvc_raw_block[]", [pair for tiles in raw for pair in tiles])
        ends = [0]
        for tiles in raw:
            ends.append(ends[-1] + len(tiles))
        indptr = ffi.new("int32_t[]", ends)
        view.raw_indptr, view.raw_blocks, desc.tiles = indptr, pairs, view
        return [self, view, pairs, indptr]


def _seal_desc(kv_heads: int, k_dim: int, v_dim: int, v_in_k: bool, format: int, block_tokens: int) -> Any:
    """A `kvc_seal_desc` of sizes alone."""
    return _structs.options(
        "kvc_seal_desc",
        kv_heads=kv_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        v_in_k=int(v_in_k),
        format=format,
        block_tokens=block_tokens,
    )


def _memory(x: Any, name: str, dtypes: tuple[Any, ...]) -> Array:
    """An array on the CPU that is written, its last dimension without gaps."""
    found = arrays.array(x, name)
    if found.dtype not in dtypes:
        raise TypeError(f"{name} has elements of type {arrays.NAMES[found.dtype]}, not {arrays.NAMES[dtypes[0]]}")
    if found.device != arrays.CPU:
        raise ValueError(f"{name} is on {found.device}, not on the CPU")
    if not found.writable:
        raise ValueError(f"{name} is read-only and would be written")
    if not found.shape or (found.strides[-1] != 1 and found.shape[-1] != 1) or min(found.strides) < 0:
        raise ValueError(f"{name} has the strides {found.strides}: rows must be without gaps")
    return found
