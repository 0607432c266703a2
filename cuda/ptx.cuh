// Every PTX instruction that the kernels use, wrapped once, with the body that the emulator runs
// beside it. Also the few names that differ between the two compilers: how a kernel is defined
// (KVC_KERNEL), how a device function is (KVC_DEVICE), and where shared memory is (KVC_SMEM).
//
// Shared memory is always dynamic and blocks are one-dimensional. Addresses are generic pointers;
// wrappers of instructions that want a shared address convert. Instructions of one architecture
// trap on the others. This file knows no number format beyond conversion, and no kernel.
#pragma once
#include <stdint.h>

#ifdef KVC_EMULATE
#include "emu/emu.hpp"
#else
#define KVC_DEVICE __device__ __forceinline__
#define KVC_UNROLL _Pragma("unroll")
#define KVC_ROLL _Pragma("unroll 1")
// A table in device memory, made when this is compiled.
#define KVC_TABLE static __device__ const
#define KVC_SITE_ONLY
#define KVC_SITE
// The dynamic shared memory of the block, as a T*.
#define KVC_SMEM(T) reinterpret_cast<T *>(::kvc::kvc_shared)
// Defines a kernel of one parameter struct `p`.
#define KVC_KERNEL(name, Params, threads, min_blocks)                                    \
    extern "C" __global__ void __launch_bounds__(threads, min_blocks)                    \
        name(const __grid_constant__ Params p)
#endif

