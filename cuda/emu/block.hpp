// The running block as the emulator's own files see it: threads, what each waits for, shared
// memory, asynchronous copies under way, and the fault that ends the launch.
#pragma once
#include "emu.hpp"
#include "fiber.hpp"

#include <setjmp.h>

#include <memory>
#include <random>
#include <vector>

namespace kvc::emu {

constexpr int kFaultText = 1024;
// What the caller of a launch provides: the text with the name of the kernel before it.
constexpr int kTextBytes = 1280;
constexpr size_t kStackBytes = 256 << 10;

// The order in which blocks, warps and lanes run, and when asynchronous copies happen: as late as
// allowed (forward), at once (reverse), or now this and now that (seeded).
enum class Schedule : uint32_t { forward = 0, reverse = 1, seeded = 2 };

enum class Wait : uint8_t { none, warp, barrier, mbarrier, done };

struct Copy {
    void *to;
    const void *from;
    uint32_t bytes, from_bytes;
};

struct BulkCopy {
    Copy copy;
    uint64_t *bar;
    Site site;
};

// A product of a warp's 16 rows that has not happened yet.
struct Pending {
    Product product;
    float *d[32];
    uint32_t a[32][4];
    std::vector<float> start; // the sums it adds to, where no product before it makes them
    bool saved = false;
    uint64_t group;
    Site site;
};

// The products of one warp: those under way, the group that is open, and one past the last group
// that has any, or that a wait has covered.
struct WarpProducts {
    std::vector<Pending> queue;
    uint64_t open = 0, last = 0, waited = 0;
    bool fenced = false;
    uint64_t trace = 0; // of all it started: the four warps of a warpgroup must agree
    Site site = {};
};

struct Range {
    uintptr_t base;
    uint64_t bytes;
};

struct Thread {
    Context context;
    Stack *stack = nullptr;
    uint32_t id = 0;
    Wait wait = Wait::none;
    Site site = {};
    // Wait::warp
    Op op = Op::sync;
    uint32_t mask = 0;
    Words *words = nullptr;
    // Wait::barrier
    uint32_t barrier_id = 0, barrier_count = 0;
    bool whole_block = false;
    // Wait::mbarrier
    const uint64_t *bar = nullptr;
    uint32_t parity = 0;
    // cp.async: copies not done yet, and for each closed group how many of them are its.
    std::vector<Copy> copies;
    std::vector<size_t> groups;
};

struct Block {
    const Kernel *kernel = nullptr;
    const void *params = nullptr;
    uint32_t grid[3] = {}, at[3] = {};
    std::vector<Thread> threads;
    unsigned char *shared = nullptr;
    uint32_t shared_bytes = 0;
    uint32_t barriers[16] = {};
    size_t done = 0;
    std::vector<BulkCopy> bulk;
    std::vector<WarpProducts> products; // by warp
    // Shared memory as asynchronous readers see it under the forward schedule.
    std::vector<unsigned char> async_view;
    const std::vector<Range> *ranges = nullptr; // of device memory, by address
    Schedule schedule = Schedule::forward;
    bool assembly = false;
    std::mt19937_64 random;
    Context scheduler;
    sigjmp_buf escape;
    Fault fault_kind = Fault::none;
    char fault_text[kFaultText] = "";
};

extern thread_local Block *block;
extern thread_local Thread *self;

// Makes a block ready to run from its beginning; runs it to its end or to the first fault.
void start_block(Block &b);
void run_block(Block &b);
// Once a process: what turns a signal in a kernel into a fault.
void install_handlers();

// Leaves this thread until what it waits for has happened.
void wait_here(Wait why, const Site &site);

// Whether something asynchronous that is started now happens at once.
bool eager();
// Does what the lanes of a warp asked for: one of the operations of a warpgroup.
void warpgroup_op(Op op, Thread *const (&lanes)[32]);
// Faults where products of the block were left, or differ between warps.
void check_products(Block &b);
bool mbar_passed(const uint64_t *bar, uint32_t parity);
// Does what a thread's asynchronous copies still owe.
void finish_copies(Thread &thread);
// Performs bulk copies under way; false where there were none.
bool finish_bulk(Block &b);

} // namespace kvc::emu
