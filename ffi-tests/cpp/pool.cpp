// The pool from C++: a handle in a smart pointer, ids in a vector.
#include <memory>
#include <vector>

#include "../c/check.h"

struct PoolEnd {
    void operator()(kvc_pool *pool) const { OK(kvc_pool_destroy(pool)); }
};

int main() {
    kvc_pool *raw = nullptr;
    OK(kvc_pool_create(100, &raw));
    std::unique_ptr<kvc_pool, PoolEnd> pool(raw);
    std::vector<int32_t> blocks(60);
    OK(kvc_pool_allocate_n(pool.get(), 60, blocks.data()));
    FAILS(KVC_ERR_OUT_OF_BLOCKS, "20 missing", kvc_pool_allocate_n(pool.get(), 60, blocks.data()));
    CHECK(kvc_last_missing_blocks() == 20);
    uint32_t freed = 0;
    OK(kvc_pool_free_n(pool.get(), blocks.data(), 60, &freed));
    CHECK(freed == 60);
    pool.reset();
    kvc_pool_counts counts;
    FAILS(KVC_ERR_STALE_HANDLE, "pool", kvc_pool_stats(raw, &counts, sizeof counts));
    return check_result();
}
