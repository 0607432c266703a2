"""Quantised K and V in the caller's own memory: codes with scales, and sealed tiles."""

import numpy as np
import pytest

import kvcache
from kvcache import Scales, Tiles

HEADS, Q_HEADS, DIM, TOKENS, BLOCKS = 2, 4, 64, 32, 4


def softmax_attention(q, keys, values):
    """`q` [q_head, channel], keys and values [token, kv_head, channel], in double."""
    out = np.empty((Q_HEADS, values.shape[2]))
    for head in range(Q_HEADS):
        of = head // (Q_HEADS // HEADS)
        scores = keys[:, of].astype(np.float64) @ q[head] / np.sqrt(keys.shape[2])
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[:, of] / weights.sum()
    return out


def rows(n, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal((n, HEADS, DIM), dtype=np.float32) for _ in range(2)]


def codes_of(format, layout, heads=None):
    """Empty blocks and scales of a format."""
    order = (BLOCKS, HEADS, TOKENS) if layout == "HND" else (BLOCKS, TOKENS, HEADS)
    k, v = (np.zeros((*order, kvcache.code_bytes(format, DIM)), np.uint8) for _ in range(2))
    width = kvcache.scale_bytes(format, DIM)
    sides = {side: np.zeros((*order, width), np.uint8) for side in "kv"} if width else {}
    if heads is not None:
        sides |= {"k_heads": heads, "v_heads": heads}
    return k, v, Scales(**sides)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(
    "format, tolerance",
    [("fp8_e4m3", 0.06), ("fp8_e5m2", 0.12), ("int8_t", 0.02), ("int4_t", 0.3), ("nvfp4", 0.4)],
)
def test_codes_are_appended_and_read(format, layout, tolerance):
    n = TOKENS * 2 + 7
    k_rows, v_rows = rows(n)
    heads = np.full(HEADS, 0.02, np.float32) if format in ("fp8_e4m3", "nvfp4") else None
    k, v, scales = codes_of(format, layout, heads)
    table = np.array([[2, 0, 3]], np.int32)
    slots = [int(table[0, t // TOKENS]) * TOKENS + t % TOKENS for t in range(n)]
    kvcache.append(k, v, slots, k_rows, v_rows, layout=layout, format=format, scales=scales)
    q = np.random.default_rng(1).standard_normal((1, Q_HEADS, DIM), dtype=np.float32)
    out = np.empty_like(q)
    kvcache.attend(q, k, v, table, np.array([n], np.int32), out, layout=layout, format=format, scales=scales)
    assert np.abs(out[0] - softmax_attention(q[0], k_rows, v_rows)).max() < tolerance
    # The other blocks were left alone.
    assert not k[1].any() and not v[1].any()


def test_what_does_not_fit_a_format_is_refused():
    k_rows, v_rows = rows(2)
    k, v, scales = codes_of("int8_t", "HND")

    def append(error, match, k=k, v=v, **changes):
        with pytest.raises(error, match=match):
            kvcache.append(k, v, [0, 1], k_rows, v_rows, **({"format": "int8_t", "scales": scales} | changes))

    append(ValueError, "scales.k is missing", scales=None)
    append(ValueError, "scales.v is missing", scales=Scales(k=scales.k))
    append(ValueError, "scales.k has the shape", scales=Scales(k=scales.k[:2], v=scales.v))
    append(ValueError, "scales.k is not for it", format="fp8_e4m3")
    append(ValueError, "3 numbers for 2 heads", scales=Scales(k=scales.k, v=scales.v, k_heads=[1.0, 1.0, 1.0]))
    append(ValueError, "not rows of 32 u8", format="int4_t")
    append(TypeError, "of a format of codes", format=None, scales=None)
    append(ValueError, "format cannot be", format="int9", k=k.astype(np.float32))
    append(ValueError, "the format is bf16", format="bf16", scales=None, k=k.astype(np.float32))
    fixed = scales.k.copy()
    fixed.flags.writeable = False
    append(ValueError, "scales.k is read-only", scales=Scales(k=fixed, v=scales.v))
    append(kvcache.Error, "head scales", scales=Scales(k_heads=[1.0, float("nan")]), format="fp8_e4m3")
    assert not k.any() and not scales.k.any()


def bf16(x):
    """The upper halves of f32, as bytes, and the values that they are."""
    bits = x.astype(np.float32).view(np.uint32) & 0xFFFF0000
    return (bits >> 16).astype(np.uint16), bits.view(np.float32)


def sealed(format="kt8v8"):
    """Three tiles that are sealed and one that is raw, of a sequence with five tokens in the last."""
    (k_halves, keys), (v_halves, values) = map(bf16, rows(TOKENS * BLOCKS, 2))
    turn = lambda x: x.reshape(BLOCKS, TOKENS, HEADS * DIM).reshape(BLOCKS, TOKENS, HEADS, DIM).transpose(0, 2, 1, 3)
    raw = np.stack([turn(k_halves), turn(v_halves)], axis=1)
    staging = np.ascontiguousarray(raw).reshape(BLOCKS, -1).view(np.uint8)
    size = Tiles.record_bytes(kv_heads=HEADS, k_dim=DIM, format=format, block_tokens=TOKENS)
    memory = np.zeros(BLOCKS * HEADS * size + 16, np.uint8)
    skip = -memory.ctypes.data % 16
    records = memory[skip : skip + BLOCKS * HEADS * size].reshape(BLOCKS, HEADS, size)
    tiles = Tiles(records, staging, kv_heads=HEADS, k_dim=DIM, format=format, block_tokens=TOKENS)
    return tiles, staging, records, keys, values


@pytest.mark.parametrize("format, tolerance", [("kt8v8", 5e-3), ("kt4v4", 0.15), ("kt2v2", 0.9)])
def test_tiles_are_sealed_and_read(format, tolerance):
    tiles, staging, records, keys, values = sealed(format)
    assert tiles.seal([0, 1, 2], [2, 0, 3]) == [False] * 3
    assert records[[0, 2, 3]].any(axis=(1, 2)).all() and not records[1].any()
    n = TOKENS * 3 + 5
    q = np.random.default_rng(3).standard_normal((1, Q_HEADS, DIM), dtype=np.float32)
    out, table, lens = np.empty_like(q), np.array([[2, 0, 3, 1]], np.int32), np.array([n], np.int32)
    kvcache.attend(q, tiles, None, table, lens, out, raw=[[(3, 3)]])
    expected = softmax_attention(q[0], keys[:n], values[:n])
    assert np.abs(out[0] - expected).max() < tolerance

    # Rows that cannot be sealed are refused, and read raw.
    kept = staging[1, :2].copy()
    staging[1, :2] = (0x80, 0x7F)
    assert tiles.seal([1], [0]) == [True]
    staging[1, :2] = kept
    kvcache.attend(q, tiles, None, table, lens, out, raw=[[(1, 1), (3, 3)]])
    assert np.abs(out[0] - expected).max() < tolerance


def test_tiles_that_cannot_be_are_refused():
    tiles, staging, records, _, _ = sealed()
    sizes = {"kv_heads": HEADS, "k_dim": DIM, "format": "kt8v8", "block_tokens": TOKENS}
    for error, match, x, y, changes in (
        (ValueError, "records has the shape", records[:, :1], staging, {}),
        (ValueError, "staging has the shape", records, staging[:, :-2], {}),
        (TypeError, "records has elements", records.view(np.float32), staging, {}),
        (ValueError, "rows must be without gaps", records[:, :, ::2], staging, {}),
        (kvcache.Error, "block_tokens", records, staging, {"block_tokens": 48}),
        (kvcache.Error, "format", records, staging, {"format": "bf16"}),
        (ValueError, "format cannot be", records, staging, {"format": "kt9v9"}),
    ):
        with pytest.raises(error, match=match):
            Tiles(x, y, **(sizes | changes))
    with pytest.raises(kvcache.Error):
        tiles.seal([0], [BLOCKS])
    with pytest.raises(kvcache.Error):
        tiles.seal([-1], [0])
    with pytest.raises(ValueError, match="2 slots and 1 blocks"):
        tiles.seal([0, 1], [0])
    q = np.zeros((1, Q_HEADS, DIM), np.float32)
    table, lens = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    for match, changes in (("raw must say", {}), ("must be None", {"raw": [[]], "format": "kt8v8"})):
        with pytest.raises(ValueError, match=match):
            kvcache.attend(q, tiles, None, table, lens, np.empty_like(q), **changes)
