"""Rotary position embeddings: of keys on their way into a cache, of queries in place."""

from __future__ import annotations

from typing import Any

from . import _structs, arrays, names
from ._native import ffi, lib
from .errors import check


class Rope:
    """Pairs of channels turned by an angle that grows with the position.

    `style` "halves": channel i with i + rotary_dim / 2 (Llama in Hugging Face's layout, Qwen);
    "interleaved": 2 i with 2 i + 1. `frequencies` are radians a token for each pair, in place of
    `theta`.
    """

    def __init__(
        self,
        rotary_dim: int,
        *,
        theta: float = 10000.0,
        style: str = "halves",
        first_channel: int = 0,
        scale: float = 1.0,
        frequencies: Any = None,
    ) -> None:
        self._frequencies, n = arrays.floats(frequencies, "frequencies")
        if frequencies is not None and n != rotary_dim // 2:
            raise ValueError(f"frequencies has {n} numbers for {rotary_dim // 2} pairs")
        self._keep = frequencies
        self._struct = _structs.options(
            "kvc_rope",
            rotary_dim=rotary_dim,
            theta=theta,
            style=names.number(names.ROPE_STYLES, style, "style"),
            first_channel=first_channel,
            scale=scale,
        )
        self._struct.frequencies = self._frequencies

    def rotate(self, rows: Any, positions: Any) -> None:
        """Rotates f32 `rows[position, head, channel]` in place, each to its position."""
        found = arrays.typed(arrays.rows(rows, "rows", True), "rows", arrays.F32)
        if len(found.shape) != 3:
            raise ValueError(f"rows has the shape {found.shape}, not (positions, heads, channels)")
        at, n = arrays.tokens(positions, "positions")
        if n != found.shape[0]:
            raise ValueError(f"{n} positions for {found.shape[0]} rows")
        _, heads, dim = found.shape
        check(lib.kvc_rope_rotate(self._struct, ffi.cast("float *", found.address), heads, dim, at, n))
