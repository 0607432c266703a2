// What the same calls cost from C++, through the wrapper and its results.
#include "crossing.h"
#include "kvcache.hpp"

int main(int argc, char **argv) {
    const unsigned calls = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 1000;
    auto pool = kvcache::pool::create(1024).value();
    int32_t blocks[16];
    pool.allocate(kvcache::span<int32_t>(blocks, 1)).value();
    const int32_t held = blocks[0];
    CROSSING("refs", calls, pool.refs(held).value() == 1);
    CROSSING("allocate", calls, pool.allocate(blocks) && pool.free(blocks).value() == 16);
    kvcache::group_spec group;
    group.layers = group.kv_heads = 1;
    group.k_dim = group.v_dim = 8;
    auto cache = kvcache::cache::create(group).value();
    auto step = kvcache::step::create().value();
    const uint32_t token[1] = {1};
    auto started = cache.start(token).value();
    const kvcache::work work[1] = {started.seq.work(token)};
    CROSSING("step", calls,
             step.begin(cache, work) && step.row_positions().value() == 1 && step.cancel());
    return 0;
}
