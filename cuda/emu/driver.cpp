// The running block: its fibers, its scheduler, what a fault does, and the primitives that need no
// file of their own. A launch, and the memory of the device, are in launch.cpp.
//
// A detector that fires writes one line of text and leaves the block; its fibers are abandoned where
// they stand. A bad memory access of a kernel is caught as a signal: allocations and shared memory
// end at unmapped pages. The definitions of the warp primitives are in warp.cpp, of asynchronous
// copies in async.cpp, of a warpgroup's products in wgmma.cpp.
#include "block.hpp"
#include "memory.hpp"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>

#include <algorithm>
#include <mutex>

#if KVC_EMU_ASM_SWITCH
asm(R"(
.text
.globl kvc_emu_switch
.type kvc_emu_switch, @function
kvc_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size kvc_emu_switch, .-kvc_emu_switch
)");
#endif

namespace kvc::emu {

thread_local Block *block;
thread_local Thread *self;

namespace {

// ---- Fibers ----

void yield() { switch_to(self->context, block->scheduler, block->assembly); }

void entry() {
    first_entry(block->scheduler);
    block->kernel->run(block->params);
    finish_copies(*self);
    self->wait = Wait::done;
    ++block->done;
    for (Thread &other : block->threads) {
        if (other.wait == Wait::barrier && other.whole_block)
            fault(Fault::diverged, &other.site,
                  "thread %u waits at a barrier of the block, thread %u returned without it",
                  other.id, self->id);
        if (other.wait == Wait::warp && other.id / 32 == self->id / 32 &&
            other.mask >> self->id % 32 & 1)
            fault(Fault::mask, &other.site, "lane %u waits for lane %u, which has returned",
                  other.id % 32, self->id % 32);
    }
    yield();
    abort();
}

// ---- Bad accesses ----

struct sigaction old_segv, old_bus;

// Describes what an address that faulted is near to.
void describe(const void *address) {
    Block &b = *block;
    char *text = b.fault_text;
    const auto at = reinterpret_cast<uintptr_t>(address);
    if (self->stack->guards(address)) {
        b.fault_kind = Fault::stack;
        snprintf(text, kFaultText, "thread %u of block (%u, %u, %u) overflowed its stack", self->id,
                 b.at[0], b.at[1], b.at[2]);
        return;
    }
    const auto shared = reinterpret_cast<uintptr_t>(b.shared);
    if (at + page_bytes() >= shared && at < shared + b.shared_bytes + 2 * page_bytes()) {
        b.fault_kind = Fault::shared;
        snprintf(text, kFaultText,
                 "thread %u of block (%u, %u, %u) accessed byte %lld of %u of shared memory",
                 self->id, b.at[0], b.at[1], b.at[2], static_cast<long long>(at - shared),
                 b.shared_bytes);
        return;
    }
    b.fault_kind = Fault::global;
    snprintf(text, kFaultText, "thread %u of block (%u, %u, %u) accessed %p, no device memory",
             self->id, b.at[0], b.at[1], b.at[2], address);
    for (const Range &range : *b.ranges)
        if (at + page_bytes() >= range.base && at < range.base + range.bytes + 2 * page_bytes())
            snprintf(text, kFaultText,
                     "thread %u of block (%u, %u, %u) accessed byte %lld of an allocation of %llu",
                     self->id, b.at[0], b.at[1], b.at[2], static_cast<long long>(at - range.base),
                     static_cast<unsigned long long>(range.bytes));
}

[[maybe_unused]] void on_signal(int signal, siginfo_t *info, void *context) {
    if (block != nullptr && self != nullptr) {
        describe(info->si_addr);
        siglongjmp(block->escape, 1);
    }
    const struct sigaction &old = signal == SIGSEGV ? old_segv : old_bus;
    if (old.sa_flags & SA_SIGINFO)
        old.sa_sigaction(signal, info, context);
    else if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN)
        old.sa_handler(signal);
    else
        sigaction(signal, &old, nullptr);
}

// ---- The scheduler ----

bool runnable(const Thread &thread) {
    return thread.wait == Wait::none ||
           (thread.wait == Wait::mbarrier && mbar_passed(thread.bar, thread.parity));
}

const char *wait_name(Wait wait) {
    switch (wait) {
    case Wait::none: return "running";
    case Wait::warp: return "a warp primitive";
    case Wait::barrier: return "a barrier";
    case Wait::mbarrier: return "an mbarrier";
    case Wait::done: return "returned";
    }
    return "?";
}

void report_deadlock(Block &b) {
    int used = snprintf(b.fault_text, kFaultText, "block (%u, %u, %u) cannot continue:", b.at[0],
                        b.at[1], b.at[2]);
    // One entry for each run of threads that wait at the same place.
    for (size_t first = 0; first < b.threads.size() && used < kFaultText - 1;) {
        const Thread &t = b.threads[first];
        size_t last = first;
        while (last + 1 < b.threads.size() && b.threads[last + 1].wait == t.wait &&
               b.threads[last + 1].site.line == t.site.line)
            ++last;
        used += snprintf(b.fault_text + used, static_cast<size_t>(kFaultText - used),
                         " threads %zu-%zu at %s (line %d);", first, last, wait_name(t.wait),
                         t.wait == Wait::done ? 0 : t.site.line);
        first = last + 1;
    }
    b.fault_kind = Fault::deadlock;
}

void resume(Block &b, Thread &thread) {
    thread.wait = Wait::none;
    self = &thread;
    switch_to(b.scheduler, thread.context, b.assembly);
    self = nullptr;
}

} // namespace