namespace kvc {

#ifndef KVC_EMULATE
// What the widest swizzle of a warpgroup's operands wants.
extern __shared__ __align__(1024) unsigned char kvc_shared[];
#endif

constexpr uint32_t kFullMask = 0xffffffffu;

// ---- Where this thread is ----

#ifdef KVC_EMULATE
KVC_DEVICE uint32_t thread_x() { return emu::thread_x(); }
KVC_DEVICE uint32_t block_threads() { return emu::threads(); }
KVC_DEVICE uint32_t block_x() { return emu::block_x(); }
KVC_DEVICE uint32_t block_y() { return emu::block_y(); }
KVC_DEVICE uint32_t block_z() { return emu::block_z(); }
KVC_DEVICE uint32_t grid_x() { return emu::grid_x(); }
#else
KVC_DEVICE uint32_t thread_x() { return threadIdx.x; }
KVC_DEVICE uint32_t block_threads() { return blockDim.x; }
KVC_DEVICE uint32_t block_x() { return blockIdx.x; }
KVC_DEVICE uint32_t block_y() { return blockIdx.y; }
KVC_DEVICE uint32_t block_z() { return blockIdx.z; }
KVC_DEVICE uint32_t grid_x() { return gridDim.x; }
KVC_DEVICE uint32_t shared_address(const void *at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
#endif
// The same number, of which the compiler does not know that: what follows from it is computed where it
// is used, and takes no register through a loop.
KVC_DEVICE uint32_t opaque(uint32_t x) {
#ifndef KVC_EMULATE
    asm volatile("" : "+r"(x));
#endif
    return x;
}
KVC_DEVICE uint32_t lane_id() { return thread_x() & 31u; }
KVC_DEVICE uint32_t warp_id() { return thread_x() >> 5; }

// ---- Barriers and warp primitives ----

#ifdef KVC_EMULATE
KVC_DEVICE void sync_threads(KVC_SITE_ONLY) { emu::barrier(0, emu::threads(), true, site); }
// Barrier `id` (1 to 15) for `count` threads, a multiple of 32.
KVC_DEVICE void sync_named(uint32_t id, uint32_t count KVC_SITE) {
    emu::barrier(id, count, false, site);
}
KVC_DEVICE uint32_t warp_op(emu::Op op, uint32_t mask, uint32_t a, uint32_t b,
                            const emu::Site &site) {
    emu::Words w = {};
    w.in[0] = a;
    w.in[1] = b;
    emu::collective(op, mask, w, site);
    return w.out[0];
}
KVC_DEVICE void sync_warp(uint32_t mask = kFullMask KVC_SITE) {
    warp_op(emu::Op::sync, mask, 0, 0, site);
}
KVC_DEVICE uint32_t ballot(uint32_t mask, bool value KVC_SITE) {
    return warp_op(emu::Op::ballot, mask, value, 0, site);
}
KVC_DEVICE uint32_t shfl(uint32_t mask, uint32_t value, uint32_t from KVC_SITE) {
    return warp_op(emu::Op::shfl, mask, value, from, site);
}
KVC_DEVICE uint32_t shfl_up(uint32_t mask, uint32_t value, uint32_t by KVC_SITE) {
    return warp_op(emu::Op::shfl_up, mask, value, by, site);
}
KVC_DEVICE uint32_t shfl_down(uint32_t mask, uint32_t value, uint32_t by KVC_SITE) {
    return warp_op(emu::Op::shfl_down, mask, value, by, site);
}
KVC_DEVICE uint32_t shfl_xor(uint32_t mask, uint32_t value, uint32_t with KVC_SITE) {
    return warp_op(emu::Op::shfl_xor, mask, value, with, site);
}
KVC_DEVICE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
KVC_DEVICE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
#define KVC_PASS_SITE , site
#else
KVC_DEVICE void sync_threads() { __syncthreads(); }
KVC_DEVICE void sync_named(uint32_t id, uint32_t count) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
KVC_DEVICE void sync_warp(uint32_t mask = kFullMask) { __syncwarp(mask); }
KVC_DEVICE uint32_t ballot(uint32_t mask, bool value) { return __ballot_sync(mask, value); }
KVC_DEVICE uint32_t shfl(uint32_t mask, uint32_t value, uint32_t from) {
    return __shfl_sync(mask, value, from);
}
KVC_DEVICE uint32_t shfl_up(uint32_t mask, uint32_t value, uint32_t by) {
    return __shfl_up_sync(mask, value, by);
}
KVC_DEVICE uint32_t shfl_down(uint32_t mask, uint32_t value, uint32_t by) {
    return __shfl_down_sync(mask, value, by);
}
KVC_DEVICE uint32_t shfl_xor(uint32_t mask, uint32_t value, uint32_t with) {
    return __shfl_xor_sync(mask, value, with);
}
KVC_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
KVC_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
#define KVC_PASS_SITE
#endif
KVC_DEVICE float shfl_xor(uint32_t mask, float value, uint32_t with KVC_SITE) {
    return as_float(shfl_xor(mask, as_bits(value), with KVC_PASS_SITE));
}
KVC_DEVICE int64_t shfl(uint32_t mask, int64_t value, uint32_t from KVC_SITE) {
    const uint64_t bits = static_cast<uint64_t>(value);
    const uint64_t low = shfl(mask, static_cast<uint32_t>(bits), from KVC_PASS_SITE);
    const uint64_t high = shfl(mask, static_cast<uint32_t>(bits >> 32), from KVC_PASS_SITE);
    return static_cast<int64_t>(high << 32 | low);
}
// The largest of all lanes.
KVC_DEVICE uint32_t max_of_warp(uint32_t value KVC_SITE) {
#ifdef KVC_EMULATE
    for (uint32_t by = 1, other; by < 32; by *= 2)
        value = (other = shfl_xor(kFullMask, value, by, site)) > value ? other : value;
    return value;
#else
    return __reduce_max_sync(kFullMask, value);
#endif
}
// From lane `from` of the eight that this lane is one of.
KVC_DEVICE uint32_t shfl_of_8(uint32_t mask, uint32_t value, uint32_t from KVC_SITE) {
#ifdef KVC_EMULATE
    return shfl(mask, value, (lane_id() & 24u) + from, site);
#else
    return __shfl_sync(mask, value, from, 8);
#endif
}
KVC_DEVICE int64_t shfl_of_8(uint32_t mask, int64_t value, uint32_t from KVC_SITE) {
    const uint64_t bits = static_cast<uint64_t>(value);
    const uint64_t low = shfl_of_8(mask, static_cast<uint32_t>(bits), from KVC_PASS_SITE);
    const uint64_t high = shfl_of_8(mask, static_cast<uint32_t>(bits >> 32), from KVC_PASS_SITE);
    return static_cast<int64_t>(high << 32 | low);
}

// ---- Integers ----

#ifdef KVC_EMULATE
// The upper half of a 128-bit product.
KVC_DEVICE uint64_t mul_high(uint64_t a, uint64_t b) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
// The lowest bit that is set, of at least one.
KVC_DEVICE uint32_t find_first(uint32_t bits) {
    return static_cast<uint32_t>(__builtin_ctz(bits));
}
#else
KVC_DEVICE uint64_t mul_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
KVC_DEVICE uint32_t find_first(uint32_t bits) { return static_cast<uint32_t>(__ffs(bits)) - 1; }
#endif

// ---- Atomics on device memory, and the fence that orders plain writes before them ----

#ifdef KVC_EMULATE
KVC_DEVICE uint32_t atomic_add(uint32_t *at, uint32_t value KVC_SITE) {
    emu::preempt();
    emu::check_global(at, 4, 4, site);
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
KVC_DEVICE uint32_t atomic_or(uint32_t *at, uint32_t value KVC_SITE) {
    emu::preempt();
    emu::check_global(at, 4, 4, site);
    return __atomic_fetch_or(at, value, __ATOMIC_RELAXED);
}
KVC_DEVICE uint32_t atomic_max(uint32_t *at, uint32_t value KVC_SITE) {
    emu::preempt();
    emu::check_global(at, 4, 4, site);
    uint32_t old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED,
                                                       __ATOMIC_RELAXED)) {
    }
    return old;
}
KVC_DEVICE void fence_device() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
#else
KVC_DEVICE uint32_t atomic_add(uint32_t *at, uint32_t value) { return atomicAdd(at, value); }
KVC_DEVICE uint32_t atomic_or(uint32_t *at, uint32_t value) { return atomicOr(at, value); }
KVC_DEVICE uint32_t atomic_max(uint32_t *at, uint32_t value) { return atomicMax(at, value); }
KVC_DEVICE void fence_device() { __threadfence(); }
#endif

// ---- Loads and stores of 16 bytes ----

struct alignas(16) Vec16 {
    uint32_t word[4];
};

// Reads device memory that nobody writes during the kernel, past L1.
KVC_DEVICE Vec16 load_stream(const void *at KVC_SITE) {
    Vec16 v;
#ifdef KVC_EMULATE
    emu::check_global(at, 16, 16, site);
    memcpy(&v, at, 16);
#else
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(at));
#endif
    return v;
}
// Reads device memory written by other blocks before a fence: never from a stale L1 line.
KVC_DEVICE Vec16 load_fresh_16(const void *at KVC_SITE) {
    Vec16 v;
#ifdef KVC_EMULATE
    emu::check_global(at, 16, 16, site);
    memcpy(&v, at, 16);
#else
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(at)
                 : "memory");
