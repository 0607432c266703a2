"""The other nouns: plan, pool, prefix, kernels, device, events, metrics."""

import socket
import threading
import time

import numpy as np
import pytest

import kvcache
from kvcache import device, errors, shared

from test_cache import reference


def test_plan():
    group = kvcache.GroupSpec(layers=32, kv_heads=8, k_dim=128)
    plan = kvcache.plan(group, memory_bytes=80 << 30, weight_bytes=16 << 30, context_tokens=8192)
    assert plan.token_bytes == 32 * 8 * 128 * 2 * 2 and plan.fits and plan.max_batch == 56
    assert plan.groups[0].block_bytes == 16 * plan.token_bytes
    with pytest.raises(errors.InvalidArgument):
        kvcache.plan(kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=7), memory_bytes=1, context_tokens=1)


def test_pool():
    with kvcache.Pool(8) as pool:
        blocks = pool.allocate(3)
        pool.retain(blocks[:1])
        assert pool.refs(blocks[0]) == 2 and pool.free(blocks) == 2
        assert pool.stats() == (8, 7, 1)
        with pytest.raises(kvcache.OutOfBlocks) as e:
            pool.allocate(10**6)
        assert e.value.missing == 10**6 - 7
        with pytest.raises(errors.BadBlock):
            pool.free([blocks[1]])
        assert pool.allocate(0) == []


def test_prefix():
    with kvcache.Prefix(block_tokens=4, groups=2, capacity_blocks=16, eviction="slru") as prefix:
        tokens = list(range(12))
        made = prefix.insert(tokens, [0, 10, 1, 11, 2, 12])
        assert made.stored_blocks == 3 and made.present == []
        again = prefix.insert(tokens[:8], [5, 15, 6, 16])
        assert again.present_blocks == 2 and again.present == [0, 10, 1, 11]
        hit = prefix.lookup([*tokens[:10], 99])
        assert (hit.tokens, hit.blocks, hit.tail_tokens, hit.tail_blocks) == (8, [0, 10, 1, 11], 2, [2, 12])
        assert prefix.lookup(tokens, name_space=1).tokens == 0
        pin = prefix.lock(made.at)
        assert prefix.evict(3) == [] and prefix.stats().pins == 1
        prefix.touch(made.at)
        prefix.prioritize(made.at, [kvcache.Retention(5), kvcache.Retention(80, 0, 4)])
        prefix.hint(made.at, "expected", when_ms=50)
        prefix.advance(10)
        prefix.release(pin)
        with pytest.raises(errors.StaleHandle):
            prefix.unlock(pin)
        ran = prefix.run(
            unlocks=[pin],
            commits=[kvcache.Commit(range(20, 24), [3, 13], above=made.at), kvcache.Commit([1], [1, 2])],
            queries=[kvcache.Query([*tokens, *range(20, 25)], pin=True), kvcache.Query([77])],
        )
        assert isinstance(ran.unlocked[0], errors.StaleHandle)
        assert ran.committed[0].stored_blocks == 1 and isinstance(ran.committed[1], errors.InvalidArgument)
        assert ran.answers[0].hit.blocks == [0, 10, 1, 11, 2, 12, 3, 13] and ran.answers[0].pin
        assert ran.answers[1].hit.tokens == 0 and ran.answers[1].pin == 0
        prefix.unlock(ran.answers[0].pin)
        assert prefix.evict(100) == [3, 13, 2, 12, 1, 11, 0, 10]
        # The second group sees five tokens.
        prefix.set_windows([0, 5])
        prefix.insert(tokens, [0, 10, 1, 11, 2, 12])
        assert prefix.forget(1, [7, 11]) == [11] and prefix.forget(0, [1]) == []
        assert prefix.lookup([*tokens, 9]).blocks == [0, 10, 1, -1, 2, 12]
        assert prefix.lookup(tokens[:9]).tokens == 4
        with pytest.raises(errors.InvalidState):
            prefix.set_windows([0, 0])


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_kernels_on_foreign_tensors(layout, dtype):
    rng = np.random.default_rng(3)
    shape = (9, 16, 2, 64) if layout == "NHD" else (9, 2, 16, 64)
    k, v = np.zeros((2, *shape), dtype)
    table, lens = np.array([[4, 0, 7], [2, 5, -1]], "i4"), np.array([40, 17], "i4")
    rows = rng.standard_normal((2, 57, 2, 64)).astype(dtype)
    slots = [b * 16 + t for s in range(2) for b in table[s] for t in range(16)]
    slots = slots[:40] + slots[48:65]
    kvcache.append(k, v, slots, rows[0], rows[1], layout=layout)
    q = rng.standard_normal((5, 4, 64)).astype("f4")
    out, lse = np.zeros_like(q), np.zeros((5, 4), "f4")
    indptr = np.array([0, 3, 5], "i4")
    kvcache.attend(q, k, v, table, lens, out, q_indptr=indptr, layout=layout, lse=lse)
    for s, (a, b) in enumerate([(0, 40), (40, 57)]):
        want = reference(q[indptr[s] : indptr[s + 1]], rows[0, a:b], rows[1, a:b], 4)
        assert np.abs(out[indptr[s] : indptr[s + 1]] - want).max() < 1e-5
    with pytest.raises(ValueError, match="q_indptr ends at 6"):
        kvcache.attend(q, k, v, table, lens, out, q_indptr=np.array([0, 3, 6], "i4"), layout=layout)
    with pytest.raises(ValueError, match="give q_indptr"):
        kvcache.attend(q, k, v, table, lens, out, layout=layout)
    with pytest.raises(ValueError):
        kvcache.attend(q, k, v, table, np.array([400, 17], "i4"), out, q_indptr=indptr, layout=layout)
    with pytest.raises(TypeError, match="table has elements of type i64"):
        kvcache.attend(q, k, v, table.astype("i8"), lens, out, q_indptr=indptr, layout=layout)
    with pytest.raises(ValueError):
        kvcache.append(k, v, [9 * 16], rows[0, :1], rows[1, :1], layout=layout)