// ---- What a launch calls ----

void install_handlers() {
#if !defined(__SANITIZE_ADDRESS__)
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        sigaction(SIGSEGV, &action, &old_segv);
        sigaction(SIGBUS, &action, &old_bus);
    });
#endif
}

// Makes the block ready to run from its beginning.
void start_block(Block &b) {
    memset(b.shared, 0xff, b.shared_bytes);
    b.done = 0;
    b.bulk.clear();
    b.products.assign((b.threads.size() + 31) / 32, {});
    b.async_view.assign(b.shared_bytes, 0xff);
    memset(b.barriers, 0, sizeof b.barriers);
    for (Thread &thread : b.threads) {
        thread.wait = Wait::none;
        thread.copies.clear();
        thread.groups.clear();
        prepare(thread.context, *thread.stack, entry, b.assembly);
    }
}

// Runs one block to its end or to the first fault.
void run_block(Block &b) {
    const size_t warps = (b.threads.size() + 31) / 32;
    std::vector<uint32_t> warp_order(warps), lane_order(32);
    for (size_t i = 0; i < warps; ++i) warp_order[i] = static_cast<uint32_t>(i);
    for (uint32_t i = 0; i < 32; ++i) lane_order[i] = i;
    if (b.schedule == Schedule::reverse) {
        std::reverse(warp_order.begin(), warp_order.end());
        std::reverse(lane_order.begin(), lane_order.end());
    }
    while (b.done < b.threads.size()) {
        if (b.schedule == Schedule::seeded) {
            std::shuffle(warp_order.begin(), warp_order.end(), b.random);
            std::shuffle(lane_order.begin(), lane_order.end(), b.random);
        }
        bool progress = false;
        for (uint32_t warp : warp_order) {
            for (bool again = true; again;) {
                again = false;
                for (uint32_t lane : lane_order) {
                    const size_t id = warp * 32 + lane;
                    if (id >= b.threads.size() || !runnable(b.threads[id])) continue;
                    resume(b, b.threads[id]);
                    if (b.fault_kind != Fault::none) return;
                    again = progress = true;
                }
            }
        }
        if (!progress && !finish_bulk(b) && b.done < b.threads.size()) {
            report_deadlock(b);
            return;
        }
    }
    // What the hardware would still bring after the last thread is of no use, and is a bug.
    if (!b.bulk.empty())
        fault(Fault::protocol, &b.bulk.front().site, "a bulk copy nobody waited for");
    check_products(b);
}

// ---- What the rest of the emulator and the kernels call ----

