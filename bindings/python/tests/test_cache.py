"""Caches, sequences and steps against attention written out in f64."""

import gc
import threading

import numpy as np
import pytest

import kvcache

RNG = np.random.default_rng(7)


def reference(q, k, v, heads, window=0):
    """Causal attention of the last rows of a sequence: q [n, heads, d], k and v [m, kv_heads, d]."""
    n, m, out = len(q), len(k), np.zeros((len(q), heads, v.shape[2]))
    for i in range(n):
        end = m - n + i + 1
        begin = max(0, end - window) if window else 0
        for h in range(heads):
            g = h // (heads // k.shape[1])
            s = k[begin:end, g].astype("f8") @ q[i, h].astype("f8") / np.sqrt(q.shape[2])
            p = np.exp(s - s.max())
            out[i, h] = p @ v[begin:end, g].astype("f8") / p.sum()
    return out


class Toy:
    """One attention layer over random K and V of each sequence, remembered outside."""

    def __init__(self, **options):
        self.window = options.pop("window", 0)
        group = kvcache.GroupSpec(layers=2, kv_heads=2, k_dim=64, format="f32", window=self.window)
        self.cache, self.step, self.kv = kvcache.Cache(group, **options), kvcache.Step(), {}

    def run(self, work):
        rows = [(len(new), self.kv.setdefault(seq.id, [])) for seq, new in work]
        total = sum(n for n, _ in rows)
        with self.step.begin(self.cache, work):
            for layer in range(2):
                k, v = RNG.standard_normal((2, total, 2, 64)).astype("f4")
                q, out = RNG.standard_normal((total, 4, 64)).astype("f4"), np.full((total, 4, 64), np.nan, "f4")
                self.step.append(0, layer, k, v)
                self.step.attend(0, layer, q, out)
                at = 0
                for n, held in rows:
                    if layer == 1:
                        held.append((k[at : at + n], v[at : at + n]))
                        keys, values = (np.concatenate(part) for part in zip(*held))
                        want = reference(q[at : at + n], keys, values, 4, self.window)
                        assert np.abs(out[at : at + n] - want).max() < 1e-5
                    at += n


@pytest.mark.parametrize("window", [0, 24])
def test_ragged_steps(window):
    toy = Toy(blocks=64, window=window, prefix_reuse=False)
    seqs = [toy.cache.start(range(1, n)) for n in (3, 20, 41)]
    toy.run([(s, range(1, n)) for s, n in zip(seqs, (3, 20, 41))])
    for _ in range(20):
        toy.run([(s, [5]) for s in seqs])
    assert [len(s) for s in seqs] == [22, 39, 60]
    toy.cache.audit()
    for s in seqs:
        s.release()
    assert toy.cache.stats().free_blocks == 64


def test_prefix_fork_truncate():
    toy = Toy(blocks=32)
    prompt = list(range(100, 140))
    first = toy.cache.start(prompt)
    assert first.cached_tokens == 0
    toy.run([(first, prompt)])
    second = toy.cache.start(prompt)
    assert second.cached_tokens == 32
    assert toy.cache.start(prompt, name_space=1).cached_tokens == 0
    assert toy.cache.start(prompt, media=[(5, bytes(32))]).cached_tokens == 5
    with pytest.raises(ValueError, match="32 bytes"):
        toy.cache.start(prompt, media=[(5, b"short")])
    with pytest.raises(kvcache.Error, match="media"):
        toy.cache.start(prompt, media=[(len(prompt), bytes(32))])
    third = first.fork()
    assert third.blocks() == first.blocks() and third.tokens() == prompt
    toy.kv[third.id] = list(toy.kv[first.id])
    toy.run([(third, [7]), (first, [8])])
    assert third.tokens() == prompt + [7] and first.tokens() == prompt + [8]
    assert third.blocks()[:2] == first.blocks()[:2] and third.blocks()[2] != first.blocks()[2]
    third.truncate(10)
    assert third.tokens() == prompt[:10]
    third.hint("ended")
    first.prioritize([kvcache.Retention(90, duration_ms=10)])
    with first, second:
        pass
    with pytest.raises(kvcache.errors.StaleHandle):
        first.release()
    toy.cache.advance(5)
    toy.cache.clear_prefix()
    toy.cache.sync()
    toy.cache.audit()


def test_out_of_blocks_loses_nothing():
    cache = kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64), blocks=2)
    seq, step = cache.start([1]), kvcache.Step()
    with pytest.raises(kvcache.OutOfBlocks) as e:
        step.begin(cache, [(seq, range(100))])
    assert e.value.missing == 5 and e.value.code == -100 and "blocks" in str(e.value)
    with pytest.raises(kvcache.errors.InvalidState):
        step.commit()
    step.begin(cache, [(seq, [1])])
    step.cancel()
    with pytest.raises(ZeroDivisionError), step.begin(cache, [(seq, [1])]):
        raise ZeroDivisionError
    assert cache.stats().free_blocks == 2 and len(seq) == 0
    with pytest.raises(ValueError):
        step.begin(cache, [])
    other = kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64), blocks=2)
    with pytest.raises(ValueError, match="another cache"):
        step.begin(other, [(seq, [1])])
    with pytest.raises(ValueError, match="several caches"):
        kvcache.Batch([seq, other.start([1])])
    for bad in ({"blocks": 0}, {"blocks": -1}, {"eviction": "mru"}, {"device": "tpu"}, {"block_tokens": 17}):
        with pytest.raises(ValueError):
            kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64), **bad)