def test_merge_and_queries():
    rng = np.random.default_rng(4)
    s, v = rng.standard_normal(20), rng.standard_normal((20, 8))

    def part(at):
        p = np.exp(s[at])
        return (p @ v[at] / p.sum()).astype("f4")[None], np.log(p.sum()).astype("f4")[None]

    (a, la), (b, lb), (want, lw) = part(slice(0, 9)), part(slice(9, 20)), part(slice(0, 20))
    kvcache.merge_states(a, la, b, lb)
    assert np.abs(a - want).max() < 1e-5 and abs(la - lw) < 1e-5
    sizes = {"q_heads": 8, "kv_heads": 2, "k_dim": 64}
    assert kvcache.kernel_name(**sizes).startswith("attend") or "decode" in kvcache.kernel_name(**sizes)
    assert kvcache.workspace_size(**sizes, seqs=4, max_q_tokens=4, max_kv_tokens=100) > 0
    assert "kt2v2" in kvcache.kernel_name(**sizes, block_tokens=32, format="kt2v2")
    with pytest.raises(errors.Unsupported, match="sealed tiles"):
        device.attend_kernel(**sizes, format="kt2v2", max_kv_tokens=100, multiprocessors=8)


def test_device_of_a_build_without_kernels():
    sizes = {"q_heads": 8, "kv_heads": 2, "k_dim": 64, "max_kv_tokens": 4096, "multiprocessors": 132}
    assert device.attend_workspace_size(**sizes) > 0
    assert "d64" in device.attend_kernel(**sizes) or "64" in device.attend_kernel(**sizes)
    try:
        opened = kvcache.Device("cuda")
    except (errors.NoKernels, errors.NoDevice) as e:
        assert str(e)
    else:
        opened.close()
    with pytest.raises(ValueError, match="cpu, cuda, emu"):
        kvcache.Device("tpu")
    assert device.cascade_workspace_size(3, **sizes) > device.attend_workspace_size(**sizes)
    with pytest.raises(errors.InvalidArgument, match="segments"):
        device.cascade_workspace_size(0, **sizes)
    assert shared.copy_bytes(kvcache.Prefix(block_tokens=4, capacity_blocks=16)) > 16 * 5 * 4


