"""What arrays are taken, and what is refused, by which error."""

import array
import sys

import numpy as np
import pytest

import kvcache
from kvcache import arrays


@pytest.fixture
def step():
    cache = kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=2, k_dim=64, format="f32"), blocks=8)
    step = cache.step([(cache.start([1, 2, 3]), [1, 2, 3])])
    yield step
    step.cancel()
    cache.audit()


def rows(heads=2, dtype="f4", n=3):
    return np.random.default_rng(1).standard_normal((n, heads, 64)).astype(dtype)


class OnlyDlpack:
    """An array that has nothing but DLPack, of an older producer or a newer one."""

    def __init__(self, x, versioned=True):
        self.x, self.versioned = x, versioned

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()

    def __dlpack__(self, **arguments):
        if not self.versioned and "max_version" in arguments:
            raise TypeError("unexpected argument max_version")
        return self.x.__dlpack__(**arguments)


def test_nothing_is_copied(step):
    k, out = rows(), np.full((3, 4, 64), np.nan, "f4")
    assert int(kvcache._native.ffi.cast("uintptr_t", arrays.rows(k, "k").address)) == k.ctypes.data
    step.append(0, 0, k, memoryview(k))
    step.attend(0, 0, rows(4), out)
    # Written in place; the first token sees itself alone.
    assert np.array_equal(out[0], np.repeat(k[0], 2, axis=0)) and not np.isnan(out).any()


@pytest.mark.parametrize("versioned", [True, False])
def test_dlpack(step, versioned):
    k = rows()
    step.append(0, 0, OnlyDlpack(k, versioned), OnlyDlpack(k, versioned))
    out = np.zeros((3, 2, 64), "f4")
    step.attend(0, 0, OnlyDlpack(rows(), versioned), OnlyDlpack(out, versioned))
    assert np.array_equal(out[0], k[0])
    strided = OnlyDlpack(rows(4)[:, ::2], versioned)
    assert arrays.array(strided, "x").strides == (256, 128, 1)
    with pytest.raises(ValueError, match="not contiguous"):
        step.append(0, 0, strided, k)
    before = sys.getrefcount(k)
    for _ in range(100):
        arrays.rows(OnlyDlpack(k, versioned), "k")
    assert sys.getrefcount(k) == before


def test_halves_and_mixed_types(step):
    k = rows(dtype="f2")
    step.append(0, 0, k, k)
    out = np.zeros((3, 2, 64), "f2")
    step.attend(0, 0, rows(), out)
    assert np.array_equal(out[0], k[0])
    with pytest.raises(TypeError, match="k is f16 and v is f32"):
        step.append(0, 0, k, rows())


def test_what_is_refused(step):
    k, out = rows(), np.zeros((3, 2, 64), "f4")
    refused = [
        (TypeError, "format 'd'", lambda: step.append(0, 0, k.astype("f8"), k)),
        (TypeError, "u32: rows are", lambda: step.append(0, 0, k.view("u4"), k)),
        (TypeError, "list: not a tensor", lambda: step.append(0, 0, k.tolist(), k)),
        (TypeError, "NoneType", lambda: step.append(0, 0, None, k)),
        (ValueError, "not contiguous", lambda: step.append(0, 0, rows(4)[:, ::2], k)),
        (ValueError, "not contiguous", lambda: step.append(0, 0, np.asfortranarray(k), k)),
        (ValueError, r"shape \(2, 2, 64\)", lambda: step.append(0, 0, k[:2], k)),
        (ValueError, "shape", lambda: step.append(0, 0, k, k.reshape(3, 4, 32))),
        (ValueError, "group 1", lambda: step.append(1, 0, k, k)),
        (ValueError, "layer", lambda: step.append(0, 1, k, k)),
        (ValueError, "out has the shape", lambda: step.attend(0, 0, rows(4), out)),
        (ValueError, "lse", lambda: step.attend(0, 0, k, out, lse=out)),
    ]
    for kind, text, call in refused:
        with pytest.raises(kind, match=text):
            call()
    out.flags.writeable = False
    for read_only in (out, OnlyDlpack(out), bytes(out.nbytes)):
        with pytest.raises((ValueError, TypeError)):
            step.attend(0, 0, k, read_only)
    assert not out.any()
    # What only is read may be read-only.
    k.flags.writeable = False
    step.append(0, 0, k, OnlyDlpack(k))


