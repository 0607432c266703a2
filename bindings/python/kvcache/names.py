"""Names for the header's numbers: dtypes, formats, devices, policies, hints.

Python callers write words ("bf16", "cuda", "lru"); a word that is not one gets an error that lists
those that are.
"""

from __future__ import annotations

from collections.abc import Mapping

from ._native import lib

DTYPES: Mapping[str, int] = {"f32": lib.KVC_DTYPE_F32, "f16": lib.KVC_DTYPE_F16, "bf16": lib.KVC_DTYPE_BF16}
FORMATS: Mapping[str, int] = {
    "f32": lib.KVC_FORMAT_F32,
    "f16": lib.KVC_FORMAT_F16,
    "bf16": lib.KVC_FORMAT_BF16,
    "fp8_e4m3": lib.KVC_FORMAT_FP8_E4M3,
    "fp8_e5m2": lib.KVC_FORMAT_FP8_E5M2,
    "int8_t": lib.KVC_FORMAT_INT8_T,
    "int4_t": lib.KVC_FORMAT_INT4_T,
    "nvfp4": lib.KVC_FORMAT_NVFP4,
    "kt8v8": lib.KVC_FORMAT_KT8V8,
    "kt4v4": lib.KVC_FORMAT_KT4V4,
    "kt3v3": lib.KVC_FORMAT_KT3V3,
    "kt4v2": lib.KVC_FORMAT_KT4V2,
    "kt2v2": lib.KVC_FORMAT_KT2V2,
}
ROPE_STYLES: Mapping[str, int] = {"halves": lib.KVC_ROPE_HALVES, "interleaved": lib.KVC_ROPE_INTERLEAVED}
DEVICES: Mapping[str, int] = {"cpu": lib.KVC_DEVICE_CPU, "cuda": lib.KVC_DEVICE_CUDA, "emu": lib.KVC_DEVICE_EMU}
EVICTIONS: Mapping[str, int] = {
    "lru": lib.KVC_EVICTION_LRU,
    "lfu": lib.KVC_EVICTION_LFU,
    "fifo": lib.KVC_EVICTION_FIFO,
    "slru": lib.KVC_EVICTION_SLRU,
    "s3fifo": lib.KVC_EVICTION_S3FIFO,
}
HINTS: Mapping[str, int] = {
    "none": lib.KVC_HINT_NONE,
    "ended": lib.KVC_HINT_ENDED,
    "expected": lib.KVC_HINT_EXPECTED,
    "waited": lib.KVC_HINT_WAITED,
}
EVENTS: Mapping[str, int] = {
    "stored": lib.KVC_EVENT_STORED,
    "removed": lib.KVC_EVENT_REMOVED,
    "cleared": lib.KVC_EVENT_CLEARED,
}
MEDIA: Mapping[str, int] = {
    "gpu": lib.KVC_MEDIUM_GPU,
    "cpu": lib.KVC_MEDIUM_CPU,
    "storage": lib.KVC_MEDIUM_STORAGE,
    "external": lib.KVC_MEDIUM_EXTERNAL,
}
ENCODINGS: Mapping[str, int] = {"map": lib.KVC_ENCODING_MAP, "array": lib.KVC_ENCODING_ARRAY}
TIERS: Mapping[str, int] = {"host": lib.KVC_TIER_HOST, "disk": lib.KVC_TIER_DISK, "store": lib.KVC_TIER_STORE}
WHYS: Mapping[str, int] = {
    "nothing_found": lib.KVC_WHY_NOTHING_FOUND,
    "cost_unknown": lib.KVC_WHY_COST_UNKNOWN,
    "rate_unknown": lib.KVC_WHY_RATE_UNKNOWN,
    "load_is_faster": lib.KVC_WHY_LOAD_IS_FASTER,
    "load_is_faster_at_first": lib.KVC_WHY_LOAD_IS_FASTER_AT_FIRST,
    "compute_is_faster": lib.KVC_WHY_COMPUTE_IS_FASTER,
}
LOADS: Mapping[str, int] = {
    "complete": lib.KVC_ONBOARD_COMPLETE,
    "loading": lib.KVC_ONBOARD_LOADING,
    "failed": lib.KVC_ONBOARD_FAILED,
}
MISSED: Mapping[str, int] = {
    "absent": lib.KVC_MISSED_ABSENT,
    "bad": lib.KVC_MISSED_BAD,
    "down": lib.KVC_MISSED_DOWN,
    "cancelled": lib.KVC_MISSED_CANCELLED,
}

# Prefix of the header's constants, table.
TABLES: Mapping[str, Mapping[str, int]] = {
    "KVC_DTYPE_": DTYPES,
    "KVC_FORMAT_": FORMATS,
    "KVC_ROPE_": ROPE_STYLES,
    "KVC_DEVICE_": DEVICES,
    "KVC_EVICTION_": EVICTIONS,
    "KVC_HINT_": HINTS,
    "KVC_EVENT_": EVENTS,
    "KVC_MEDIUM_": MEDIA,
    "KVC_ENCODING_": ENCODINGS,
    "KVC_TIER_": TIERS,
    "KVC_WHY_": WHYS,
    "KVC_ONBOARD_": LOADS,
    "KVC_MISSED_": MISSED,
}


def number(table: Mapping[str, int], word: str, what: str) -> int:
    """The header's number for a word."""
    try:
        return table[word]
    except (KeyError, TypeError):
        raise ValueError(f"{what} cannot be {word!r}: it is one of {', '.join(table)}") from None


def word(table: Mapping[str, int], value: int) -> str:
    """The word for a number of the header."""
    for name, number in table.items():
        if number == value:
            return name
    return str(value)
