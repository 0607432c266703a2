// Sequences: start, fork, truncate, release, read back, and ids that are not live.
#include "toy_model.h"

int main(void) {
    kvc_cache *cache = toy_cache(32, 3);
    kvc_cache *other = toy_cache(32, 3);
    kvc_step *step = NULL;
    kvc_cache_counts counts;
    uint32_t prompt[40];
    uint32_t out[40];
    int32_t blocks[8];
    int32_t forked[8];
    uint32_t cached = 77;
    uint64_t count = 77;
    kvc_seq seq = 77;
    kvc_seq fork = 77;
    kvc_seq extra = 77;

    for (uint32_t i = 0; i < 40; i++) {
        prompt[i] = 10 + i;
    }
    OK(kvc_step_create(&step));

    FAILS(KVC_ERR_NULL_POINTER, "cache", kvc_seq_start(NULL, prompt, 40, 0, &seq, &cached));
    FAILS(KVC_ERR_NULL_POINTER, "prompt", kvc_seq_start(cache, NULL, 40, 0, &seq, &cached));
    FAILS(KVC_ERR_NULL_POINTER, "out_seq", kvc_seq_start(cache, prompt, 40, 0, NULL, &cached));
    FAILS(KVC_ERR_NULL_POINTER, "out_cached", kvc_seq_start(cache, prompt, 40, 0, &seq, NULL));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "prompt", kvc_seq_start(cache, prompt, 0, 0, &seq, &cached));
    FAILS(KVC_ERR_OVERFLOW, "prompt", kvc_seq_start(cache, prompt, UINT64_MAX, 0, &seq, &cached));
    FAILS(KVC_ERR_MISALIGNED, "prompt",
          kvc_seq_start(cache, (const uint32_t *)(const void *)((const char *)prompt + 1), 4, 0,
                        &seq, &cached));
    CHECK(seq == 77 && cached == 77);

    OK(kvc_seq_start(cache, prompt, 40, 0, &seq, &cached));
    CHECK(cached == 0);
    toy_feed(cache, step, seq, prompt, 0, 40);

    // Reading back.
    OK(kvc_seq_tokens(cache, seq, NULL, 0, &count));
    CHECK(count == 40);
    FAILS(KVC_ERR_BUFFER_TOO_SMALL, "40 needed", kvc_seq_tokens(cache, seq, out, 39, &count));
    OK(kvc_seq_tokens(cache, seq, out, 40, &count));
    CHECK(memcmp(out, prompt, sizeof prompt) == 0);
    OK(kvc_seq_blocks(cache, seq, 0, blocks, 8, &count));
    CHECK(count == 3);
    FAILS(KVC_ERR_INVALID_ARGUMENT, "group", kvc_seq_blocks(cache, seq, 1, blocks, 8, &count));

    // A fork has the same blocks; the one that is written first gets its own last block.
    OK(kvc_seq_fork(cache, seq, &fork));
    OK(kvc_seq_blocks(cache, fork, 0, forked, 8, &count));
    CHECK(fork != seq && count == 3 && memcmp(blocks, forked, 3 * sizeof *blocks) == 0);
    OK(kvc_seq_truncate(cache, fork, 35));
    {
        uint32_t other_way[41];
        memcpy(other_way, prompt, sizeof prompt);
        other_way[35] = 999;
        toy_feed(cache, step, fork, other_way, 35, 1);
    }
    OK(kvc_seq_blocks(cache, fork, 0, forked, 8, &count));
    CHECK(forked[1] == blocks[1] && forked[2] != blocks[2]);
    OK(kvc_cache_stats(cache, &counts, sizeof counts));
    CHECK(counts.copied_blocks == 1 && counts.sequences == 2);
    FAILS(KVC_ERR_INVALID_ARGUMENT, "tokens", kvc_seq_truncate(cache, fork, 37));

    // What stays when they are gone.
    {
        kvc_retention keep = {0, 32, 90, 1000};
        kvc_retention wrong = {0, 32, 101, 0};
        OK(kvc_cache_advance(cache, 5));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "now_ms", kvc_cache_advance(cache, UINT64_MAX));
        OK(kvc_seq_prioritize(cache, seq, &keep, 1));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "priority", kvc_seq_prioritize(cache, seq, &wrong, 1));
        FAILS(KVC_ERR_NULL_POINTER, "ranges", kvc_seq_prioritize(cache, seq, NULL, 1));
        FAILS(KVC_ERR_STALE_HANDLE, "sequence", kvc_seq_prioritize(cache, 0, &keep, 1));
        OK(kvc_seq_hint(cache, fork, 1, KVC_HINT_EXPECTED, 500));
        OK(kvc_seq_hint(cache, fork, 0, KVC_HINT_NONE, 0));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "hint", kvc_seq_hint(cache, fork, 0, 9, 0));
        FAILS(KVC_ERR_STALE_HANDLE, "sequence", kvc_seq_hint(cache, 0, 0, KVC_HINT_ENDED, 0));
    }

    // The limit.
    OK(kvc_seq_start(cache, prompt, 20, 0, &extra, &cached));
    CHECK(cached == 19);
    FAILS(KVC_ERR_OUT_OF_SEQUENCES, "3", kvc_seq_fork(cache, seq, &seq));
    FAILS(KVC_ERR_OUT_OF_SEQUENCES, "3", kvc_seq_start(cache, prompt, 20, 0, &seq, &cached));

    // Equal tokens with other images share what is before the first of them.
    {
        kvc_media images[2] = {{18, {1}}, {30, {2}}};
        kvc_media wrong[2] = {{5, {1}}, {5, {2}}};
        kvc_media outside = {40, {1}};
        OK(kvc_seq_release(cache, extra));
        OK(kvc_seq_start_media(cache, prompt, 40, images, 2, 0, &extra, &cached));
        CHECK(cached == 18);
        toy_feed(cache, step, extra, prompt, cached, 40 - cached);
        FAILS(KVC_ERR_INVALID_ARGUMENT, "media", kvc_seq_truncate(cache, extra, 30));
        OK(kvc_seq_release(cache, extra));
        OK(kvc_seq_start_media(cache, prompt, 40, images, 2, 0, &extra, &cached));
        CHECK(cached == 32);
        OK(kvc_seq_release(cache, extra));
        images[0].digest[31] = 1;
        OK(kvc_seq_start_media(cache, prompt, 40, images, 2, 0, &extra, &cached));
        CHECK(cached == 18);
        OK(kvc_seq_release(cache, extra));
        OK(kvc_seq_start_media(cache, prompt, 40, NULL, 0, 0, &extra, &cached));
        CHECK(cached == 32);
        OK(kvc_seq_release(cache, extra));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "media",
              kvc_seq_start_media(cache, prompt, 40, wrong, 2, 0, &seq, &cached));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "media",
              kvc_seq_start_media(cache, prompt, 40, &outside, 1, 0, &seq, &cached));
        FAILS(KVC_ERR_NULL_POINTER, "media",
              kvc_seq_start_media(cache, prompt, 40, NULL, 1, 0, &seq, &cached));
        outside.position = UINT64_MAX;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "media",
              kvc_seq_start_media(cache, prompt, 40, &outside, 1, 0, &seq, &cached));
        CHECK(cached == 32);
        prompt[39] = UINT32_MAX;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "tokens", kvc_seq_start(cache, prompt, 40, 0, &seq, &cached));
        prompt[39] = 49;
        OK(kvc_seq_start(cache, prompt, 20, 0, &extra, &cached));
    }

    // Ids that are not live: ended, of another cache, invented.
    OK(kvc_seq_release(cache, extra));
    FAILS(KVC_ERR_STALE_HANDLE, "sequence", kvc_seq_release(cache, extra));
    FAILS(KVC_ERR_STALE_HANDLE, "sequence", kvc_seq_tokens(cache, extra, out, 40, &count));
    FAILS(KVC_ERR_STALE_HANDLE, "sequence", kvc_seq_fork(cache, UINT32_MAX, &extra));
    FAILS(KVC_ERR_STALE_HANDLE, "sequence", kvc_seq_truncate(other, fork, 0));
    OK(kvc_seq_start(cache, prompt, 20, 0, &extra, &cached));

    OK(kvc_step_destroy(step));
    OK(kvc_cache_destroy(cache));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_seq_release(cache, seq));
    OK(kvc_cache_destroy(other));
    return check_result();
}