def test_batch():
    cache = kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64, format="f32"), blocks=16)
    seqs = [cache.start([n]) for n in range(4)]
    batch, step = kvcache.Batch(seqs), kvcache.Step()
    for token in range(20):
        np.frombuffer(batch.tokens, "uint32")[:] = token + np.arange(4)
        with step.begin(cache, batch):
            assert step.rows == 4 and step.positions() == [token] * 4
            rows = np.zeros((4, 1, 64), "f4")
            step.append(0, 0, rows, rows)
    assert seqs[3].tokens() == list(range(3, 23))


def test_threads_at_once():
    """Calls leave the interpreter's lock: threads run on one cache, which has them wait in turn."""
    cache = kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=2, k_dim=64, format="f32"), blocks=256)
    failed = []

    def client(n):
        try:
            step = kvcache.Step()
            for turn in range(20):
                prompt = [n, turn, *range(30)]
                with cache.start(prompt) as seq:
                    new = prompt[seq.cached_tokens :]
                    rows = np.full((len(new), 2, 64), n, "f4")
                    out = np.zeros_like(rows)
                    with step.begin(cache, [(seq, new)]):
                        step.append(0, 0, rows, rows)
                        step.attend(0, 0, rows, out)
                    assert np.abs(out - n).max() < 1e-5
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(1, 5)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failed
    cache.audit()
    assert cache.stats().sequences == 0


def test_the_lock_is_free_during_a_call():
    cache = kvcache.Cache(
        kvcache.GroupSpec(layers=1, kv_heads=8, k_dim=128, format="f32"), blocks=300, prefix_reuse=False, threads=1
    )
    seq, step = cache.start([1]), kvcache.Step()
    n = 4096
    rows = RNG.standard_normal((n, 8, 128)).astype("f4")
    out = np.zeros_like(rows)
    turns = []

    def spin():
        while not done:
            turns.append(inside)

    step.begin(cache, [(seq, range(n))])
    step.append(0, 0, rows, rows)
    done = inside = False
    thread = threading.Thread(target=spin)
    thread.start()
    inside = True
    step.attend(0, 0, rows, out)
    inside = False
    done = True
    thread.join()
    # A call of a second or so: with the lock held the other thread would not have turned once.
    assert sum(turns) > 1000
    step.cancel()


def test_ends():
    before = kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64), blocks=4)
    before.close()
    before.close()
    with pytest.raises(kvcache.errors.StaleHandle):
        before.stats()
    for _ in range(5000):
        # Handles come back with their objects: a process has 4096.
        kvcache.Step()
    gc.collect()


def test_scoring_and_rope():
    cache = kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64, format="f32"), blocks=4)
    rope, n = kvcache.Rope(64, theta=500.0), 5
    k, q = RNG.standard_normal((2, n, 1, 64)).astype("f4")
    v = RNG.standard_normal((n, 1, 64)).astype("f4")
    angle = np.arange(n)[:, None] * 500.0 ** (-2 * np.arange(32) / 64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotated(x):
        return np.concatenate([x[..., :32] * cos - x[..., 32:] * sin, x[..., 32:] * cos + x[..., :32] * sin], -1)

    want = reference(rotated(q), rotated(k), v, 1)
    turned, out, lse = q.copy(), np.zeros((n, 1, 64), "f4"), np.zeros((n, 1), "f4")
    rope.rotate(turned, range(n))
    assert np.abs(turned - rotated(q)).max() < 1e-5
    with cache.step([(cache.start([1]), range(n))]) as step:
        step.append(0, 0, k, v, rope=rope)
        step.attend(0, 0, turned, out, lse=lse)
        assert np.abs(out - want).max() < 1e-5
        assert abs(lse[0, 0] - rotated(q)[0, 0] @ rotated(k)[0, 0] / 8) < 1e-4
        step.attend(0, 0, turned, out, scoring=kvcache.Scoring(window=1))
        assert np.array_equal(out, v)
        step.attend(0, 0, turned, out, scoring=kvcache.Scoring(sinks=[1e4]))
        assert np.abs(out).max() < 1e-6
        with pytest.raises(ValueError, match="query heads"):
            step.attend(0, 0, turned, out, scoring=kvcache.Scoring(alibi=[1, 2]))


def test_quantised_formats():
    """A cache of 8-bit keys and values attends near to one of 32 bits; fp8 takes scales before it is used."""
    n, results = 40, []
    q, k, v = RNG.standard_normal((3, n, 2, 64)).astype("f4")
    for format in ("f32", "int8_t", "fp8_e4m3"):
        cache = kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=2, k_dim=64, format=format), blocks=4)
        if format == "fp8_e4m3":
            cache.set_scales(0, 0, [0.02, 0.02], [0.02, 0.02])
            with pytest.raises(ValueError, match="one a KV head"):
                cache.set_scales(0, 0, [0.02], [0.02])
        seq = cache.start([1])
        with cache.step([(seq, range(n))]) as step:
            step.append(0, 0, k, v)
            out = np.zeros((n, 2, 64), "f4")
            step.attend(0, 0, q, out)
        results.append(out)
        if format == "fp8_e4m3":
            with pytest.raises(kvcache.errors.InvalidState):
                cache.set_scales(0, 0, [1, 1], [1, 1])
    assert 0 < np.abs(results[1] - results[0]).max() < 0.1 and 0 < np.abs(results[2] - results[0]).max() < 0.5
