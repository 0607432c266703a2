// Metrics: counts of a short life, times on a clock that the program sets, and their text.
#include <stdlib.h>

#include "toy_model.h"

static kvc_cache *cache;

static void serve(kvc_step *step, uint32_t first, uint32_t count) {
    uint32_t prompt[512];
    uint32_t cached;
    kvc_seq seq;
    kvc_work work;
    for (uint32_t i = 0; i < count; i++) {
        prompt[i] = first + i;
    }
    OK(kvc_seq_start(cache, prompt, count, 0, &seq, &cached));
    work.seq = seq;
    work.token_count = count - cached;
    work.tokens = prompt + cached;
    OK(kvc_step_begin(cache, step, &work, 1));
    OK(kvc_step_commit(cache, step));
    OK(kvc_seq_release(cache, seq));
}

int main(void) {
    static char text[16384];
    kvc_cache_options sizes;
    kvc_group_spec group = toy_group();
    kvc_metrics metrics;
    kvc_step *step = NULL;
    kvc_seq seqs[2];
    kvc_work work;
    uint32_t cached;
    uint32_t tokens[200] = {0};
    uint64_t length = 0;

    OK(kvc_cache_options_init(&sizes, sizeof sizes));
    sizes.blocks = 8;
    sizes.threads = 1;
    sizes.max_seqs = 1;
    OK(kvc_cache_create(&sizes, &group, 1, &cache));
    OK(kvc_step_create(&step));
    OK(kvc_metrics_set_time(cache, 1000));
    OK(kvc_metrics_watch(cache, 1));
    serve(step, 0, 65);      // 4 blocks
    OK(kvc_metrics_set_time(cache, 1030));
    serve(step, 0, 65);      // again: 64 tokens found
    OK(kvc_metrics_set_time(cache, 2000));
    serve(step, 1000, 8 * 16); // all 8 blocks: the 4 go
    OK(kvc_seq_start(cache, tokens, 1, 0, &seqs[0], &cached));
    FAILS(KVC_ERR_OUT_OF_SEQUENCES, "", kvc_seq_start(cache, tokens, 1, 0, &seqs[1], &cached));
    work.seq = seqs[0];
    work.token_count = 9 * 16;
    work.tokens = tokens;
    FAILS(KVC_ERR_OUT_OF_BLOCKS, "1 missing", kvc_step_begin(cache, step, &work, 1));
    OK(kvc_cache_clear_prefix(cache));

    memset(&metrics, 0x5A, sizeof metrics);
    FAILS(KVC_ERR_STRUCT_SIZE, "out", kvc_metrics_read(cache, &metrics, 600));
    FAILS(KVC_ERR_NULL_POINTER, "out", kvc_metrics_read(cache, NULL, sizeof metrics));
    OK(kvc_metrics_read(cache, &metrics, sizeof metrics));
    CHECK(metrics.blocks == 8 && metrics.referenced_blocks == 0 && metrics.cached_blocks == 0);
    CHECK(metrics.sequences == 1 && metrics.reserved == 0 && metrics.watched_every == 1);
    CHECK(metrics.queries_tokens == 65 + 65 + 128 + 1 && metrics.hits_tokens == 64);
    CHECK(metrics.evicted_capacity_blocks == 4 && metrics.evicted_cleared_blocks == 8);
    CHECK(metrics.out_of_blocks == 1 && metrics.missing_blocks == 1);
    CHECK(metrics.out_of_sequences == 1 && metrics.dropped_events == 0);
    // Four blocks were used again after 30 ms and lived for 1000, idle for 970 of them; eight went
    // as soon as they were there.
    CHECK(metrics.reuse_gap.counts[5] == 4 && metrics.reuse_gap.sum_ms == 120);
    CHECK(metrics.lifetime.counts[9] == 4 && metrics.lifetime.counts[0] == 8);
    CHECK(metrics.lifetime.sum_ms == 4000 && metrics.idle_before_evict.sum_ms == 4 * 970);

    OK(kvc_metrics_text(cache, NULL, 0, &length));
    CHECK(length > 1000 && length < 8192);
    memset(text, 0x5A, sizeof text);
    OK(kvc_metrics_text(cache, text, 10, &length));
    CHECK(strlen(text) == 9 && text[10] == 0x5A);
    OK(kvc_metrics_text(cache, text, sizeof text, &length));
    CHECK(strlen(text) == length);
    CHECK(strstr(text, "\nkvcache:prefix_cache_queries_total 259\n") != NULL);
    CHECK(strstr(text, "\nkvcache:prefix_cache_hits_total 64\n") != NULL);
    CHECK(strstr(text, "\nkvcache:kv_cache_usage_perc 0\n") != NULL);
    CHECK(strstr(text, "\nkvcache:kv_block_evictions_total{reason=\"capacity\"} 4\n") != NULL);
    CHECK(strstr(text, "\nkvcache:kv_block_reuse_gap_seconds_bucket{le=\"0.02\"} 0\n") != NULL);
    CHECK(strstr(text, "\nkvcache:kv_block_reuse_gap_seconds_bucket{le=\"0.05\"} 4\n") != NULL);
    CHECK(strstr(text, "\nkvcache:kv_block_lifetime_seconds_bucket{le=\"+Inf\"} 12\n") != NULL);
    CHECK(strstr(text, "\nkvcache:kv_block_lifetime_seconds_sum 4\n") != NULL);
    FAILS(KVC_ERR_NULL_POINTER, "out_len", kvc_metrics_text(cache, text, 10, NULL));

    // Off again: the histograms are empty, the counts stay.
    OK(kvc_metrics_watch(cache, 0));
    OK(kvc_metrics_read(cache, &metrics, sizeof metrics));
    CHECK(metrics.watched_every == 0 && metrics.lifetime.sum_ms == 0 && metrics.hits_tokens == 64);
    OK(kvc_cache_audit(cache));

    OK(kvc_step_destroy(step));
    OK(kvc_cache_destroy(cache));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_metrics_read(cache, &metrics, sizeof metrics));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_metrics_text(cache, text, 10, &length));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_metrics_watch(cache, 1));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_metrics_set_time(cache, 1));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_cache_audit(cache));
    return check_result();
}
