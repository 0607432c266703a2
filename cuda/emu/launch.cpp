// Device memory and launches: the table of kernels, and the OS threads that a grid's blocks run on.
//
// Several threads may launch at once, and a launch may have several workers. Each takes one block
// after another, in the order of the schedule; what happens within a block does not depend on the
// worker that runs it. Of several faults the one of the earliest block is reported.
#include "block.hpp"
#include "memory.hpp"

#include <signal.h>
#include <stdio.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <system_error>

#include "../kvc_params.h"

KVC_KERNELS(KVC_DECLARE_KERNEL)

namespace kvc::emu {

namespace {

// ---- Device memory ----

std::mutex arenas_lock;
std::map<uintptr_t, Guarded> arenas;

// ---- What an OS thread needs ----

// Handlers run on a stack of their own: the fiber's may be what overflowed.
struct SignalStack {
    std::vector<char> memory;
    bool ours = false;
    SignalStack() {
        stack_t now;
        if (sigaltstack(nullptr, &now) == 0 && (now.ss_flags & SS_DISABLE)) {
            memory.resize(64 << 10);
            stack_t mine = {};
            mine.ss_sp = memory.data();
            mine.ss_size = memory.size();
            ours = sigaltstack(&mine, nullptr) == 0;
        }
    }
    ~SignalStack() {
        if (!ours) return;
        stack_t off = {};
        off.ss_flags = SS_DISABLE;
        sigaltstack(&off, nullptr);
    }
};

// The stacks of fibers that do not run: making them takes longer than most blocks run.
class Stacks {
  public:
    std::vector<std::unique_ptr<Stack>> take(size_t count) {
        std::vector<std::unique_ptr<Stack>> taken;
        {
            std::lock_guard<std::mutex> hold(lock_);
            const size_t ready = std::min(count, spare_.size());
            std::move(spare_.end() - static_cast<ptrdiff_t>(ready), spare_.end(),
                      std::back_inserter(taken));
            spare_.resize(spare_.size() - ready);
        }
        while (taken.size() < count) taken.push_back(std::make_unique<Stack>(kStackBytes));
        return taken;
    }
    void give_back(std::vector<std::unique_ptr<Stack>> stacks) {
        std::lock_guard<std::mutex> hold(lock_);
        std::move(stacks.begin(), stacks.end(), std::back_inserter(spare_));
    }

  private:
    std::mutex lock_;
    std::vector<std::unique_ptr<Stack>> spare_;
};
Stacks stacks;

// ---- A launch ----

const Kernel kernels[] = {KVC_KERNELS(KVC_KERNEL_ENTRY)};

const Kernel *find(const char *name) {
    for (const Kernel &kernel : kernels)
        if (strcmp(kernel.name, name) == 0) return &kernel;
    for (const Kernel *probe = probes; probe->name != nullptr; ++probe)
        if (strcmp(probe->name, name) == 0) return probe;
    return nullptr;
}

struct Launch {
    const Kernel *kernel = nullptr;
    const void *params = nullptr;
    uint32_t grid[3] = {};
    uint32_t threads = 0, shared_bytes = 0;
    Schedule schedule = Schedule::forward;
    bool assembly = false;
    uint64_t seed = 0, blocks = 0;
    std::vector<Range> ranges;
    std::vector<uint64_t> order; // of a seeded schedule
    std::atomic<uint64_t> next{0};
    std::atomic<bool> stopped{false};
    std::mutex lock;
    uint64_t fault_step = ~uint64_t(0);
    Fault fault_kind = Fault::none;
    char fault_text[kFaultText] = "";

    void report(uint64_t step, Fault kind, const char *text) {
        std::lock_guard<std::mutex> hold(lock);
        stopped = true;
        if (fault_kind != Fault::none && step >= fault_step) return;
        fault_step = step;
        fault_kind = kind;
        snprintf(fault_text, kFaultText, "%s", text);
    }
};

// Runs blocks until there are none left, or somebody found a fault. A fault outside the fiber that
// runs, or a signal, comes back to the middle of this function: what is read after that is volatile
// or not changed in between.
void run_blocks(Launch &l, Block &b, const Guarded &shared, volatile uint64_t &step) {
    if (sigsetjmp(b.escape, 1) != 0) return;
    while (!l.stopped) {
        step = l.next.fetch_add(1);
        if (step >= l.blocks) return;
        const uint64_t index = l.schedule == Schedule::seeded    ? l.order[step]
                               : l.schedule == Schedule::reverse ? l.blocks - 1 - step
                                                                 : step;
        b.at[0] = static_cast<uint32_t>(index % l.grid[0]);
        b.at[1] = static_cast<uint32_t>(index / l.grid[0] % l.grid[1]);
        b.at[2] = static_cast<uint32_t>(index / l.grid[0] / l.grid[1]);
        b.random.seed(l.seed ^ (index + 1) * 0x9e3779b97f4a7c15u);
        start_block(b);
        run_block(b);
        if (b.fault_kind != Fault::none) return;
        if (const unsigned char *at = shared.touched())
            fault(Fault::shared, nullptr, "block (%u, %u, %u) wrote byte %lld of %u of shared "
                  "memory", b.at[0], b.at[1], b.at[2], static_cast<long long>(at - b.shared),
                  b.shared_bytes);
    }
}

void work(Launch &l) {
    static thread_local SignalStack signal_stack;
    Guarded shared = Guarded::make(l.shared_bytes);
    if (shared.map == nullptr) return l.report(0, Fault::launch, "no memory");
    Block b;
    b.kernel = l.kernel;
    b.params = l.params;
    b.shared = shared.base;
    b.shared_bytes = l.shared_bytes;
    b.schedule = l.schedule;
    b.assembly = l.assembly;
    b.ranges = &l.ranges;
    std::copy(l.grid, l.grid + 3, b.grid);
    std::vector<std::unique_ptr<Stack>> own = stacks.take(l.threads);
    b.threads.resize(l.threads);
    for (uint32_t i = 0; i < l.threads; ++i) {
        b.threads[i].id = i;
        b.threads[i].stack = own[i].get();
    }
    block = &b;
    volatile uint64_t step = 0;
    run_blocks(l, b, shared, step);
    self = nullptr;
    block = nullptr;
    if (b.fault_kind != Fault::none) l.report(step, b.fault_kind, b.fault_text);
    stacks.give_back(std::move(own));
    shared.free();
}

} // namespace

} // namespace kvc::emu

