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
    std::vector<Range> ranges;
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

// Leaves this thread until what it waits for has happened.
void wait_here(Wait why, const Site &site);

bool mbar_passed(const uint64_t *bar, uint32_t parity);
// Does what a thread's asynchronous copies still owe.
void finish_copies(Thread &thread);
// Performs bulk copies under way; false where there were none.
bool finish_bulk(Block &b);

} // namespace kvc::emu
