// Products of a warpgroup (sm_90a): m64nNk16 with f16 or bf16 inputs and f32 sums, which run beside
// the four warps that start them. The PTX of ptx.cuh's kind, in a file of its own for its length.
//
// The order of a use: fence_async and a barrier after ordinary writes to shared memory; wgmma_fence;
// any number of products; wgmma_commit; wgmma_wait. Between the first product and the wait nobody
// touches the sums, the registers of A, or the operands in shared memory. The compiler knows nothing
// of this: wgmma_hold goes before the fence on sums that were written, and after the wait on sums
// that will be read. All threads of the four warps take part alike. Elsewhere than on sm_90a these
// functions trap.
#pragma once
#include "num.cuh"

#if !defined(KVC_EMULATE) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KVC_WGMMA 1
#endif

namespace kvc {

// How 16-byte chunks are permuted within 8 rows of so many bytes, as tensor maps write them: the
// address bits from 4 on are xored with those from 7 on. What is swizzled begins at a multiple of 8
// rows; a start within it needs no more than its own address.
enum class Swizzle : uint32_t { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

// Which index of an operand runs along the rows in shared memory: k, or the row of A (column of B).
enum class Major : int { k = 0, mn = 1 };

// Describes an operand of 16 k-steps in shared memory. Chunks are 16 bytes, eight elements.
//   Major::k   rows of the swizzle's width, 8 of them together; `stride` bytes from those to the
//              next 8. Without a swizzle a row is one chunk, and `leading` bytes lead to the other.
//   Major::mn  8 k-steps of the swizzle's width together; `leading` bytes from a width to the next,
//              `stride` bytes to the next 8 k-steps. Without a swizzle a width is one chunk, and the
//              two change roles.
// All are multiples of 16 below 2^18.
KVC_DEVICE uint64_t matrix_descriptor(const void *start, uint32_t leading, uint32_t stride,
                                      Swizzle swizzle) {
#ifdef KVC_EMULATE
    const uint64_t address = emu::shared_offset(start);
#else
    const uint64_t address = shared_address(start);
#endif
    return (address & 0x3ffff) >> 4 | static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
           static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 |
           static_cast<uint64_t>(swizzle) << 62;
}

// Makes this thread's ordinary writes to shared memory visible to products and bulk copies that are
// started after a barrier.
KVC_DEVICE void fence_async() {
#ifdef KVC_EMULATE
    emu::fence_async();
#elif defined(KVC_WGMMA)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    __trap();
#endif
}
// Before the first product after this warp touched the registers that products use.
KVC_DEVICE void wgmma_fence(KVC_SITE_ONLY) {
#ifdef KVC_EMULATE
    emu::warpgroup(emu::Op::wgmma_fence, nullptr, 0, site);
#elif defined(KVC_WGMMA)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    __trap();
#endif
}
// Closes a group of the products started since the last one.
KVC_DEVICE void wgmma_commit(KVC_SITE_ONLY) {
#ifdef KVC_EMULATE
    emu::warpgroup(emu::Op::wgmma_commit, nullptr, 0, site);
#elif defined(KVC_WGMMA)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    __trap();
#endif
}
// Waits until at most `Left` of the newest groups are under way.
template <int Left> KVC_DEVICE void wgmma_wait(KVC_SITE_ONLY) {
#ifdef KVC_EMULATE
    emu::warpgroup(emu::Op::wgmma_wait, nullptr, Left, site);
#elif defined(KVC_WGMMA)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
#else
    __trap();
#endif
}
// Keeps the compiler from moving reads and writes of sums past this place.
template <int Words> KVC_DEVICE void wgmma_hold(float (&d)[Words]) {
#ifdef KVC_EMULATE
    (void)d;
#else
KVC_UNROLL
    for (int i = 0; i < Words; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

#ifdef KVC_EMULATE
template <typename T, int N>
KVC_DEVICE void wgmma_op(float *d, emu::Product product, const emu::Site &site) {
    product.d = d;
    product.columns = N;
    product.bf16 = T::id == kBf16;
    emu::warpgroup(emu::Op::wgmma, &product, 0, site);
}
#elif defined(KVC_WGMMA)
// Lists of registers and of operands, ten and eight at a time.
#define KVC_T10(t)                                                                       \
    "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9"
#define KVC_T30 KVC_T10("") "," KVC_T10("1") "," KVC_T10("2")
#define KVC_T60 KVC_T30 "," KVC_T10("3") "," KVC_T10("4") "," KVC_T10("5")
#define KVC_T90 KVC_T60 "," KVC_T10("6") "," KVC_T10("7") "," KVC_T10("8")
#define KVC_T120 KVC_T90 "," KVC_T10("9") "," KVC_T10("10") "," KVC_T10("11")
#define KVC_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KVC_F8(i) KVC_F4(i), KVC_F4(i + 4)
#define KVC_F32(i) KVC_F8(i), KVC_F8(i + 8), KVC_F8(i + 16), KVC_F8(i + 24)
// For each width: itself, its registers, their operands.
#define KVC_N8 8, "%0,%1,%2,%3", (KVC_F4(0))
#define KVC_N16 16, "%0,%1,%2,%3,%4,%5,%6,%7", (KVC_F8(0))
#define KVC_N32 32, KVC_T10("") ",%10,%11,%12,%13,%14,%15", (KVC_F8(0), KVC_F8(8))
#define KVC_N64 64, KVC_T30 ",%30,%31", (KVC_F32(0))
#define KVC_N128 128, KVC_T60 ",%60,%61,%62,%63", (KVC_F32(0), KVC_F32(32))
#define KVC_N256                                                                         \
    256, KVC_T120 ",%120,%121,%122,%123,%124,%125,%126,%127",                            \
        (KVC_F32(0), KVC_F32(32), KVC_F32(64), KVC_F32(96))
#define KVC_OPEN(...) __VA_ARGS__
#define KVC_OPCODE(n, type) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type
// A and B in shared memory: the numbers of both descriptors, of `add` and of both majors.
#define KVC_SHARED(n, D, F, type, a, b, s, ta, tb)                                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" s ", 0;\n" KVC_OPCODE(n, type)     \
                 " {" D "}, %" a ", %" b ", p, 1, 1, %" ta ", %" tb ";\n}"               \
                 : KVC_OPEN F                                                            \
                 : "l"(a_desc), "l"(b_desc), "r"(static_cast<uint32_t>(add)),            \
                   "n"(int(AMajor)), "n"(int(BMajor))                                    \
                 : "memory")
// A in four registers.
#define KVC_REGISTERS(n, D, F, type, a0, a1, a2, a3, b, s, tb)                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" s ", 0;\n" KVC_OPCODE(n, type)     \
                 " {" D "}, {%" a0 ",%" a1 ",%" a2 ",%" a3 "}, %" b                      \
                 ", p, 1, 1, %" tb ";\n}"                                                \
                 : KVC_OPEN F                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc),              \
                   "r"(static_cast<uint32_t>(add)), "n"(int(BMajor))                     \
                 : "memory")
// One of them for the type T; the first argument is a width's three.
#define KVC_EITHER(Kind, Width, ...)                                                     \
    do {                                                                                 \
        if constexpr (T::id == kBf16) KVC_CALL(Kind, Width, "bf16", __VA_ARGS__);        \
        else KVC_CALL(Kind, Width, "f16", __VA_ARGS__);                                  \
    } while (0)
#define KVC_CALL(Kind, ...) Kind(__VA_ARGS__)
#endif

// d = A B, plus d where `add`: A 64x16 and B 16xN in shared memory. A thread has, for each 8
// columns, those 2t and 2t+1 of rows 16w+g and 16w+g+8, with w its warp of the four, g its lane / 4
// and t its lane % 4.
template <typename T, int N, Major AMajor, Major BMajor>
KVC_DEVICE void wgmma(float (&d)[N / 2], uint64_t a_desc, uint64_t b_desc, bool add KVC_SITE) {
    static_assert(N >= 8 && N <= 256 && (N & (N - 1)) == 0, "a power of two from 8 to 256");
#ifdef KVC_EMULATE
    emu::Product product = {};
    product.a_shared = true;
    product.a_mn = AMajor == Major::mn;
    product.b_mn = BMajor == Major::mn;
    product.a_desc = a_desc;
    product.b_desc = b_desc;
    product.add = add;
    wgmma_op<T, N>(d, product, site);
#elif defined(KVC_WGMMA)
    if constexpr (N == 8) KVC_EITHER(KVC_SHARED, KVC_N8, "4", "5", "6", "7", "8");
    if constexpr (N == 16) KVC_EITHER(KVC_SHARED, KVC_N16, "8", "9", "10", "11", "12");
    if constexpr (N == 32) KVC_EITHER(KVC_SHARED, KVC_N32, "16", "17", "18", "19", "20");
    if constexpr (N == 64) KVC_EITHER(KVC_SHARED, KVC_N64, "32", "33", "34", "35", "36");
    if constexpr (N == 128) KVC_EITHER(KVC_SHARED, KVC_N128, "64", "65", "66", "67", "68");
    if constexpr (N == 256) KVC_EITHER(KVC_SHARED, KVC_N256, "128", "129", "130", "131", "132");
#else
    __trap();
#endif
}

// The same with A in registers, each warp's 16 rows as mma_f16 takes them.
template <typename T, int N, Major BMajor>
KVC_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_desc,
                      bool add KVC_SITE) {
    static_assert(N >= 8 && N <= 256 && (N & (N - 1)) == 0, "a power of two from 8 to 256");
#ifdef KVC_EMULATE
    emu::Product product = {};
    memcpy(product.a, a, sizeof a);
    product.b_mn = BMajor == Major::mn;
    product.b_desc = b_desc;
    product.add = add;
    wgmma_op<T, N>(d, product, site);
#elif defined(KVC_WGMMA)
    if constexpr (N == 8)
        KVC_EITHER(KVC_REGISTERS, KVC_N8, "4", "5", "6", "7", "8", "9", "10");
    if constexpr (N == 16)
        KVC_EITHER(KVC_REGISTERS, KVC_N16, "8", "9", "10", "11", "12", "13", "14");
    if constexpr (N == 32)
        KVC_EITHER(KVC_REGISTERS, KVC_N32, "16", "17", "18", "19", "20", "21", "22");
    if constexpr (N == 64)
        KVC_EITHER(KVC_REGISTERS, KVC_N64, "32", "33", "34", "35", "36", "37", "38");
    if constexpr (N == 128)
        KVC_EITHER(KVC_REGISTERS, KVC_N128, "64", "65", "66", "67", "68", "69", "70");
    if constexpr (N == 256)
        KVC_EITHER(KVC_REGISTERS, KVC_N256, "128", "129", "130", "131", "132", "133", "134");
#else
    __trap();
#endif
}

} // namespace kvc