#endif
    return v;
}
KVC_DEVICE float load_fresh(const float *at KVC_SITE) {
#ifdef KVC_EMULATE
    emu::check_global(at, 4, 4, site);
    return *at;
#else
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(at) : "memory");
    return value;
#endif
}
KVC_DEVICE void store_16(void *at, const Vec16 &v KVC_SITE) {
#ifdef KVC_EMULATE
    emu::check_global(at, 16, 16, site);
    memcpy(at, &v, 16);
#else
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.word[0]),
                 "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
#endif
}

// ---- Asynchronous copies into shared memory ----

// Copies 16 bytes, or writes zeros and reads nothing where `valid` is false.
KVC_DEVICE void cp_async_16(void *to, const void *from, bool valid KVC_SITE) {
#ifdef KVC_EMULATE
    emu::cp_async(to, from, 16, valid ? 16 : 0, site);
#else
    const uint32_t bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
#endif
}
KVC_DEVICE void cp_async_commit() {
#ifdef KVC_EMULATE
    emu::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `Left` of this thread's newest groups are under way.
template <int Left> KVC_DEVICE void cp_async_wait() {
#ifdef KVC_EMULATE
    emu::cp_async_wait(Left);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
#endif
}

// A barrier in shared memory for `count` arrivals. Needs mbar_fence_init and a block barrier
// before others use it.
KVC_DEVICE void mbar_init(uint64_t *bar, uint32_t count KVC_SITE) {
#ifdef KVC_EMULATE
    emu::mbar_init(bar, count, site);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count)
                 : "memory");