def test_whether_a_cascade_pays():
    layer = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "block_tokens": 16, "token_bytes": 4096}
    layer |= {"seqs": 128, "kv_tokens": 128 * 4352}
    # Round numbers in the range of large devices, made up for this test.
    rates = kvcache.DeviceRates(132, 3e6, 6e6, 50 << 20, 3e8, 2.5)
    with pytest.raises(errors.InvalidState):
        kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64), blocks=1).set_device_rates(rates)
    rates = rates._asdict()
    found, said = kvcache.choose_cascade([(0, 128, 256)], 2, **layer, **rates)
    assert said.pays and said.plain > said.cascade and found == [(0, 128, 256), (128, 0, 0)]
    found, said = kvcache.choose_cascade([(0, 128, 2)], 2, **layer, **rates)
    assert not said.pays and found == [(0, 128, 0), (128, 0, 0)]
    with pytest.raises(errors.InvalidArgument, match="prefixes"):
        kvcache.choose_cascade([(0, 129, 256)], 2, **layer, **rates)


def test_device_under_the_emulator():
    if "emulate" not in kvcache.build_info().split("features:")[1].split(";")[0]:
        pytest.skip("this wheel has no emulator")
    with kvcache.Device("emu") as opened:
        assert opened.name and opened.rates().multiprocessors == opened.info().multiprocessors > 0
        memory, data = opened.alloc(4096), np.arange(1024, dtype="f4")
        back = np.zeros_like(data)
        memory.upload(data)
        memory.download(back)
        assert np.array_equal(data, back)
        ids = opened.alloc(8)
        ids.upload(np.array([0, 3], "i4"))
        opened.copy_blocks(ids, memory, memory, block_bytes=1024, from_blocks=4, to_blocks=4)
        memory.download(back)
        assert np.array_equal(back[768:], data[:256])
        ids = opened.alloc(4)
        ids.upload(np.array([1], "i4"))
        opened.zero_blocks(ids, memory, block_bytes=1024, to_blocks=4)
        opened.sync()
        memory.download(back)
        assert not back[256:512].any() and back[512:].any()
        memory.zero()
        memory.download(back)
        assert not back.any()
        memory.free()
        memory.free()
        # An index of one prompt, its copy, and a request that agrees for six tokens.
        index = kvcache.Prefix(block_tokens=4, capacity_blocks=16)
        index.insert(list(range(1, 9)), [11, 12])
        with kvcache.DevicePrefix(opened, index) as copied:
            assert copied.sync() > 0
            with pytest.raises(errors.InvalidState):
                kvcache.DevicePrefix(opened, index)
            tokens, indptr, found, ids = (opened.alloc(size) for size in (32, 8, 4, 8))
            tokens.upload(np.array([1, 2, 3, 4, 5, 6, 9, 9], "u4"))
            indptr.upload(np.array([0, 8], "i4"))
            copied.lookup(tokens, indptr, found, ids, requests=1, max_blocks=2)
            matched, back = np.zeros(1, "u4"), np.zeros(2, "i4")
            found.download(matched)
            ids.download(back)
            assert matched[0] == 4 and back[0] == 11
            with pytest.raises(ValueError, match="indptr"):
                copied.lookup(tokens, indptr, found, ids, requests=2, max_blocks=1)
            for memory in (tokens, indptr, found, ids):
                memory.free()


