// Asynchronous copies (cp.async, bulk copies) and mbarriers, by their definitions.
//
// A copy may happen at any time between its issue and the wait that covers it; the schedule says
// when. Late copies show a reader that did not wait, early ones a buffer that was still in use.
#include "block.hpp"

namespace kvc::emu {

namespace {

void perform(const Copy &copy) {
    memcpy(copy.to, copy.from, copy.from_bytes);
    memset(static_cast<char *>(copy.to) + copy.from_bytes, 0, copy.bytes - copy.from_bytes);
}

// An mbarrier in its 64 bits: arrivals left in this phase, arrivals of a phase, the phase, and the
// bytes that bulk copies still owe.
struct Mbar {
    uint32_t pending : 15;
    uint32_t count : 15;
    uint32_t phase : 1;
    uint32_t live : 1;
    int32_t owed;
};
static_assert(sizeof(Mbar) == 8, "an mbarrier has 64 bits");

// Shared memory starts as 0xff bytes: such a count is no barrier that anybody initialised.
constexpr uint32_t kMaxCount = 0x7ffe;

Mbar load(const uint64_t *bar, const Site &site) {
    check_shared(bar, 8, 8, site);
    Mbar m;
    memcpy(&m, bar, 8);
    if (m.count > kMaxCount || m.count == 0 || !m.live)
        fault(Fault::protocol, &site, "an mbarrier that was not initialised");
    return m;
}

void store(uint64_t *bar, Mbar m) {
    if (m.pending == 0 && m.owed == 0) {
        m.phase ^= 1;
        m.pending = m.count;
    }
    memcpy(bar, &m, 8);
}

void perform(const BulkCopy &bulk) {
    perform(bulk.copy);
    const auto at = static_cast<unsigned char *>(bulk.copy.to) - block->shared;
    memcpy(block->async_view.data() + at, bulk.copy.to, bulk.copy.bytes);
    Mbar m = load(bulk.bar, bulk.site);
    m.owed -= static_cast<int32_t>(bulk.copy.bytes);
    store(bulk.bar, m);
}

} // namespace

bool eager() {
    return block->schedule == Schedule::reverse ||
           (block->schedule == Schedule::seeded && block->random() % 2 == 0);
}

void cp_async(void *to, const void *from, uint32_t bytes, uint32_t from_bytes, const Site &site) {
    check_shared(to, bytes, bytes, site);
    if (from_bytes != 0) check_global(from, from_bytes, bytes, site);
    const Copy copy = {to, from, bytes, from_bytes};
    if (eager())
        perform(copy);
    else
        self->copies.push_back(copy);
}

void cp_async_commit() {
    size_t closed = 0;
    for (size_t copies : self->groups) closed += copies;
    self->groups.push_back(self->copies.size() - closed);
}

void cp_async_wait(uint32_t groups_left) {
    while (self->groups.size() > groups_left) {
        const size_t count = self->groups.front();
        for (size_t i = 0; i < count; ++i) perform(self->copies[i]);
        self->copies.erase(self->copies.begin(),
                           self->copies.begin() + static_cast<ptrdiff_t>(count));
        self->groups.erase(self->groups.begin());
    }
}

void finish_copies(Thread &thread) {
    for (const Copy &copy : thread.copies) perform(copy);
    thread.copies.clear();
    thread.groups.clear();
}

void mbar_init(uint64_t *bar, uint32_t count, const Site &site) {
    check_shared(bar, 8, 8, site);
    if (count == 0 || count > kMaxCount) fault(Fault::protocol, &site, "an mbarrier of %u", count);
    const Mbar m = {count, count, 0, 1, 0};
    memcpy(bar, &m, 8);
}

void mbar_arrive(uint64_t *bar, uint32_t expect_bytes, const Site &site) {
    preempt();
    Mbar m = load(bar, site);
    if (m.pending == 0) fault(Fault::protocol, &site, "more arrivals than an mbarrier counts");
    m.owed += static_cast<int32_t>(expect_bytes);
    m.pending -= 1;
    store(bar, m);
}

bool mbar_passed(const uint64_t *bar, uint32_t parity) {
    Mbar m;
    memcpy(&m, bar, 8);
    return m.phase != (parity & 1);
}

void mbar_wait(uint64_t *bar, uint32_t parity, const Site &site) {
    preempt();
    load(bar, site);
    if (mbar_passed(bar, parity)) return;
    self->bar = bar;
    self->parity = parity;
    wait_here(Wait::mbarrier, site);
}

void bulk_copy(void *to, const void *from, uint32_t bytes, uint64_t *bar, const Site &site) {
    if (bytes == 0 || bytes % 16 != 0)
        fault(Fault::protocol, &site, "a bulk copy of %u bytes, no multiple of 16", bytes);
    check_shared(to, bytes, 16, site);
    check_global(from, bytes, 16, site);
    load(bar, site);
    const BulkCopy bulk = {{to, from, bytes, bytes}, bar, site};
    if (eager())
        perform(bulk);
    else
        block->bulk.push_back(bulk);
}

bool finish_bulk(Block &b) {
    if (b.bulk.empty()) return false;
    // One at a time, so that whoever it releases runs before the next is there; a seeded schedule
    // takes any, as the hardware may.
    const size_t at = b.schedule == Schedule::seeded ? b.random() % b.bulk.size() : 0;
    const BulkCopy bulk = b.bulk[at];
    b.bulk.erase(b.bulk.begin() + static_cast<ptrdiff_t>(at));
    perform(bulk);
    return true;
}

} // namespace kvc::emu
