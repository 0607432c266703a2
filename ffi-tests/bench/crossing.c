// What calls cost from C. The argument is how many of each are timed in a round.
#define _POSIX_C_SOURCE 199309L
#include "crossing.h"
#include "kvcache.h"

int main(int argc, char **argv) {
    const unsigned calls = argc > 1 ? (unsigned)atoi(argv[1]) : 1000;
    kvc_pool *pool = NULL;
    int32_t blocks[16];
    uint32_t refs = 0;
    kvc_group_spec group;
    kvc_cache *cache = NULL;
    kvc_step *step = NULL;
    kvc_seq seq = 0;
    uint32_t cached = 0, token = 1, rows = 0;
    if (kvc_pool_create(1024, &pool) || kvc_pool_allocate_n(pool, 1, blocks)) return 1;
    CROSSING("refs", calls, kvc_pool_refs(pool, blocks[0], &refs) == KVC_OK && refs == 1);
    CROSSING("allocate", calls,
             kvc_pool_allocate_n(pool, 16, blocks) == KVC_OK &&
                 kvc_pool_free_n(pool, blocks, 16, NULL) == KVC_OK);
    kvc_group_spec_init(&group, sizeof group);
    group.layers = group.kv_heads = 1;
    group.k_dim = group.v_dim = 8;
    if (kvc_cache_create(NULL, &group, 1, &cache) || kvc_step_create(&step) ||
        kvc_seq_start(cache, &token, 1, 0, &seq, &cached)) {
        return 1;
    }
    kvc_work work = {seq, 1, &token};
    CROSSING("step", calls,
             kvc_step_begin(cache, step, &work, 1) == KVC_OK &&
                 kvc_step_rows(step, NULL, 0, &rows) == KVC_OK && rows == 1 &&
                 kvc_step_cancel(cache, step) == KVC_OK);
    return kvc_step_destroy(step) || kvc_cache_destroy(cache) || kvc_pool_destroy(pool);
}