def test_events():
    cache = kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64, format="f32"), blocks=8)
    cache.describe(3, salt="tenant", lora=None)
    seen = []
    with cache.events(seen.append) as events:
        prompt = list(range(1, 40))
        with cache.start(prompt, name_space=3) as seq, cache.step([(seq, prompt)]) as step:
            rows = np.zeros((39, 1, 64), "f4")
            step.append(0, 0, rows, rows)
        while events.stats().queued_events or events.stats().publishing:
            time.sleep(0.001)
        cache.clear_prefix()
        events.snapshot()
        assert events.endpoint() == "" and events.stats().dropped_events == 0
    kinds = [event.kind for event in seen]
    assert kinds[0] == "cleared" and "stored" in kinds and kinds[-1] == "cleared"
    stored = seen[kinds.index("stored")]
    assert stored.tokens == prompt[:32] and len(stored.digests) == 2 and len(stored.digests[0]) == 32
    assert stored.medium == "gpu" or stored.medium == "cpu"
    with pytest.raises(errors.Unsupported):
        cache.events(endpoint="tcp://127.0.0.1:0")
    with pytest.raises(ValueError):
        cache.events()
    cache.events(seen.append).close()


def test_metrics():
    cache = kvcache.Cache(kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64, format="f32"), blocks=8)
    cache.watch(1)
    cache.set_time(0)
    prompt = list(range(1, 40))
    with cache.start(prompt) as seq, cache.step([(seq, prompt)]) as step:
        rows = np.zeros((39, 1, 64), "f4")
        step.append(0, 0, rows, rows)
    cache.set_time(30)
    cache.clear_prefix()
    metrics = cache.metrics()
    assert metrics.queries_tokens == 39 and metrics.evicted_cleared_blocks == 2 and metrics.watched_every == 1
    assert "kvcache:prefix_cache_queries" in cache.metrics_text() and len(metrics.lifetime.counts) == 22


def test_blocks_move_to_another_cache(tmp_path):
    group, prompt = kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64, format="f32"), list(range(4 * 16 + 3))
    with kvcache.Cache(group, blocks=12, threads=1) as cache, kvcache.Cache(group, blocks=12, block_tokens=32) as other:
        with cache.start(prompt) as seq:
            with cache.step([(seq, prompt)]) as step:
                rows = np.random.default_rng(7).standard_normal((len(prompt), 1, 64)).astype("f4")
                step.append(0, 0, rows, rows)
            with open(tmp_path / "stream", "w+b") as file:
                assert cache.export_blocks(seq, "toy", file) == 64
            with pytest.raises(ValueError, match="another cache"):
                other.export_blocks(seq, "toy", 1)
            with pytest.raises(TypeError, match="fileno"):
                cache.export_blocks(seq, "toy", "stream")
            ours, theirs = socket.socketpair()
            with ours, theirs:
                sender = threading.Thread(target=cache.export_blocks, args=(seq, "toy", ours))
                sender.start()
                assert other.import_blocks(theirs, "toy") == 64
                sender.join()
        with other.start(prompt) as seq:
            assert seq.cached_tokens == 64
        other.clear_prefix()
        with open(tmp_path / "stream", "rb", buffering=0) as file:
            with pytest.raises(errors.InvalidArgument, match="another model"):
                other.import_blocks(file, "play")
            file.seek(0)
            assert other.import_blocks([file], "toy", slices=[kvcache.TierSlice(0, 0)]) == 64
            with pytest.raises(errors.TierFailed):
                other.import_blocks(file, "toy")
        with open(tmp_path / "stream", "rb") as file, pytest.raises(ValueError, match="unbuffered"):
            other.import_blocks(file, "toy")


