// Kernels that test the emulator: each primitive against its definition, and each detector on a bug
// planted for it. They use the wrappers of ptx.cuh alone, so a GPU can run the sound ones too.
#include "../ptx.cuh"
#include "probe.hpp"

using namespace kvc;

// Eight results a lane: shuffles of all kinds, ballot, and a primitive of half a warp.
KVC_KERNEL(kvc_probe_warp, kvc_probe_params, 128, 1) {
    const uint32_t t = thread_x(), value = p.in[t], lane = lane_id();
    uint32_t *out = p.out + t * 8;
    out[0] = shfl(kFullMask, value, p.in[t] % 32);
    out[1] = shfl_up(kFullMask, value, p.n);
    out[2] = shfl_down(kFullMask, value, p.n);
    out[3] = shfl_xor(kFullMask, value, p.n);
    out[4] = ballot(kFullMask, value & 1);
    const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    out[5] = ballot(half, value & 2);
    const int64_t wide = static_cast<int64_t>(value) << 32 | t;
    const int64_t got = shfl(kFullMask, wide, lane ^ 1);
    out[6] = static_cast<uint32_t>(got >> 32);
    out[7] = static_cast<uint32_t>(got);
}

// Four 8x8 matrices through shared memory: four words of ldmatrix, four transposed, one movmatrix.
KVC_KERNEL(kvc_probe_ldmatrix, kvc_probe_params, 32, 1) {
    uint32_t *shared = KVC_SMEM(uint32_t);
    const uint32_t t = thread_x();
    for (uint32_t i = 0; i < 4; ++i) shared[t * 4 + i] = p.in[t * 4 + i];
    sync_warp();
    uint32_t r[4];
    ldmatrix_x4(r, shared + t * 4);
    for (uint32_t i = 0; i < 4; ++i) p.out[t * 9 + i] = r[i];
    p.out[t * 9 + 8] = movmatrix_trans(r[0]);
    ldmatrix_x4_trans(r, shared + t * 4);
    for (uint32_t i = 0; i < 4; ++i) p.out[t * 9 + 4 + i] = r[i];
}