using namespace kvc::emu;

extern "C" {

// The numbers of src/emu.rs: schedule 0 forward, 1 reverse, 2 seeded; fibers 0 by assembly where
// there is any, 1 by ucontext.
struct kvc_emu_options {
    uint32_t schedule;
    uint32_t fibers;
    uint64_t seed;
    uint64_t workers; // OS threads at most
};

void *kvc_emu_alloc(uint64_t bytes) {
    const Guarded memory = Guarded::make(bytes);
    if (memory.map == nullptr) return nullptr;
    std::lock_guard<std::mutex> hold(arenas_lock);
    arenas[reinterpret_cast<uintptr_t>(memory.base)] = memory;
    return memory.base;
}

void kvc_emu_free(void *at) {
    std::lock_guard<std::mutex> hold(arenas_lock);
    auto found = arenas.find(reinterpret_cast<uintptr_t>(at));
    if (found == arenas.end()) return;
    found->second.free();
    arenas.erase(found);
}

// Runs a kernel. Returns 0, or the kind of the fault, whose text is written to `text` (of
// kTextBytes).
int32_t kvc_emu_launch(const char *name, const uint32_t grid[3], uint32_t threads,
                       uint32_t shared_bytes, const void *params, uint32_t params_bytes,
                       const kvc_emu_options *options, char *text) {
    const auto refuse = [&](const char *why) {
        snprintf(text, kTextBytes, "%s: %s", name, why);
        return static_cast<int32_t>(Fault::launch);
    };
    const Kernel *kernel = find(name);
    if (kernel == nullptr) return refuse("no such kernel");
    if (params_bytes != kernel->params_bytes) return refuse("parameter struct of another size");
    if (threads == 0 || threads > kernel->max_threads) return refuse("more threads than its bounds");
    if (grid[0] == 0 || grid[0] > 0x7fffffffu || grid[1] == 0 || grid[1] > 65535 || grid[2] == 0 ||
        grid[2] > 65535)
        return refuse("grid outside what a device takes");
    if (shared_bytes > 227 << 10) return refuse("more shared memory than a block can have");
    if (block != nullptr) return refuse("launched from within a kernel");

    install_handlers();
    Launch l;
    l.kernel = kernel;
    l.params = params;
    std::copy(grid, grid + 3, l.grid);
    l.threads = threads;
    l.shared_bytes = shared_bytes;
    l.schedule = static_cast<Schedule>(options->schedule);
    l.assembly = options->fibers == 0 && KVC_EMU_ASM_SWITCH;
    l.seed = options->seed;
    l.blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    {
        std::lock_guard<std::mutex> hold(arenas_lock);
        for (const auto &[base, memory] : arenas) l.ranges.push_back({base, memory.bytes});
    }
    if (l.schedule == Schedule::seeded) {
        for (uint64_t i = 0; i < l.blocks; ++i) l.order.push_back(i);
        std::mt19937_64 random(options->seed);
        std::shuffle(l.order.begin(), l.order.end(), random);
    }
    std::vector<std::thread> others;
    for (uint64_t i = 1; i < std::min(options->workers, l.blocks); ++i) {
        try {
            others.emplace_back(work, std::ref(l));
        } catch (const std::system_error &) {
            break; // fewer will do
        }
    }
    work(l);
    for (std::thread &other : others) other.join();
    // Allocations of other threads may be in use by a launch of theirs.
    if (l.fault_kind == Fault::none) {
        std::lock_guard<std::mutex> hold(arenas_lock);
        for (const auto &[base, memory] : arenas)
            if (const unsigned char *at = memory.touched();
                at && memory.owner == std::this_thread::get_id()) {
                l.fault_kind = Fault::global;
                snprintf(l.fault_text, kFaultText, "%s wrote byte %lld of an allocation of %zu",
                         name, static_cast<long long>(at - memory.base), memory.bytes);
            }
    }
    if (l.fault_kind != Fault::none) snprintf(text, kTextBytes, "%s: %s", name, l.fault_text);
    return static_cast<int32_t>(l.fault_kind);
}

} // extern "C"
