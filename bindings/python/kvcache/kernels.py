"""The kernels alone, on the caller's own tensors: attention over block tables, and the writing of new
keys and values. For engines that keep K and V themselves; a `Cache` does both for its own.

K and V are tensors of blocks, `[block, kv_head, token, channel]` with layout "HND" or
`[block, token, kv_head, channel]` with "NHD"; any strides, but channels side by side. Of a quantised
`format` they are uint8 rows of codes, with `Scales`, or sealed `Tiles` in the place of both. Everything is
checked against the tensors' real sizes before the library sees an address.
"""

from __future__ import annotations

from typing import Any

from . import _structs, arrays
from ._native import ffi, lib
from .arrays import Array
from .errors import check
from .names import FORMATS, number
from .quantised import CODES, Scales, Tiles, code_bytes
from .rope import Rope

_FORMATS = {arrays.F32: lib.KVC_FORMAT_F32, arrays.F16: lib.KVC_FORMAT_F16, arrays.BF16: lib.KVC_FORMAT_BF16}


def attend(
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    kv_lens: Any,
    out: Any,
    *,
    q_indptr: Any = None,
    layout: str = "HND",
    v_dim: int | None = None,
    format: str | None = None,
    scales: Scales | None = None,
    raw: Any = None,
    causal: bool = True,
    window: int = 0,
    scale: float = 0.0,
    softcap: float = 0.0,
    lse: Any = None,
    sinks: Any = None,
    alibi: Any = None,
    threads: int = 1,
    workspace: Any = None,
) -> None:
    """Attention for a ragged batch, on the CPU: decode, chunked prefill and latent attention alike.

    `q` is `[query token, q_head, k_dim]`, `out` `[query token, q_head, v_dim]`, written. `table` is
    int32 `[seqs, blocks]`, `kv_lens` int32 `[seqs]` cached tokens, those of the queries included.
    `q_indptr` int32 `[seqs + 1]`: sequence s has the query tokens from q_indptr[s] on; None for one
    each. `v` is None where values are the first `v_dim` channels of the keys. `workspace`, bytes of
    at least `workspace_size`, is made for the call where it is not given. `threads` 0 is one a core.

    With a `format` of codes (fp8_e4m3, fp8_e5m2, int8_t, int4_t, nvfp4) `k` and `v` are uint8, a row
    `code_bytes` of its channels, and `scales` says where theirs are. With sealed tiles `k` is a `Tiles`,
    `v` None, and `raw` has for each sequence the tiles that are read raw, as pairs of tile and raw slot,
    ascending: all that hold its queries, and every one before that was refused or not sealed yet.
    """
    call = _Call(q, k, v, table, kv_lens, out, q_indptr, layout, v_dim, "cpu", format, scales, raw)
    call.scoring(causal, window, scale, softcap, lse, sinks, alibi)
    desc = call.desc
    desc.threads = threads
    if workspace is None:
        size = call.workspace_bytes()
        work = ffi.new("uint8_t[]", size + 64)
        at = int(ffi.cast("uintptr_t", work))
        desc.workspace = ffi.cast("void *", -(-at // 64) * 64)
        desc.workspace_bytes = size
    else:
        found = arrays.rows(workspace, "workspace", True)
        arrays.typed(found, "workspace", "u8")
        desc.workspace, desc.workspace_bytes = found.address, arrays.count(found.shape)
    check(lib.kvc_attend(desc))


def workspace_size(
    *,
    q_heads: int,
    kv_heads: int,
    k_dim: int,
    v_dim: int | None = None,
    seqs: int,
    max_q_tokens: int,
    max_kv_tokens: int,
    block_tokens: int = 16,
    format: str = "bf16",
    threads: int = 1,
    v_in_k: bool = False,
) -> int:
    """Bytes of workspace that are enough for every call within these sizes."""
    desc = description(q_heads, kv_heads, k_dim, v_dim, block_tokens, format, v_in_k)
    desc.seqs, desc.threads = seqs, threads
    out = ffi.new("uint64_t *")
    check(lib.kvc_attend_workspace_size(desc, max_q_tokens, max_kv_tokens, out))
    return out[0]


def kernel_name(
    *,
    q_heads: int,
    kv_heads: int,
    k_dim: int,
    v_dim: int | None = None,
    q_tokens: int = 1,
    block_tokens: int = 16,
    format: str = "bf16",
    v_in_k: bool = False,
) -> str:
    """The kernel that `attend` would run for a sequence of so many query tokens."""
    desc = description(q_heads, kv_heads, k_dim, v_dim, block_tokens, format, v_in_k)
    buf = ffi.new("char[]", 128)
    check(lib.kvc_attend_kernel(desc, q_tokens, buf, 128))
    return ffi.string(buf).decode()


def description(
    q_heads: int, kv_heads: int, k_dim: int, v_dim: int | None, block_tokens: int, format: str, v_in_k: bool
) -> Any:
    """A `kvc_attend_desc` of sizes alone."""
    return _structs.options(
        "kvc_attend_desc",
        q_heads=q_heads,
        kv_heads=kv_heads,
        k_dim=k_dim,
        v_dim=k_dim if v_dim is None else v_dim,
        block_tokens=block_tokens,
        format=number(FORMATS, format, "format"),
        v_in_k=int(v_in_k),
        seqs=1,
        num_blocks=1,
    )


def merge_states(out: Any, lse: Any, other: Any, other_lse: Any) -> None:
    """Merges attention over two disjoint sets of keys, row by row, into the first: f32 `out` and
    `other` `[..., v_dim]`, `lse` and `other_lse` one number a row."""
    a = arrays.typed(arrays.rows(out, "out", True), "out", arrays.F32)
    b = arrays.typed(arrays.rows(other, "other"), "other", arrays.F32)
    if a.shape != b.shape or not a.shape:
        raise ValueError(f"out has the shape {a.shape}, other {b.shape}")
    n = arrays.count(a.shape[:-1])
    lses = []
    for x, name, written in ((lse, "lse", True), (other_lse, "other_lse", False)):
        found = arrays.typed(arrays.rows(x, name, written), name, arrays.F32)
        if arrays.count(found.shape) != n:
            raise ValueError(f"{name} has {arrays.count(found.shape)} numbers for {n} rows")
        lses.append(ffi.cast("float *", found.address))
    pointer = "float *"
    check(
        lib.kvc_merge_states(
            ffi.cast(pointer, a.address), lses[0], ffi.cast(pointer, b.address), lses[1], n, a.shape[-1]
        )
    )


def append(
    k: Any,
    v: Any,
    slots: Any,
    k_rows: Any,
    v_rows: Any,
    *,
    layout: str = "HND",
    format: str | None = None,
    scales: Scales | None = None,
    rope: Rope | None = None,
    positions: Any = None,
    threads: int = 1,
) -> None:
    """Writes new keys and values to their slots, `block * block_tokens + offset`; -1 skips a row.

    `k_rows` is `[row, kv_head, k_dim]`, `v_rows` `[row, kv_head, v_dim]`; `k` and `v` are written. With
    `rope` keys are rotated to `positions` on the way. `v` and `v_rows` are None for latent attention.
    With a `format` of codes `k` and `v` are uint8, as for `attend`, and what `scales` has is written.
    """
    desc, _keep = append_description(k, v, slots, k_rows, v_rows, layout, rope, positions, "cpu", format, scales)
    desc.threads = threads
    check(lib.kvc_append(desc))


def append_description(
    k: Any,
    v: Any,
    slots: Any,
    k_rows: Any,
    v_rows: Any,
    layout: str,
    rope: Any,
    positions: Any,
    device: str,
    format: str | None = None,
    scales: Scales | None = None,
) -> tuple[Any, Any]:
    """A `kvc_append_desc` of tensors on `device`, and what must live until it was used."""
    keys = _blocks(k, "k", layout, True, device)
    rows = _rows(k_rows, "k_rows", device)
    blocks, heads, block_tokens, _ = keys.shape
    n, k_dim = rows.shape[0], rows.shape[2]
    if rows.shape[1] != heads:
        raise ValueError(f"k_rows has the shape {rows.shape}, k {heads} heads")
    desc = _structs.options(
        "kvc_append_desc",
        kv_heads=heads,
        k_dim=k_dim,
        v_dim=k_dim,
        v_in_k=int(v is None),
        format=_format(keys, "k", k_dim, format),
        dtype=_row(rows, "k_rows"),
        block_tokens=block_tokens,
        num_blocks=blocks,
        rows=n,
    )
    _strides(desc, "k", keys)
    desc.k_rows, desc.k_rows_token_stride, desc.k_rows_head_stride = rows.address, rows.strides[0], rows.strides[1]
    keep: list[Any] = [keys, rows]
    if v is not None:
        values, v_new = _blocks(v, "v", layout, True, device), _rows(v_rows, "v_rows", device)
        _like(values, keys)
        if v_new.shape[:2] != (n, heads) or v_new.dtype != rows.dtype:
            raise ValueError(f"v_rows has the shape {v_new.shape}, or another element type than k_rows")
        desc.v_dim = v_new.shape[2]
        _format(values, "v", v_new.shape[2], format)
        _strides(desc, "v", values)
        desc.v_rows, desc.v_rows_token_stride = v_new.address, v_new.strides[0]
        desc.v_rows_head_stride = v_new.strides[1]
        keep += [values, v_new]
    if format in CODES:
        keep += _scales(desc, scales, str(format), keys, 1, layout, True, device)
    if device == "cpu":
        at, count = arrays.slots(slots)
        places, given = arrays.tokens(positions, "positions") if rope is not None else (ffi.NULL, n)
    else:
        found = _exact(slots, "slots", "i64", device)
        at, count = ffi.cast("int64_t *", found.address), arrays.count(found.shape)
        places, given = ffi.NULL, n
        keep.append(found)
        if positions is not None:
            found = _exact(positions, "positions", ("u32", "i32"), device)
            places, given = ffi.cast("uint32_t *", found.address), arrays.count(found.shape)
            keep.append(found)
    if count != n or given != n:
        raise ValueError(f"{count} slots and {given} positions for {n} rows")
    desc.slots, desc.positions = at, places
    if rope is not None:
        desc.rope = rope._struct
    return desc, (keep, at, places, rope)


class _Call:
    """A `kvc_attend_desc` of tensors, checked against their sizes."""

    def __init__(
        self,
        q: Any,
        k: Any,
        v: Any,
        table: Any,
        kv_lens: Any,
        out: Any,
        q_indptr: Any,
        layout: str,
        v_dim: int | None,
        device: str = "cpu",
        format: str | None = None,
        scales: Scales | None = None,
        raw: Any = None,
    ) -> None:
        self.device = device
        query, to = _rows(q, "q", device), _rows(out, "out", device, True)
        self.q_tokens, q_heads, k_dim = query.shape
        self.keep: list[Any] = [query, to]
        keys = values = None
        if isinstance(k, Tiles):
            if v is not None or format is not None or scales is not None:
                raise ValueError("tiles have their values, format and scales: v, format and scales must be None")
            if query.shape[2] != k.k_dim:
                raise ValueError(f"q has rows of {query.shape[2]} channels, the tiles of {k.k_dim}")
            blocks, kv_heads, block_tokens = k.num_blocks, k.kv_heads, k.block_tokens
            width, number_of_format, v_in_k = k.v_dim, k.format, k.v_in_k
        else:
            keys = _blocks(k, "k", layout, False, device)
            blocks, kv_heads, block_tokens, _ = keys.shape
            number_of_format, v_in_k = _format(keys, "k", k_dim, format), v is None
            self.keep.append(keys)
            if v is None:
                width = k_dim if v_dim is None else v_dim
            else:
                values = _blocks(v, "v", layout, False, device)
                _like(values, keys)
                width = to.shape[2]
                _format(values, "v", width, format)
                self.keep.append(values)
        if to.shape != (self.q_tokens, q_heads, width):
            raise ValueError(f"out has the shape {to.shape}, not {(self.q_tokens, q_heads, width)}")
        tables, lens = _exact(table, "table", "i32", device), _exact(kv_lens, "kv_lens", "i32", device)
        if len(tables.shape) != 2 or lens.shape != (tables.shape[0],):
            raise ValueError(f"table has the shape {tables.shape} and kv_lens {lens.shape}, not (seqs, blocks) and (seqs,)")
        self.seqs, self.q_heads = tables.shape[0], q_heads
        self.max_kv = tables.shape[1] * block_tokens
        if device == "cpu":
            # A longer one would be read past the table's end.
            longest = max(ffi.unpack(ffi.cast("int32_t *", lens.address), self.seqs), default=0)
            if longest > self.max_kv:
                raise ValueError(f"a sequence has {longest} tokens, its row of the table is good for {self.max_kv}")
        self.desc = desc = _structs.options(
            "kvc_attend_desc",
            q_heads=q_heads,
            kv_heads=kv_heads,
            k_dim=k_dim,
            v_dim=width,
            v_in_k=int(v_in_k),
            format=number_of_format,
            q_dtype=_row(query, "q"),
            out_dtype=_row(to, "out"),
            block_tokens=block_tokens,
            num_blocks=blocks,
            seqs=self.seqs,
        )
        if isinstance(k, Tiles):
            self.keep += k.put(desc, raw, self.seqs)
        if keys is not None:
            _strides(desc, "k", keys)
            if format in CODES:
                parts = 2 if v is None and width < k_dim else 1
                self.keep += _scales(desc, scales, str(format), keys, parts, layout, False, device)
        if values is not None:
            _strides(desc, "v", values)
        desc.table, desc.table_stride = ffi.cast("int32_t *", tables.address), tables.strides[0]
        desc.kv_lens = ffi.cast("int32_t *", lens.address)
        desc.q, desc.q_token_stride, desc.q_head_stride = query.address, query.strides[0], query.strides[1]
        desc.out, desc.out_token_stride, desc.out_head_stride = to.address, to.strides[0], to.strides[1]
        self.keep += [tables, lens]
        self._queries(q_indptr)

    def _queries(self, q_indptr: Any) -> None:
        if q_indptr is not None:
            found = _exact(q_indptr, "q_indptr", "i32", self.device)
            if found.shape != (self.seqs + 1,):
                raise ValueError(f"q_indptr has the shape {found.shape}, not ({self.seqs + 1},)")
            indptr = ffi.cast("int32_t *", found.address)
            self.keep.append(found)
            if self.device == "cpu" and indptr[self.seqs] > self.q_tokens:
                raise ValueError(f"q_indptr ends at {indptr[self.seqs]}, q has {self.q_tokens} tokens")
        elif self.device == "cpu":
            if self.q_tokens != self.seqs:
                raise ValueError(f"{self.q_tokens} query tokens for {self.seqs} sequences: give q_indptr")
            indptr = ffi.new("int32_t[]", list(range(self.seqs + 1)))
        else:
            if self.seqs == 0 or self.q_tokens % self.seqs:
                raise ValueError(f"{self.q_tokens} query tokens for {self.seqs} sequences: give q_indptr")
            indptr = ffi.NULL
        self.desc.q_indptr = indptr
        self.keep.append(indptr)

    def scoring(
        self, causal: bool, window: int, scale: float, softcap: float, lse: Any, sinks: Any, alibi: Any
    ) -> None:
        desc, device = self.desc, self.device
        desc.causal, desc.window, desc.scale, desc.softcap = int(causal), window, scale, softcap
        shapes = {"lse": (self.q_tokens, self.q_heads), "sinks": (self.q_heads,), "alibi": (self.q_heads,)}
        for name, x in (("lse", lse), ("sinks", sinks), ("alibi", alibi)):
            if x is not None:
                found = _exact(x, name, arrays.F32, device, name == "lse")
                if found.shape != shapes[name]:
                    raise ValueError(f"{name} has the shape {found.shape}, not {shapes[name]}")
                setattr(desc, name, ffi.cast("float *", found.address))
                self.keep.append(found)

    def workspace_bytes(self) -> int:
        out = ffi.new("uint64_t *")
        check(lib.kvc_attend_workspace_size(self.desc, self.q_tokens, self.max_kv, out))
        return out[0]


def _blocks(x: Any, name: str, layout: str, writable: bool, device: str) -> Array:
    """A tensor of blocks with its dimensions in the order block, head, token, channel."""
    if layout not in ("HND", "NHD"):
        raise ValueError(f"layout cannot be {layout!r}: it is HND or NHD")
    found = arrays.array(x, name)
    _at(found, name, device)
    if len(found.shape) != 4 or (found.strides[3] != 1 and found.shape[3] != 1):
        raise ValueError(f"{name} has the shape {found.shape} and strides {found.strides}: not blocks of whole rows")
    if any(stride < 0 for stride in found.strides):
        raise ValueError(f"{name} has negative strides")
    if writable and not found.writable:
        raise ValueError(f"{name} is read-only and would be written")
    if layout == "NHD":
        (a, b, c, d), (e, f, g, h) = found.shape, found.strides
        found = found._replace(shape=(a, c, b, d), strides=(e, g, f, h))
    return found


def _rows(x: Any, name: str, device: str, writable: bool = False) -> Array:
    """`[token, head, channel]` with channels side by side."""
    found = arrays.array(x, name)
    _at(found, name, device)
    if len(found.shape) != 3 or (found.strides[2] != 1 and found.shape[2] != 1) or min(found.strides) < 0:
        raise ValueError(f"{name} has the shape {found.shape} and strides {found.strides}: not (token, head, channel)")
    if writable and not found.writable:
        raise ValueError(f"{name} is read-only and would be written")
    return found


def _exact(x: Any, name: str, dtype: Any, device: str, writable: bool = False) -> Array:
    found = arrays.rows(x, name, writable)
    wanted = dtype if isinstance(dtype, tuple) else (dtype,)
    if found.dtype not in wanted:
        raise TypeError(f"{name} has elements of type {arrays.NAMES[found.dtype]}, not {arrays.NAMES[wanted[0]]}")
    _at(found, name, device)
    return found


def _at(found: Array, name: str, device: str) -> None:
    if found.device != device:
        raise ValueError(f"{name} is on {found.device}, this call is for {device}")


def _format(found: Array, name: str, dim: int, format: str | None) -> int:
    """The format of blocks, whose rows must have `dim` channels in it."""
    if format in CODES:
        kind, width = "u8", code_bytes(str(format), dim)
    elif found.dtype not in _FORMATS:
        raise TypeError(
            f"{name} has elements of type {arrays.NAMES[found.dtype]}: blocks are f32, f16 or bf16, or of a format of codes"
        )
    else:
        kind, width = found.dtype, dim
    if found.dtype != kind or found.shape[3] != width:
        raise ValueError(
            f"{name} has the shape {found.shape} of {arrays.NAMES[found.dtype]}, not rows of {width} {arrays.NAMES[kind]}"
        )
    made = _FORMATS[kind] if kind != "u8" else number(FORMATS, str(format), "format")
    if format is not None and made != number(FORMATS, format, "format"):
        raise ValueError(f"{name} has elements of type {arrays.NAMES[kind]}, the format is {format}")
    return made


def _like(values: Array, keys: Array) -> None:
    if values.shape[:3] != keys.shape[:3] or values.dtype != keys.dtype:
        raise ValueError(f"v has the shape {values.shape}, k {keys.shape}, or another element type")


def _scales(
    desc: Any, scales: Scales | None, format: str, keys: Array, parts: int, layout: str, written: bool, device: str
) -> list[Any]:
    if device != "cpu":
        raise ValueError("scales are on the CPU here")
    return (scales or Scales()).put(
        desc, format, keys.shape[:3], parts, lambda x, name: _blocks(x, name, layout, written, device)
    )


def _row(found: Array, name: str) -> int:
    if type(found.dtype) is not int:
        raise TypeError(f"{name} has elements of type {found.dtype}: rows are f32, f16 or bf16")
    return found.dtype


def _strides(desc: Any, name: str, found: Array) -> None:
    setattr(desc, name, found.address)
    for part, stride in zip(("block", "head", "token"), found.strides):
        setattr(desc, f"{name}_{part}_stride", stride)
