"""What a cache counts and times: as numbers, and as Prometheus reads it."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _structs
from ._native import ffi, lib
from .errors import check

# Upper bounds of the histograms' buckets in milliseconds; one more bucket has what is above them all.
BOUNDS_MS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 30000),
    *(60000, 120000, 300000, 600000, 1200000, 1800000),
)


class Histogram(NamedTuple):
    """How often times fell into which bucket of `BOUNDS_MS`, and their sum."""

    counts: tuple[int, ...]
    sum_ms: int


class Metrics(NamedTuple):
    """Everything that a cache counts and times. Block counts are of the first layer group."""

    blocks: int
    referenced_blocks: int
    cached_blocks: int
    sequences: int
    queries_tokens: int
    hits_tokens: int
    evicted_capacity_blocks: int
    evicted_cleared_blocks: int
    out_of_blocks: int
    missing_blocks: int
    out_of_sequences: int
    dropped_events: int
    watched_every: int
    lifetime: Histogram
    idle_before_evict: Histogram
    reuse_gap: Histogram
    evicted_window_blocks: int


def read(cache: Any) -> Metrics:
    """The metrics of a cache's handle."""
    found = _structs.counts(cache, lib.kvc_metrics_read, "kvc_metrics", Metrics)
    times = {}
    for name in ("lifetime", "idle_before_evict", "reuse_gap"):
        part: Any = getattr(found, name)
        times[name] = Histogram(tuple(part.counts), part.sum_ms)
    return found._replace(**times)  # type: ignore[arg-type]


def text(cache: Any) -> str:
    """The metrics of a cache's handle as Prometheus text."""
    length, size = ffi.new("uint64_t *"), 8192
    while True:
        buf = ffi.new("char[]", size)
        check(lib.kvc_metrics_text(cache, buf, size, length))
        if length[0] < size:
            return ffi.string(buf).decode()
        size = length[0] + 256
