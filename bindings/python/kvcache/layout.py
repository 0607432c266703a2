"""What a cache's layers look like, and how much memory they take.

`GroupSpec` is the header's `kvc_group_spec`; `plan` is its planner.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _structs
from ._native import ffi, lib
from .errors import check
from .names import FORMATS, number


@dataclass(frozen=True)
class GroupSpec:
    """Layers that share a geometry, a format and a window. A uniform model has one group.

    `v_dim` is `k_dim` where it is not given. `v_in_k`: values are the first `v_dim` channels of the
    keys (latent attention). `window` in tokens, the query's own included; 0 for full attention.
    `sink_tokens`: of sealed tiles, the first tokens of every sequence that stay raw, whole blocks.
    """

    layers: int
    kv_heads: int
    k_dim: int
    v_dim: int | None = None
    format: str = "bf16"
    window: int = 0
    v_in_k: bool = False
    sink_tokens: int = 0


def groups_array(groups: GroupSpec | Iterable[GroupSpec]) -> Any:
    """A `kvc_group_spec[]`."""
    listed = [groups] if isinstance(groups, GroupSpec) else list(groups)
    out = ffi.new("kvc_group_spec[]", len(listed))
    for struct, group in zip(out, listed):
        check(lib.kvc_group_spec_init(ffi.addressof(struct), ffi.sizeof("kvc_group_spec")))
        _structs.assign(struct, "layers", group.layers)
        _structs.assign(struct, "kv_heads", group.kv_heads)
        _structs.assign(struct, "k_dim", group.k_dim)
        _structs.assign(struct, "v_dim", group.k_dim if group.v_dim is None else group.v_dim)
        _structs.assign(struct, "window", group.window)
        _structs.assign(struct, "sink_tokens", group.sink_tokens)
        struct.format = number(FORMATS, group.format, "format")
        struct.v_in_k = int(group.v_in_k)
    return out


class PlanGroup(NamedTuple):
    """One layer group's part of a plan."""

    token_bytes: int
    block_bytes: int
    sequence_blocks: int
    blocks: int


class Plan(NamedTuple):
    """What a budget holds. `max_context_tokens` is 2^64 - 1 where any length fits."""

    kv_bytes: int
    token_bytes: int
    sequence_bytes: int
    batch_bytes: int
    max_batch: int
    max_context_tokens: int
    fits: bool
    groups: tuple[PlanGroup, ...]


def plan(
    groups: GroupSpec | Iterable[GroupSpec],
    *,
    memory_bytes: int,
    context_tokens: int,
    weight_bytes: int = 0,
    batch: int = 1,
    block_tokens: int = 16,
    reserve_ppm: int = 100_000,
) -> Plan:
    """How much memory a cache takes, and what fits. `reserve_ppm` is the share of the memory that is
    left to activations, in millionths."""
    specs = groups_array(groups)
    options = _structs.options(
        "kvc_plan_options",
        block_tokens=block_tokens,
        reserve_ppm=reserve_ppm,
        memory_bytes=memory_bytes,
        weight_bytes=weight_bytes,
        context_tokens=context_tokens,
        batch=batch,
    )
    out = ffi.new("kvc_plan_result *")
    parts = ffi.new("kvc_plan_group[]", len(specs))
    check(lib.kvc_plan_compute(options, specs, len(specs), out, ffi.sizeof("kvc_plan_result"), parts))
    return Plan(
        out.kv_bytes,
        out.token_bytes,
        out.sequence_bytes,
        out.batch_bytes,
        out.max_batch,
        out.max_context_tokens,
        bool(out.fits),
        tuple(_structs.record(part, PlanGroup) for part in parts),
    )