#endif
}
// Makes initialised barriers visible to the unit that performs bulk copies (sm_90).
KVC_DEVICE void mbar_fence_init() {
#if !defined(KVC_EMULATE) && defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
#endif
}
// Orders what this thread did to shared memory before the bulk copies into it that are issued after
// a barrier (sm_90).
KVC_DEVICE void fence_bulk() {
#if !defined(KVC_EMULATE) && defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
#endif
}
KVC_DEVICE void mbar_arrive(uint64_t *bar KVC_SITE) {
#ifdef KVC_EMULATE
    emu::mbar_arrive(bar, 0, site);
#else
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(
                     shared_address(bar))
                 : "memory");
#endif
}
// Arrives `count` times (sm_90).
KVC_DEVICE void mbar_arrive_many(uint64_t *bar, uint32_t count KVC_SITE) {
#ifdef KVC_EMULATE
    for (uint32_t i = 0; i < count; ++i) emu::mbar_arrive(bar, 0, site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                     shared_address(bar)),
                 "r"(count)
                 : "memory");
#elif defined(__CUDA_ARCH__)
    __trap();
#endif
}
// Arrives, and announces `bytes` that bulk copies will bring in this phase (sm_90).
KVC_DEVICE void mbar_arrive_expect(uint64_t *bar, uint32_t bytes KVC_SITE) {
#ifdef KVC_EMULATE
    emu::mbar_arrive(bar, bytes, site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b64 state;\n"
                 "mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                     shared_address(bar)),
                 "r"(bytes)
                 : "memory");
#elif defined(__CUDA_ARCH__)
    __trap();
#endif
}
// Waits for the end of the phase of this parity (sm_90 may suspend the thread meanwhile).
KVC_DEVICE void mbar_wait(uint64_t *bar, uint32_t parity KVC_SITE) {
#ifdef KVC_EMULATE
    emu::mbar_wait(bar, parity, site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred done;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(shared_address(bar)),
                 "r"(parity)
                 : "memory");
#elif defined(__CUDA_ARCH__)
    asm volatile("{\n.reg .pred done;\nagain:\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(shared_address(bar)),
                 "r"(parity)
                 : "memory");
#endif
}
// Copies `bytes` (a multiple of 16) from device to shared memory; `bar` counts them (sm_90).
KVC_DEVICE void bulk_copy(void *to, const void *from, uint32_t bytes, uint64_t *bar KVC_SITE) {
#ifdef KVC_EMULATE
    emu::bulk_copy(to, from, bytes, bar, site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(bar))
                 : "memory");
#elif defined(__CUDA_ARCH__)
    __trap();
#endif
}

// ---- Matrix fragments ----

// Loads four 8x8 matrices of 16-bit elements; lane 8i+r gives the address of row r of matrix i.
KVC_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void *row KVC_SITE) {
#ifdef KVC_EMULATE
    emu::Words w = {};
    memcpy(w.in, &row, sizeof row);
    emu::collective(emu::Op::ldmatrix, kFullMask, w, site);
    memcpy(r, w.out, sizeof r);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}
// The same, each matrix transposed.
KVC_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row KVC_SITE) {
#ifdef KVC_EMULATE
    emu::Words w = {};
    memcpy(w.in, &row, sizeof row);
    emu::collective(emu::Op::ldmatrix_trans, kFullMask, w, site);
    memcpy(r, w.out, sizeof r);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}
// Transposes an 8x8 matrix of 16-bit elements held by the warp.
KVC_DEVICE uint32_t movmatrix_trans(uint32_t a KVC_SITE) {
#ifdef KVC_EMULATE
    return warp_op(emu::Op::movmatrix_trans, kFullMask, a, 0, site);
#else
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
#endif
}

