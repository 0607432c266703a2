// Caches: options, creation, statistics, and what is refused.
#include "toy_model.h"

int main(void) {
    kvc_cache_options options;
    kvc_cache_counts counts;
    kvc_cache_counts kept;
    kvc_group_spec group = toy_group();
    kvc_group_spec groups[2];
    kvc_cache *cache = NULL;

    OK(kvc_cache_options_init(&options, sizeof options));
    CHECK(options.struct_size == sizeof options && options.block_tokens == 16);
    CHECK(options.blocks == 1024 && options.max_seqs == 256);
    CHECK(options.threads == 0 && options.prefix_reuse == 1);

    // Refused, with the argument named and nothing written.
    FAILS(KVC_ERR_NULL_POINTER, "out", kvc_cache_create(&options, &group, 1, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "kvc_group_spec", kvc_cache_create(&options, NULL, 1, &cache));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "group_count", kvc_cache_create(&options, &group, 0, &cache));
    options.block_tokens = 17;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "block_tokens", kvc_cache_create(&options, &group, 1, &cache));
    options.block_tokens = 16;
    options.blocks = 0;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "blocks", kvc_cache_create(&options, &group, 1, &cache));
    options.blocks = 64;
    options.max_seqs = 0;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "max_seqs", kvc_cache_create(&options, &group, 1, &cache));
    options.max_seqs = 4;
    options.threads = 1u << 30;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "threads", kvc_cache_create(&options, &group, 1, &cache));
    options.threads = 1;
    options.prefix_reuse = 2;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "prefix_reuse", kvc_cache_create(&options, &group, 1, &cache));
    options.prefix_reuse = 1;
    options.struct_size = 4;
    FAILS(KVC_ERR_STRUCT_SIZE, "kvc_cache_options", kvc_cache_create(&options, &group, 1, &cache));
    options.struct_size = sizeof options;
    group.v_in_k = 3;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "v_in_k", kvc_cache_create(&options, &group, 1, &cache));
    group.v_in_k = 0;
    // More memory than there is: an answer, not a crash.
    group.layers = 1u << 24;
    options.blocks = 1u << 16;
    FAILS(KVC_ERR_OUT_OF_MEMORY, "bytes", kvc_cache_create(&options, &group, 1, &cache));
    group.layers = UINT32_MAX;
    group.kv_heads = UINT32_MAX;
    FAILS(KVC_ERR_OVERFLOW, "", kvc_cache_create(&options, &group, 1, &cache));
    CHECK(cache == NULL);

    // A struct of a later version, which is longer: its tail must be 0.
    {
        struct {
            kvc_cache_options known;
            uint32_t later[2];
        } longer;
        OK(kvc_cache_options_init(&longer.known, sizeof longer));
        CHECK(longer.known.struct_size == sizeof longer && longer.later[0] == 0);
        longer.known.blocks = 4;
        longer.known.threads = 1;
        longer.later[1] = 1;
        group = toy_group();
        FAILS(KVC_ERR_STRUCT_SIZE, "kvc_cache_options",
              kvc_cache_create(&longer.known, &group, 1, &cache));
        longer.later[1] = 0;
        OK(kvc_cache_create(&longer.known, &group, 1, &cache));
        OK(kvc_cache_destroy(cache));
        cache = NULL;
    }

    // Sealed tiles of which the first stay raw: a slot a sequence more in the staging pool.
    OK(kvc_cache_options_init(&options, sizeof options));
    options.block_tokens = 32;
    options.max_seqs = 4;
    options.threads = 1;
    group = toy_group();
    CHECK(group.sink_tokens == 0);
    group.format = KVC_FORMAT_KT4V4;
    group.k_dim = group.v_dim = 32;
    group.sink_tokens = 33;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "sink_tokens", kvc_cache_create(&options, &group, 1, &cache));
    group.sink_tokens = 32;
    OK(kvc_cache_create(&options, &group, 1, &cache));
    OK(kvc_cache_stats(cache, &counts, sizeof counts));
    CHECK(counts.staging_blocks == 3 * 4 && counts.staged_blocks == 0);
    OK(kvc_cache_destroy(cache));
    cache = NULL;
    group.format = KVC_FORMAT_BF16;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "sink_tokens", kvc_cache_create(&options, &group, 1, &cache));

    // Two groups, the defaults.
    groups[0] = groups[1] = toy_group();
    groups[1].window = 32;
    groups[1].layers = 1;
    OK(kvc_cache_create(NULL, groups, 2, &cache));
    memset(&counts, 0x5A, sizeof counts);
    kept = counts;
    FAILS(KVC_ERR_STRUCT_SIZE, "out", kvc_cache_stats(cache, &counts, 8));
    FAILS(KVC_ERR_NULL_POINTER, "out", kvc_cache_stats(cache, NULL, sizeof counts));
    CHECK(memcmp(&counts, &kept, sizeof counts) == 0);
    OK(kvc_cache_stats(cache, &counts, sizeof counts));
    CHECK(counts.blocks == 1024 && counts.free_blocks == 1024 && counts.reserved == 0);
    // 16 tokens, K and V, 3 layers of both groups together.
    CHECK(counts.block_bytes == 16 * 2 * 3 * KV_HEADS * HEAD_DIM * 4);
    CHECK(counts.pool_bytes == 1024 * counts.block_bytes);
    OK(kvc_cache_clear_prefix(cache));

    OK(kvc_cache_destroy(cache));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_cache_destroy(cache));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_cache_stats(cache, &counts, sizeof counts));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_cache_clear_prefix(cache));
    FAILS(KVC_ERR_NULL_POINTER, "cache", kvc_cache_clear_prefix(NULL));
    OK(kvc_cache_destroy(NULL));
    return check_result();
}