// c += a * b from row-major matrices in device memory; mode 0 f16, 1 bf16.
KVC_KERNEL(kvc_probe_mma, kvc_probe_params, 32, 1) {
    const uint16_t *a = reinterpret_cast<const uint16_t *>(p.in);
    const uint16_t *b = a + 16 * 16;
    float *c = reinterpret_cast<float *>(p.out);
    const uint32_t g = thread_x() / 4, t = thread_x() % 4;
    uint32_t fa[4], fb[2];
    float fc[4];
    for (uint32_t i = 0; i < 4; ++i) {
        const uint16_t *at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
        fa[i] = at[0] | static_cast<uint32_t>(at[1]) << 16;
        fc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    }
    for (uint32_t i = 0; i < 2; ++i) {
        const uint16_t *at = b + (2 * t + i * 8) * 8 + g;
        fb[i] = at[0] | static_cast<uint32_t>(at[8]) << 16;
    }
    if (p.mode == 0)
        mma_f16(fc, fa, fb);
    else
        mma_bf16(fc, fa, fb);
    for (uint32_t i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

// Three groups of cp.async, the first waited for alone; odd threads copy zeros.
KVC_KERNEL(kvc_probe_cp_async, kvc_probe_params, 32, 1) {
    uint32_t *shared = KVC_SMEM(uint32_t);
    const uint32_t t = thread_x();
    for (uint32_t group = 0; group < 3; ++group) {
        cp_async_16(shared + (group * 32 + t) * 4, p.in + (group * 32 + t) * 4, t % 2 == 0);
        cp_async_commit();
    }
    cp_async_wait<2>();
    for (uint32_t i = 0; i < 4; ++i) p.out[t * 4 + i] = shared[t * 4 + i];
    cp_async_wait<0>();
    sync_warp();
    for (uint32_t i = 0; i < 8; ++i) p.out[128 + t * 8 + i] = shared[128 + t * 8 + i];
}

// A ring of two buffers filled by bulk copies, one producer thread, the other warp consuming:
// n rounds of 256 bytes.
KVC_KERNEL(kvc_probe_bulk, kvc_probe_params, 64, 1) {
    uint64_t *full = KVC_SMEM(uint64_t), *empty = full + 2;
    uint32_t *data = KVC_SMEM(uint32_t) + 32;
    if (thread_x() == 0) {
        for (uint32_t i = 0; i < 2; ++i) {
            mbar_init(full + i, 1);
            mbar_init(empty + i, 32);
        }
        mbar_fence_init();
    }
    sync_threads();
    for (uint32_t round = 0; round < p.n; ++round) {
        const uint32_t slot = round % 2, turn = round / 2;
        if (thread_x() == 0) {
            if (turn > 0) mbar_wait(empty + slot, (turn - 1) & 1);
            mbar_arrive_expect(full + slot, 256);
            bulk_copy(data + slot * 64, p.in + round * 64, 256, full + slot);
        } else if (warp_id() == 1) {
            mbar_wait(full + slot, turn & 1);
            const uint32_t lane = lane_id();
            p.out[round * 64 + lane] = data[slot * 64 + lane];
            p.out[round * 64 + 32 + lane] = data[slot * 64 + 32 + lane];
            mbar_arrive(empty + slot);
        }
    }
}

// Atomics over many blocks, and a named barrier of two of the four warps.
KVC_KERNEL(kvc_probe_atomics, kvc_probe_params, 128, 1) {
    atomic_add(p.out, thread_x());
    atomic_or(p.out + 1, 1u << (block_x() % 32));
    atomic_max(p.out + 2, block_x() * 128 + thread_x());
    fence_device();
    uint32_t *shared = KVC_SMEM(uint32_t);
    if (warp_id() < 2) {
        shared[thread_x()] = thread_x();
        sync_named(1, 64);
        if (shared[63 - thread_x()] != 63 - thread_x()) atomic_add(p.out + 3, 1);
    }
}

// Conversions of n words taken as floats: f16 and bf16 packed with zero, and f16 widened.
KVC_KERNEL(kvc_probe_convert, kvc_probe_params, 32, 1) {
    for (uint32_t i = thread_x(); i < p.n; i += 32) {
        const float x = as_float(p.in[i]);
        p.out[i * 3] = pack_f16(x, 0.0f);
        p.out[i * 3 + 1] = pack_bf16(0.0f, x);
        p.out[i * 3 + 2] = as_bits(widen_f16(static_cast<uint16_t>(p.in[i])));
    }
}

#ifdef KVC_EMULATE

// Each block counts itself and looks, up to n times, for another one, until any block has seen one:
// it can only be there if blocks run side by side. Then every thread writes a word of its own, drawn by
// the order in which the schedule runs the block's threads.
KVC_KERNEL(kvc_probe_blocks, kvc_probe_params, 64, 1) {
    uint32_t *shared = KVC_SMEM(uint32_t);
    const uint32_t t = thread_x();
    if (t == 0) {
        uint32_t here = atomic_add(p.out, 1) + 1;
        for (uint32_t i = 0; i < p.n && here < 2 && atomic_max(p.out + 1, here) < 2; ++i)
            here = atomic_add(p.out, 0);
        atomic_max(p.out + 1, here);
    }
    shared[0] = 0;
    sync_threads();
    shared[0] = shared[0] * 33 + t;
    p.out[2 + block_x() * 64 + t] = shared[0];
    sync_threads();
    if (t == 0) atomic_add(p.out, ~0u);
}

static int recurse(volatile uint32_t *depth) {
    volatile char hold[4096];
    hold[0] = static_cast<char>(*depth);
    *depth = *depth + 1;
    return *depth == 0 ? 0 : recurse(depth) + hold[0];
}

// One bug a mode. Reads of what nobody wrote go to `out`, where the test finds them.
KVC_KERNEL(kvc_probe_bug, kvc_probe_params, 64, 1) {
    uint32_t *shared = KVC_SMEM(uint32_t);
    const uint32_t t = thread_x(), n = block_threads();
    switch (p.mode) {
    case 0: // sound: what the next two modes do, with their barrier
    case 1: // no barrier before the next thread's word is read
    case 2: // no barrier before the previous thread's word is read
        shared[t] = t;
        if (p.mode == 0) sync_threads();
        p.out[t] = shared[p.mode == 2 ? (t + n - 1) % n : (t + 1) % n];
        break;
    case 3: // reads shared memory that nobody wrote
        p.out[t] = shared[t];
        break;
    case 4: // reads past shared memory
        p.out[t] = shared[p.n];
        break;
    case 5: // writes before shared memory
        if (t == 0) *(shared - 1) = 1;
        break;
    case 6: { // a matrix load past shared memory
        uint32_t r[4];
        ldmatrix_x4(r, shared + p.n);
        p.out[t] = r[0];
        break;
    }
    case 7: // reads past an allocation
        p.out[t] = p.in[p.n];
        break;
    case 8: // writes just past an allocation, where alignment leaves room
        if (t == 0) p.out[p.n] = 1;
        break;
    case 9: // a vector load from memory that is no device memory
        p.out[t] = load_stream(&p).word[0];
        break;
    case 10: // a mask without the caller
        ballot(0xfffffffeu, true);
        break;
    case 11: // two masks
        p.out[t] = ballot(t % 2 ? 0xffffffffu : 0x55555555u, true);
        break;
    case 12: // two primitives
        p.out[t] = t % 2 ? ballot(kFullMask, true) : shfl(kFullMask, t, 0);
        break;
    case 13: // a lane that has returned
        if (t == 5) return;
        sync_warp();
        break;
    case 14: // a shuffle from a lane outside the mask
        if (t < 16) p.out[t] = shfl(0x0000ffffu, t, 20);
        break;
    case 15: // two barriers
        if (t < 32)
            sync_threads();
        else
            sync_threads();
        break;
    case 16: // a thread returns, the others wait
        if (t == 7) return;
        sync_threads();
        break;
    case 17: // a lane that never comes
        if (t < 31) sync_warp();
        if (t >= 31) sync_threads();
        break;
    case 18: // a copy to an address that is not aligned
        cp_async_16(shared + 1, p.in, true);
        break;
    case 19: // no wait before a copy is read
        cp_async_16(shared + t * 4, p.in + t * 4, true);
        cp_async_commit();
        p.out[t] = shared[t * 4];
        break;
    case 20: // a buffer refilled while it is read
        shared[t * 4] = t;
        cp_async_16(shared + t * 4, p.in + t * 4, true);
        p.out[t] = shared[t * 4];
        cp_async_commit();
        cp_async_wait<0>();
        break;
    case 21: // an mbarrier that nobody initialised
        mbar_arrive(KVC_SMEM(uint64_t));
        break;
    case 22: // a bulk copy of an odd size
    case 23: // a bulk copy that nobody waits for
    case 24: // a phase that never ends
    case 25: // more arrivals than it counts
        if (t == 0) {
            uint64_t *bar = KVC_SMEM(uint64_t);
            mbar_init(bar, 2);
            if (p.mode == 22) bulk_copy(shared + 4, p.in, 24, bar);
            if (p.mode == 23) bulk_copy(shared + 4, p.in, 32, bar);
            if (p.mode == 24) mbar_wait(bar, 0);
            if (p.mode == 25) {
                mbar_arrive_expect(bar, 16);
                mbar_arrive(bar);
                mbar_arrive(bar);
            }
        }
        break;
    case 26: { // a stack without end
        volatile uint32_t depth = 1;
        p.out[t] = static_cast<uint32_t>(recurse(&depth));
        break;
    }
    case 27: { // past a local array: for AddressSanitizer
        volatile uint32_t local[4] = {t, t, t, t};
        volatile uint32_t *volatile at = local; // which hides its size
        p.out[t] = at[p.n];
        break;
    }
    case 28: { // signed overflow: for UndefinedBehaviorSanitizer
        const int32_t big = static_cast<int32_t>(p.n);
        p.out[t] = static_cast<uint32_t>(big + big);
        break;
    }
    default: break;
    }
}

KVC_DECLARE_KERNEL(kvc_probe_quant, kvc_probe_params)
KVC_DECLARE_KERNEL(kvc_probe_wgmma, kvc_probe_params)
KVC_DECLARE_KERNEL(kvc_probe_wgmma_bug, kvc_probe_params)

namespace kvc::emu {
#define KVC_PROBE(name) KVC_KERNEL_ENTRY(name, kvc_probe_params)
const Kernel probes[] = {
    KVC_PROBE(kvc_probe_warp) KVC_PROBE(kvc_probe_ldmatrix) KVC_PROBE(kvc_probe_mma)
    KVC_PROBE(kvc_probe_cp_async) KVC_PROBE(kvc_probe_bulk) KVC_PROBE(kvc_probe_atomics)
    KVC_PROBE(kvc_probe_convert) KVC_PROBE(kvc_probe_bug)
    KVC_PROBE(kvc_probe_blocks) KVC_PROBE(kvc_probe_quant)
    KVC_PROBE(kvc_probe_wgmma) KVC_PROBE(kvc_probe_wgmma_bug) {nullptr, 0, 0, nullptr},
};
} // namespace kvc::emu
#endif