#ifdef KVC_EMULATE
KVC_DEVICE void mma_op(emu::Op op, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       const emu::Site &site) {
    emu::Words w;
    memcpy(w.in, a, sizeof a);
    memcpy(w.in + 4, b, sizeof b);
    memcpy(w.in + 6, c, sizeof c);
    emu::collective(op, kFullMask, w, site);
    memcpy(c, w.out, sizeof c);
}
#else
#define KVC_MMA(type)                                                                    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                  \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"  \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif
// c += a * b for a 16x16, b 16x8, c 16x8: f16 inputs, f32 sums.
KVC_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] KVC_SITE) {
#ifdef KVC_EMULATE
    mma_op(emu::Op::mma_f16, c, a, b, site);
#else
    KVC_MMA("f16");
#endif
}
// The same with bf16 inputs.
KVC_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] KVC_SITE) {
#ifdef KVC_EMULATE
    mma_op(emu::Op::mma_bf16, c, a, b, site);
#else
    KVC_MMA("bf16");
#endif
}

// ---- Conversions and approximate functions ----

#ifdef KVC_EMULATE
KVC_DEVICE uint32_t population(uint32_t bits) {
    return static_cast<uint32_t>(__builtin_popcount(bits));
}
KVC_DEVICE uint32_t pack_f16(float low, float high) {
    return emu::f32_to_f16(low) | static_cast<uint32_t>(emu::f32_to_f16(high)) << 16;
}
KVC_DEVICE uint32_t pack_bf16(float low, float high) {
    return emu::f32_to_bf16(low) | static_cast<uint32_t>(emu::f32_to_bf16(high)) << 16;
}
KVC_DEVICE float widen_f16(uint16_t bits) { return emu::f16_to_f32(bits); }
KVC_DEVICE float exp2_approx(float x) { return exp2f(x); }
KVC_DEVICE float log2_approx(float x) { return log2f(x); }
KVC_DEVICE float rcp_approx(float x) { return 1.0f / x; }
template <typename F> KVC_DEVICE uint32_t each_f16(uint32_t a, uint32_t b, F f) {
    const auto one = [&](uint32_t shift) {
        return f(emu::f16_to_f32(static_cast<uint16_t>(a >> shift)),
                 emu::f16_to_f32(static_cast<uint16_t>(b >> shift)));
    };
    return pack_f16(one(0), one(16));
}
KVC_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    return each_f16(a, b, [](float x, float y) { return x - y; });
}
KVC_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    return each_f16(a, b, [](float x, float y) { return x * y; });
}
KVC_DEVICE uint32_t max_f16x2(uint32_t a, uint32_t b) {
    return each_f16(a, b, [](float x, float y) { return fmaxf(x, y); });
}
KVC_DEVICE uint32_t min_f16x2(uint32_t a, uint32_t b) {
    return each_f16(a, b, [](float x, float y) { return fminf(x, y); });
}
template <typename F> KVC_DEVICE uint32_t pick_bf16x2(uint32_t a, uint32_t b, F first) {
    uint32_t picked = 0;
    for (uint32_t shift = 0; shift < 32; shift += 16) {
        const uint32_t x = a >> shift << 16, y = b >> shift << 16;
        const bool nan = (x & 0x7fffffffu) > 0x7f800000u || (y & 0x7fffffffu) > 0x7f800000u;
        // As integers of one order: -0 is below 0.
        const auto order = [](uint32_t v) {
            return static_cast<int32_t>((v >> 31) != 0 ? v ^ 0x7fffffffu : v);
        };
        const uint32_t bits = nan ? 0x7fff0000u : first(order(x), order(y)) ? x : y;
        picked |= bits >> 16 << shift;
    }
    return picked;
}
KVC_DEVICE uint32_t min_nan_bf16x2(uint32_t a, uint32_t b) {
    return pick_bf16x2(a, b, [](int32_t x, int32_t y) { return x < y; });
}
KVC_DEVICE uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
    return pick_bf16x2(a, b, [](int32_t x, int32_t y) { return x > y; });
}
KVC_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    const auto one = [&](uint32_t i) {
        const auto half = [&](uint32_t x) { return emu::f16_to_f32(static_cast<uint16_t>(x >> i)); };
        return fmaf(half(a), half(b), half(c));
    };
    return pack_f16(one(0), one(16));
}
KVC_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t d = 0;
    for (uint32_t i = 0; i < 4; ++i)
        d |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return d;
}
KVC_DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
// The larger, NaN where one is.
KVC_DEVICE float max_nan_f32(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }
KVC_DEVICE float mul_rn(float a, float b) { return a * b; }
KVC_DEVICE float add_rn(float a, float b) { return a + b; }
KVC_DEVICE float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
// The same kept from 0 to 1, 0 of NaN.
KVC_DEVICE float fma_within_1(float a, float b, float c) {
    const float x = fmaf(a, b, c);
    return x > 0.0f ? x < 1.0f ? x : 1.0f : 0.0f;
}
// The integer at or below `x`, of less than 2^22, plus an integer from 2^23 to 2^24.
KVC_DEVICE float add_floor(float x, float integer) { return floorf(x) + integer; }
KVC_DEVICE float div_rn(float a, float b) { return a / b; }
KVC_DEVICE float sqrt_rn(float a) { return sqrtf(a); }
KVC_DEVICE float round_even(float x) { return rintf(x); }
KVC_DEVICE float floor_f32(float x) { return floorf(x); }
KVC_DEVICE float ceil_f32(float x) { return ceilf(x); }
#else
KVC_DEVICE uint32_t population(uint32_t bits) { return static_cast<uint32_t>(__popc(bits)); }
// Two floats, rounded to nearest even, in one word.
KVC_DEVICE uint32_t pack_f16(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
KVC_DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
KVC_DEVICE float widen_f16(uint16_t bits) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(bits));
    return d;
}
KVC_DEVICE float exp2_approx(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}
KVC_DEVICE float log2_approx(float x) {
    float d;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}
