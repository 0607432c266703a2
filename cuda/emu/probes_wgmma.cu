// Kernels that test the emulation of a warpgroup's products: against the definition, and with bugs
// planted. The sound one can run on a GPU too.
#include "../wgmma.cuh"
#include "probe.hpp"

using namespace kvc;

// Sums of a row of 8 columns, to or from device memory `[64][N]`.
template <int N, typename F> KVC_DEVICE void each_sum(F f) {
    const uint32_t lane = lane_id(), row = warp_id() * 16 + lane / 4;
KVC_UNROLL
    for (int i = 0; i < N / 2; ++i)
        f(i, (row + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2);
}

// Copies an image to shared memory and multiplies from it, one group of products a step. The input:
//   words 0 to 7   words of the image, steps, leading and stride of A and of B, swizzle of A and B
//   from word 8    where A and B begin in the image, for each step
//   from word 32   the image, then A row by row for products from registers
template <typename T, int N, Major A, Major B, bool Registers>
KVC_DEVICE void products(const kvc_probe_params &p) {
    uint32_t *shared = KVC_SMEM(uint32_t);
    const uint32_t words = p.in[0], steps = p.in[1];
    for (uint32_t i = thread_x(); i < words; i += block_threads()) shared[i] = p.in[32 + i];
    fence_async();
    sync_threads();
    float *out = reinterpret_cast<float *>(p.out);
    float d[N / 2];
    each_sum<N>([&](int i, uint32_t at) { d[i] = out[at]; });
    for (uint32_t step = 0; step < steps; ++step) {
        const unsigned char *image = KVC_SMEM(unsigned char);
        const uint64_t b = matrix_descriptor(image + p.in[9 + 2 * step], p.in[4], p.in[5],
                                             static_cast<Swizzle>(p.in[7]));
        wgmma_hold(d);
        if constexpr (Registers) {
            const uint32_t *rows = p.in + 32 + words, per_row = steps * 8;
            const uint32_t row = warp_id() * 16 + lane_id() / 4;
            uint32_t a[4];
            for (uint32_t i = 0; i < 4; ++i)
                a[i] = rows[(row + i % 2 * 8) * per_row + step * 8 + lane_id() % 4 + i / 2 * 4];
            wgmma_fence();
            wgmma<T, N, B>(d, a, b, true);
        } else {
            const uint64_t a = matrix_descriptor(image + p.in[8 + 2 * step], p.in[2], p.in[3],
                                                 static_cast<Swizzle>(p.in[6]));
            wgmma_fence();
            wgmma<T, N, A, B>(d, a, b, true);
        }
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    wgmma_hold(d);
    each_sum<N>([&](int i, uint32_t at) { out[at] = d[i]; });
}

template <typename T, int N> KVC_DEVICE void either_source(const kvc_probe_params &p) {
    constexpr Major k = Major::k, mn = Major::mn;
    switch (p.mode >> 1) {
    case 0: return products<T, N, k, k, false>(p);
    case 1: return products<T, N, mn, k, false>(p);
    case 2: return products<T, N, k, mn, false>(p);
    case 3: return products<T, N, mn, mn, false>(p);
    case 4: return products<T, N, k, k, true>(p);
    case 6: return products<T, N, k, mn, true>(p);
    default: return;
    }
}

// Mode: bit 0 bf16, bit 1 A by columns, bit 2 B by rows, bit 3 A in registers. `n` columns.
KVC_KERNEL(kvc_probe_wgmma, kvc_probe_params, 128, 1) {
    if (p.n == 8) return p.mode & 1 ? either_source<Bf16, 8>(p) : either_source<F16, 8>(p);
    if (p.n == 64) return p.mode & 1 ? either_source<Bf16, 64>(p) : either_source<F16, 64>(p);
    if (p.n == 256) return products<Bf16, 256, Major::k, Major::k, false>(p);
}

#ifdef KVC_EMULATE

// A 64x16 times B 16x8, twice, and one bug a mode; mode 0 is sound. Chunks of 8 rows lie one after
// another: two of every 8 rows of A, then two of B.
KVC_KERNEL(kvc_probe_wgmma_bug, kvc_probe_params, 128, 1) {
    uint32_t *shared = KVC_SMEM(uint32_t);
    const uint32_t t = thread_x(), n = block_threads();
    for (uint32_t i = t; i < 576; i += n) shared[i] = p.in[i];
    if (p.mode != 1) fence_async(); // 1: products do not see what was written
    sync_threads();
    uint64_t a = matrix_descriptor(shared, 128, 256, Swizzle::none);
    const uint64_t b = matrix_descriptor(shared + 512, 128, 256, Swizzle::none);
    if (p.mode == 7) a |= uint64_t(1) << 49;                                       // a base offset
    if (p.mode == 8) a = matrix_descriptor(shared + p.n, 128, 256, Swizzle::none); // past the end
    if (p.mode == 9 && t % 32 == 5) a += 16; // lanes with different operands
    float d[4] = {};
    if (p.mode != 2) wgmma_fence(); // 2: registers are not fenced
    wgmma<F16, 8, Major::k, Major::k>(d, a, b, true);
    if (p.mode != 6 || t < 96) // 6: the last warp leaves one out
        wgmma<F16, 8, Major::k, Major::k>(d, a, b, true);
    if (p.mode != 3) wgmma_commit();    // 3: the group is not closed
    if (p.mode == 4) sync_threads();    // 4: the operand is overwritten before the wait
    if (p.mode == 4)
        for (uint32_t i = t; i < 512; i += n) shared[i] = 0;
    if (p.mode == 4) fence_async();
    if (p.mode == 4) sync_threads();
    float early[4];
    memcpy(early, d, sizeof d);
    if (p.mode != 5) wgmma_wait<0>(); // 5: nobody waits
    if (p.mode != 10) memcpy(early, d, sizeof d); // 10: the sums are read before the wait
    float *out = reinterpret_cast<float *>(p.out);
    each_sum<8>([&](int i, uint32_t at) { out[at] = early[i]; });
}
#endif