uint32_t thread_x() { return self->id; }
uint32_t threads() { return static_cast<uint32_t>(block->threads.size()); }
uint32_t block_x() { return block->at[0]; }
uint32_t block_y() { return block->at[1]; }
uint32_t block_z() { return block->at[2]; }
uint32_t grid_x() { return block->grid[0]; }
unsigned char *shared_base() { return block->shared; }

void fault(Fault kind, const Site *site, const char *format, ...) {
    Block &b = *block;
    b.fault_kind = kind;
    int used = 0;
    if (site != nullptr) used = snprintf(b.fault_text, kFaultText, "%s:%d: ", site->file, site->line);
    if (used < 0 || used >= kFaultText) used = 0;
    va_list list;
    va_start(list, format);
    vsnprintf(b.fault_text + used, static_cast<size_t>(kFaultText - used), format, list);
    va_end(list);
    if (self == nullptr) siglongjmp(b.escape, 1);
    yield();
    abort();
}

void wait_here(Wait why, const Site &site) {
    self->wait = why;
    self->site = site;
    yield();
}

void preempt() {
    if (block->schedule == Schedule::seeded && block->random() % 4 == 0) yield();
}

void check_shared(const void *at, uint32_t bytes, uint32_t align, const Site &site) {
    const auto *from = static_cast<const unsigned char *>(at);
    const auto offset = static_cast<long long>(from - block->shared);
    if (offset < 0 || offset + bytes > block->shared_bytes)
        fault(Fault::shared, &site, "thread %u accesses bytes %lld to %lld of %u of shared memory",
              self->id, offset, offset + bytes, block->shared_bytes);
    if (reinterpret_cast<uintptr_t>(at) % align != 0)
        fault(Fault::misaligned, &site, "thread %u: shared address %lld is no multiple of %u",
              self->id, offset, align);
}

void check_global(const void *at, uint32_t bytes, uint32_t align, const Site &site) {
    const auto address = reinterpret_cast<uintptr_t>(at);
    const std::vector<Range> &ranges = *block->ranges;
    auto after = std::upper_bound(ranges.begin(), ranges.end(), address,
                                  [](uintptr_t a, const Range &range) { return a < range.base; });
    if (after == ranges.begin() || address - (after - 1)->base + bytes > (after - 1)->bytes)
        fault(Fault::global, &site, "thread %u of block (%u, %u, %u) accesses %u bytes at %p, "
              "which no allocation holds", self->id, block->at[0], block->at[1], block->at[2],
              bytes, at);
    if (address % align != 0)
        fault(Fault::misaligned, &site, "thread %u: %p is no multiple of %u", self->id, at, align);
}

void barrier(uint32_t id, uint32_t count, bool whole_block, const Site &site) {
    Block &b = *block;
    preempt();
    if (id >= 16 || count == 0 || (!whole_block && (id == 0 || count % 32 != 0)) ||
        count > b.threads.size())
        fault(Fault::diverged, &site, "barrier %u of %u threads in a block of %zu", id, count,
              b.threads.size());
    if (whole_block && b.done != 0)
        fault(Fault::diverged, &site, "thread %u waits at a barrier of the block, %zu returned",
              self->id, b.done);
    for (const Thread &other : b.threads) {
        if (other.wait != Wait::barrier) continue;
        if (whole_block && other.whole_block &&
            (other.site.line != site.line || strcmp(other.site.file, site.file) != 0))
            fault(Fault::diverged, &site, "thread %u is at this barrier, thread %u at line %d",
                  self->id, other.id, other.site.line);
        if (other.barrier_id == id && other.barrier_count != count)
            fault(Fault::diverged, &site, "barrier %u is used with %u and %u threads", id, count,
                  other.barrier_count);
    }
    self->barrier_id = id;
    self->barrier_count = count;
    self->whole_block = whole_block;
    if (++b.barriers[id] < count) {
        wait_here(Wait::barrier, site);
        return;
    }
    b.barriers[id] = 0;
    for (Thread &other : b.threads)
        if (other.wait == Wait::barrier && other.barrier_id == id) other.wait = Wait::none;
}

} // namespace kvc::emu
