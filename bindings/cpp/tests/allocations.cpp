// The wrapper allocates nothing on the hot path: steps, lookups and pool calls run with operator
// new counted. The library does not allocate through operator new, so what is counted is the
// wrapper's alone.
#include <array>
#include <cstdlib>
#include <new>
#include <vector>

#include "../../../ffi-tests/c/check.h"
#include "kvcache.hpp"

static uint64_t allocations = 0;

// Not inlined, or the compiler sees malloc and free through them and warns of a mismatch.
#define OUT_OF_LINE __attribute__((noinline))
OUT_OF_LINE void *operator new(std::size_t bytes) {
    allocations += 1;
    if (void *memory = std::malloc(bytes)) return memory;
    std::abort();
}
OUT_OF_LINE void operator delete(void *memory) noexcept { std::free(memory); }
OUT_OF_LINE void operator delete(void *memory, std::size_t) noexcept { std::free(memory); }

int main() {
    kvcache::group_spec group;
    group.layers = group.kv_heads = 1;
    group.k_dim = group.v_dim = 8;
    kvcache::cache_options options;
    options.blocks = 16;
    options.threads = 1;
    kvcache::cache cache = kvcache::cache::create(group, options).value();
    kvcache::step step = kvcache::step::create().value();
    kvcache::pool pool = kvcache::pool::create(8).value();
    kvcache::prefix prefix = kvcache::prefix::create(16, 1, 16).value();
    std::array<uint32_t, 32> tokens{};
    std::array<float, 256> kv{}, out{};
    std::array<int32_t, 2> blocks{};
    CHECK(allocations == 0);

    for (uint32_t round = 0; round < 8; round++) {
        tokens[0] = round;
        kvcache::started started = cache.start(tokens).value();
        const kvcache::work work = started.seq.work(tokens);
        CHECK(step.begin(cache, kvcache::span<const kvcache::work>(&work, 1)));
        CHECK(step.append(0, kv, kv) && step.attend(0, 1, kv, out) && step.commit());
        kvcache::sequence fork = started.seq.fork().value();
        CHECK(fork.truncate(3) && pool.allocate(blocks));
        CHECK(prefix.insert(0, tokens, blocks).has_value());
        CHECK(prefix.lookup(0, tokens, 31, blocks)->tokens == 16);
        CHECK(pool.free(blocks).value() == 2 && cache.stats()->sequences == 2);
        // Failing is free too, until a text is asked for.
        CHECK(!pool.free(blocks));
    }
    CHECK(allocations == 0);
    CHECK(!kvcache::last_error().empty());
    // The count counts.
    const std::vector<int> some(100);
    CHECK(some.size() == 100 && allocations > 0);
    return check_result();
}
