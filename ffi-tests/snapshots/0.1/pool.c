// The block pool: allocate, share, free, run out, misuse.
#include "check.h"

int main(void) {
    kvc_pool *pool = NULL;
    kvc_pool_counts counts;
    int32_t blocks[8];
    int32_t more[8] = {-7, -7, -7, -7, -7, -7, -7, -7};
    uint32_t freed = 99;
    uint32_t refs = 99;

    FAILS(KVC_ERR_NULL_POINTER, "out", kvc_pool_create(8, NULL));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "blocks", kvc_pool_create(0, &pool));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "blocks", kvc_pool_create(UINT32_MAX, &pool));
    CHECK(pool == NULL);
    OK(kvc_pool_create(8, &pool));
    CHECK(pool != NULL);

    OK(kvc_pool_allocate_n(pool, 5, blocks));
    for (int i = 0; i < 5; i++) {
        CHECK(blocks[i] >= 0 && blocks[i] < 8);
        for (int j = 0; j < i; j++) {
            CHECK(blocks[i] != blocks[j]);
        }
    }
    OK(kvc_pool_stats(pool, &counts, sizeof counts));
    CHECK(counts.blocks == 8 && counts.free_blocks == 3 && counts.held_blocks == 5);

    // All or none, and the caller learns how many are missing.
    CHECK(kvc_last_missing_blocks() == 0);
    FAILS(KVC_ERR_OUT_OF_BLOCKS, "5 blocks needed, 2 missing", kvc_pool_allocate_n(pool, 5, more));
    CHECK(kvc_last_missing_blocks() == 2);
    CHECK(more[0] == -7 && more[4] == -7);

    // Shared blocks are freed by their last holder.
    OK(kvc_pool_retain_n(pool, blocks, 2));
    OK(kvc_pool_refs(pool, blocks[0], &refs));
    CHECK(refs == 2);
    OK(kvc_pool_free_n(pool, blocks, 5, &freed));
    CHECK(freed == 3);
    FAILS(KVC_ERR_BAD_BLOCK, "block", kvc_pool_free_n(pool, blocks, 5, &freed));
    CHECK(freed == 3);
    OK(kvc_pool_refs(pool, blocks[0], &refs));
    CHECK(refs == 1);
    OK(kvc_pool_free_n(pool, blocks, 2, NULL));
    OK(kvc_pool_stats(pool, &counts, sizeof counts));
    CHECK(counts.free_blocks == 8);

    // Ids that are no blocks.
    more[0] = -1;
    FAILS(KVC_ERR_BAD_BLOCK, "block", kvc_pool_retain_n(pool, more, 1));
    more[0] = 8;
    FAILS(KVC_ERR_BAD_BLOCK, "block 8", kvc_pool_free_n(pool, more, 1, NULL));
    OK(kvc_pool_refs(pool, -1, &refs));
    CHECK(refs == 0);
    OK(kvc_pool_allocate_n(pool, 0, NULL));

    // A result struct of another size: less is written in part only from its first version on.
    FAILS(KVC_ERR_STRUCT_SIZE, "out", kvc_pool_stats(pool, &counts, 4));

    OK(kvc_pool_destroy(pool));
    FAILS(KVC_ERR_STALE_HANDLE, "pool", kvc_pool_destroy(pool));
    FAILS(KVC_ERR_STALE_HANDLE, "pool", kvc_pool_allocate_n(pool, 1, blocks));
    OK(kvc_pool_destroy(NULL));
    return check_result();
}