def test_tokens_of_every_kind():
    cache = kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64, format="f32"), blocks=8)
    for prompt in ([1, 2], (1, 2), range(1, 3), np.array([1, 2]), np.array([1, 2], "u4"), array.array("I", [1, 2])):
        seq = cache.start(prompt)
        seq.release()
    for kind, prompt in ((ValueError, [-1]), (ValueError, [1 << 32]), (TypeError, ["a"]), (TypeError, [1.5])):
        with pytest.raises(kind):
            cache.start(prompt)
    cache.audit()


def test_torch(step):
    torch = pytest.importorskip("torch")
    k, out = torch.randn(3, 2, 64), torch.zeros(3, 2, 64)
    step.append(0, 0, k, k)
    step.attend(0, 0, k.bfloat16(), out)
    assert torch.equal(out[0], k[0])
    both = torch.randn(2, 3, 64).transpose(0, 1)
    refused = [
        (ValueError, "not contiguous", both),
        (TypeError, "float64", k.double()),
        (ValueError, "gradient", torch.randn(3, 2, 64, requires_grad=True)),
        (ValueError, "meta", torch.empty(3, 2, 64, device="meta")),
        (TypeError, "sparse", k.to_sparse()),
    ]
    for kind, text, x in refused:
        with pytest.raises(kind, match=text):
            step.append(0, 0, x, k)
    with torch.no_grad():
        step.append(0, 0, torch.randn(3, 2, 64, requires_grad=True), k)


@pytest.mark.parametrize("torch", [False, True])
def test_rows_are_looked_at_once(step, torch):
    library = pytest.importorskip("torch") if torch else None
    wrap = library.from_numpy if torch else lambda x: x
    k, q, out = rows(), rows(4), np.zeros((3, 4, 64), "f4")
    held = kvcache.Rows(wrap(k))
    step.append(0, 0, held, held)
    step.attend(0, 0, kvcache.Rows(wrap(q)), kvcache.Rows(wrap(out)))
    plain = np.zeros_like(out)
    step.append(0, 0, k, k)
    step.attend(0, 0, q, plain)
    assert np.array_equal(out, plain) and np.array_equal(out[0], np.repeat(k[0], 2, axis=0))
    # Written where it lies, and seen with what is there now.
    k[...] = rows() * 2
    step.append(0, 0, held, held)
    step.attend(0, 0, q, kvcache.Rows(wrap(out)))
    assert np.array_equal(out[0], np.repeat(k[0], 2, axis=0))


def test_rows_keep_their_array_and_are_refused_like_it(step):
    k = kvcache.Rows(rows())
    wide = kvcache.Rows(rows(3))
    with pytest.raises(ValueError, match="shape"):
        step.append(0, 0, wide, wide)
    with pytest.raises(TypeError, match="f32 and v is f16"):
        step.append(0, 0, k, kvcache.Rows(rows(dtype="f2")))
    with pytest.raises(ValueError, match="shape"):
        step.attend(0, 0, kvcache.Rows(rows(4, n=2)), rows(4))
    with pytest.raises(ValueError, match="shape"):
        step.attend(0, 0, kvcache.Rows(rows(4)), kvcache.Rows(rows(2)))
    frozen = rows(4)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        step.attend(0, 0, kvcache.Rows(rows(4)), kvcache.Rows(frozen))
    with pytest.raises(ValueError, match="not contiguous"):
        kvcache.Rows(rows(4)[:, ::2])
    with pytest.raises(TypeError, match="f32, f16 or bf16"):
        kvcache.Rows(rows().view("u4"))
    grown = rows()
    held = kvcache.Rows(grown)
    del grown
    step.append(0, 0, held, held)