def test_tiers(tmp_path):
    group, prompt = kvcache.GroupSpec(layers=1, kv_heads=1, k_dim=64, format="f32"), list(range(8 * 16 + 3))

    def fresh():
        cache = kvcache.Cache(group, blocks=12, threads=1)
        assert cache.tier_stats() == []
        cache.attach_tiers("toy", disk_dir=tmp_path, disk_bytes=1 << 20, slices=[kvcache.TierSlice(0, 0)])
        with pytest.raises(errors.InvalidState, match="tiers already"):
            cache.attach_tiers("toy")
        return cache

    with fresh() as cache:
        with cache.start(prompt) as seq, cache.step([(seq, prompt)]) as step:
            rows = np.random.default_rng(6).standard_normal((len(prompt), 1, 64)).astype("f4")
            step.append(0, 0, rows, rows)
        assert cache.flush_tiers(60000)
        host, disk = cache.tier_stats()
        assert (host.kind, disk.kind, disk.objects) == ("host", "disk", 8) and disk.stored_bytes > 0
        other = kvcache.Cache(group)
        with pytest.raises(errors.InvalidState, match="another process"):
            other.attach_tiers("toy", disk_dir=tmp_path)
        with pytest.raises(errors.TierFailed):
            other.attach_tiers("toy", disk_dir="/proc/nothing")
        with pytest.raises(ValueError, match="NUL"):
            other.attach_tiers("t\0y")
        # An address that is none, or a build that has no remote stores.
        remote = "remote" in kvcache.build_info()
        with pytest.raises(errors.InvalidArgument if remote else errors.Unsupported, match="address|remote store"):
            other.attach_tiers("toy", remote="nowhere", remote_timeout_ms=100)
    # A second cache finds what the first left, with its bytes: layer by layer ...
    with fresh() as cache:
        with cache.onboard(prompt) as seq:
            assert seq.cached_tokens == 128
            progress = seq.load_progress()
            assert (progress.state, progress.loading_tokens, progress.why) == ("loading", 128, None)
            with pytest.raises(errors.InvalidArgument, match="layer"):
                seq.wait_layer(0, 9)
            with cache.step([(seq, prompt[128:])]) as step:
                step.append(0, 0, rows[128:], rows[128:])
                q, out = np.ones((3, 1, 64), "f4"), np.zeros((3, 1, 64), "f4")
                with pytest.raises(errors.InvalidState, match="loaded"):
                    step.attend(0, 0, q, out)
                assert step.wait_layer(0, 0, 60000) and seq.wait_layer(0, 0)
                step.attend(0, 0, q, out)
                assert np.abs(out - reference(q, rows, rows, 1)).max() < 1e-5
            assert seq.load_progress().state == "complete" and seq.cancel_load() == len(prompt)
    # ... and as a whole.
    with fresh() as cache:
        with cache.prefetch(prompt) as prefetch:
            assert prefetch.decision.found_blocks == prefetch.decision.load_blocks == 8
            assert prefetch.decision.why == "cost_unknown" and prefetch.wait(60000)
        with cache.start(prompt) as seq, cache.step([(seq, prompt[seq.cached_tokens :])]) as step:
            assert seq.cached_tokens == 128
            step.append(0, 0, rows[128:], rows[128:])
            q, out = np.ones((3, 1, 64), "f4"), np.zeros((3, 1, 64), "f4")
            step.attend(0, 0, q, out)
            assert np.abs(out - reference(q, rows, rows, 1)).max() < 1e-5
        assert cache.prefetch([9] * 99).decision.why == "nothing_found"
        # With an image at 20, only what is before it.
        assert cache.prefetch(prompt, media=[(20, bytes(32))]).decision.device_tokens == 16


def test_import_is_fast():
    import subprocess
    import sys

    code = "import time; t = time.perf_counter(); import kvcache; print(time.perf_counter() - t)"
    times = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(3)]
    # The bench says how fast; this says that nothing heavy came in.
    print(f"import kvcache: {min(times) * 1000:.0f} ms")
    heavy = "import sys, kvcache; print(sorted({'numpy', 'torch', 'pycparser', 'asyncio'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, check=True).stdout.strip() == b"[]"