KVC_DEVICE float rcp_approx(float x) {
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}
KVC_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
KVC_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
KVC_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
KVC_DEVICE uint32_t max_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// Subnormal numbers are not flushed: bits below those of infinity are taken by their order.
KVC_DEVICE uint32_t min_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// The smaller and the larger, NaN where one is.
KVC_DEVICE uint32_t min_nan_bf16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
KVC_DEVICE uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
// Two floats as two bytes, rounded to nearest even and saturating.
KVC_DEVICE uint32_t pack_e4m3(float low, float high) {
    uint16_t d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
    return d;
}
KVC_DEVICE uint32_t pack_e5m2(float low, float high) {
    uint16_t d;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
    return d;
}
// Two bytes of e4m3.
KVC_DEVICE uint32_t f16x2_from_e4m3(uint32_t two) {
    uint32_t d;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(static_cast<uint16_t>(two)));
    return d;
}
// Four bytes of e4m3, the lower two and the upper two: said so that neither is moved before.
KVC_DEVICE void f16x2_from_e4m3(uint32_t four, uint32_t &low, uint32_t &high) {
    asm("{\n.reg .b16 first, second;\nmov.b32 {first, second}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, first;\ncvt.rn.f16x2.e4m3x2 %1, second;\n}"
        : "=r"(low), "=r"(high)
        : "r"(four));
}
#endif
// Four bytes of the eight of `a` and `b`, each by a nibble of the selector.
KVC_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}
// One instruction, also where both others are constants.
KVC_DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}
KVC_DEVICE float max_nan_f32(float a, float b) {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}
// Rounded to nearest even, subnormals kept, and never contracted: for bits that must be those of the
// CPU.
KVC_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
KVC_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
KVC_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
KVC_DEVICE float fma_within_1(float a, float b, float c) {
    float d;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}
// The integer at or below `x`, of less than 2^22, plus an integer from 2^23 to 2^24: rounded down.
KVC_DEVICE float add_floor(float x, float integer) { return __fadd_rd(x, integer); }
KVC_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
KVC_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }
KVC_DEVICE float round_even(float x) { return rintf(x); }
KVC_DEVICE float floor_f32(float x) { return floorf(x); }
KVC_DEVICE float ceil_f32(float x) { return ceilf(x); }
#endif

} // namespace kvc
