// What a kernel compiled by the host compiler sees of the emulator: its thread, its block, shared
// memory, and the primitives that the emulated bodies in ptx.cuh are made of.
//
// Blocks run one after another, or spread over OS threads, each CUDA thread as a fiber that gives way
// only at a synchronising instruction. Nothing here models time or weak memory order: a write is seen
// by everybody at once, and every warp primitive, a matrix load too, brings its lanes together. So a
// kernel that is right here can still lack a fence or a sync_warp before one of those. Only the fence
// between ordinary writes and a warpgroup's products is modelled. A kernel must not wait for another
// block to act.
// Scheduling is in driver.cpp, launches in launch.cpp; this file is included by every emulated kernel.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace kvc::emu {

// Where in the kernel's source a primitive was called.
struct Site {
    const char *file;
    int line;
};

// What a detector found. The numbers are those of `FaultKind` in src/emu.rs.
enum class Fault : int32_t {
    none = 0,
    launch = 1,      // the launch itself is impossible
    shared = 2,      // shared memory accessed outside the arena of the block
    global = 3,      // memory accessed that is no device allocation, or past its end
    mask = 4,        // a warp primitive with a mask that cannot be right
    diverged = 5,    // threads of one block at different barriers, or gone
    deadlock = 6,    // nobody can continue
    misaligned = 7,  // an address not aligned to the access
    protocol = 8,    // an asynchronous copy or an mbarrier misused
    stack = 9,       // a thread overflowed its stack
};

// The warp primitives that need every lane of a mask.
enum class Op : uint8_t {
    sync, ballot, shfl, shfl_up, shfl_down, shfl_xor,
    ldmatrix, ldmatrix_trans, movmatrix_trans, mma_f16, mma_bf16,
    wgmma, wgmma_fence, wgmma_commit, wgmma_wait,
};

// The words a lane brings to a primitive and takes from it.
struct Words {
    uint32_t in[10];
    uint32_t out[4];
};

// A product of a warpgroup as one thread starts it; wgmma.cuh says what the fields mean.
struct Product {
    float *d;
    uint32_t columns;
    bool bf16, a_shared, a_mn, b_mn, add;
    uint32_t a[4];
    uint64_t a_desc, b_desc;
};

uint32_t thread_x();
uint32_t threads();
uint32_t block_x();
uint32_t block_y();
uint32_t block_z();
uint32_t grid_x();
unsigned char *shared_base();

[[noreturn]] void fault(Fault kind, const Site *site, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

// Checks `bytes` at a shared or global address, its alignment included.
void check_shared(const void *at, uint32_t bytes, uint32_t align, const Site &site);
void check_global(const void *at, uint32_t bytes, uint32_t align, const Site &site);

// Waits until every lane of `mask` has called with the same `op` and mask, then computes all.
void collective(Op op, uint32_t mask, Words &words, const Site &site);
// Waits for `count` threads at barrier `id`; `whole_block` for the barrier of all threads.
void barrier(uint32_t id, uint32_t count, bool whole_block, const Site &site);
// A point at which a seeded schedule may run other threads first.
void preempt();

void cp_async(void *to, const void *from, uint32_t bytes, uint32_t from_bytes, const Site &site);
void cp_async_commit();
void cp_async_wait(uint32_t groups_left);

void mbar_init(uint64_t *bar, uint32_t count, const Site &site);
void mbar_arrive(uint64_t *bar, uint32_t expect_bytes, const Site &site);
void mbar_wait(uint64_t *bar, uint32_t parity, const Site &site);
void bulk_copy(void *to, const void *from, uint32_t bytes, uint64_t *bar, const Site &site);

// What wgmma.cuh is made of: `product` for Op::wgmma, `left` for Op::wgmma_wait.
void warpgroup(Op op, const Product *product, uint32_t left, const Site &site);
void fence_async();
// The address of shared memory that a descriptor holds.
inline uint64_t shared_offset(const void *at) {
    return static_cast<uint64_t>(static_cast<const unsigned char *>(at) - shared_base());
}

// Round to nearest even, subnormals kept, as cvt.rn does.
uint16_t f32_to_f16(float value);
float f16_to_f32(uint16_t bits);
uint16_t f32_to_bf16(float value);
inline float bf16_to_f32(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// One kernel of the table that a launch looks names up in.
struct Kernel {
    const char *name;
    uint32_t params_bytes;
    uint32_t max_threads;
    void (*run)(const void *params);
};

// Kernels that test the emulator itself, ended by an entry without a name.
extern const Kernel probes[];

} // namespace kvc::emu

#define KVC_DEVICE inline
#define KVC_UNROLL
#define KVC_ROLL
#define KVC_TABLE static const
#define KVC_SITE_ONLY ::kvc::emu::Site site = {__builtin_FILE(), __builtin_LINE()}
#define KVC_SITE , KVC_SITE_ONLY
#define KVC_SMEM(T) reinterpret_cast<T *>(::kvc::emu::shared_base())

// Defines a kernel of one parameter struct `p`, and what the kernel table needs to know of it. In a
// namespace, as the library's C functions have names of the same form.
#define KVC_KERNEL(name, Params, threads, min_blocks)                                    \
    KVC_DECLARE_KERNEL(name, Params)                                                     \
    const uint32_t kvc_kernels::name##_max_threads = threads;                            \
    void kvc_kernels::name(const Params &p)
#define KVC_DECLARE_KERNEL(name, Params)                                                 \
    namespace kvc_kernels {                                                              \
    extern const uint32_t name##_max_threads;                                            \
    void name(const Params &p);                                                          \
    }
// A kernel's entry of a table.
#define KVC_KERNEL_ENTRY(name, Params)                                                   \
    {#name, sizeof(Params), kvc_kernels::name##_max_threads, [](const void *params) {    \
         kvc_kernels::name(*static_cast<const Params *>(params));                        \
     }},
