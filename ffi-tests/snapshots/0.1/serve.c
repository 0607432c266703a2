// The whole library in one run: plan memory, make a cache, serve sequences that share a prompt
// (prefill in chunks, continuous batches, fork, release), and check every row of attention against
// the definition.
#include "toy_model.h"

enum { SYSTEM = 45, PROMPT = 70, LONGEST = 120, SEQS = 4 };

static uint32_t histories[SEQS + 1][LONGEST];
static uint32_t lengths[SEQS + 1];

static void stats(kvc_cache *cache, kvc_cache_counts *counts) {
    OK(kvc_cache_stats(cache, counts, sizeof *counts));
    CHECK(counts->blocks ==
          counts->free_blocks + counts->cached_blocks + counts->referenced_blocks);
}

int main(void) {
    kvc_plan_options plan;
    kvc_plan_result budget;
    kvc_plan_group part;
    kvc_group_spec group = toy_group();
    kvc_cache_options options;
    kvc_cache *cache = NULL;
    kvc_step *step = NULL;
    kvc_cache_counts counts;
    kvc_seq seqs[SEQS + 1];

    // Plan: as many blocks as a budget of 512 KiB holds.
    OK(kvc_plan_options_init(&plan, sizeof plan));
    plan.memory_bytes = 512 << 10;
    plan.context_tokens = LONGEST;
    plan.batch = SEQS;
    OK(kvc_plan_compute(&plan, &group, 1, &budget, sizeof budget, &part));
    CHECK(budget.fits == 1 && part.blocks >= SEQS * part.sequence_blocks);

    OK(kvc_cache_options_init(&options, sizeof options));
    options.blocks = (uint32_t)part.blocks;
    options.max_seqs = 8;
    options.threads = 2;
    OK(kvc_cache_create(&options, &group, 1, &cache));
    OK(kvc_step_create(&step));
    stats(cache, &counts);
    CHECK(counts.blocks == part.blocks && counts.free_blocks == counts.blocks);
    CHECK(counts.pool_bytes == part.blocks * part.block_bytes);

    // Prompts: one system prompt, then each its own.
    for (uint32_t s = 0; s < SEQS; s++) {
        for (uint32_t i = 0; i < PROMPT; i++) {
            histories[s][i] = i < SYSTEM ? 1000 + i : 2000 + 100 * s + i;
        }
    }

    // The first sequence finds nothing and is prefilled in chunks.
    for (uint32_t s = 0; s < SEQS; s++) {
        uint32_t cached = 99;
        uint64_t held = 0;
        OK(kvc_seq_start(cache, histories[s], PROMPT, 1, &seqs[s], &cached));
        // Two whole blocks of 16, and 13 tokens of the third by copy.
        CHECK(cached == (s == 0 ? 0 : SYSTEM));
        OK(kvc_seq_tokens(cache, seqs[s], NULL, 0, &held));
        CHECK(held == cached);
        for (uint32_t at = cached; at < PROMPT;) {
            uint32_t chunk = PROMPT - at < 29 ? PROMPT - at : 29;
            toy_feed(cache, step, seqs[s], histories[s], at, chunk);
            at += chunk;
        }
        lengths[s] = PROMPT;
    }
    stats(cache, &counts);
    CHECK(counts.sequences == SEQS && counts.sequence_tokens == SEQS * PROMPT);
    CHECK(counts.looked_up_tokens == SEQS * PROMPT && counts.hit_tokens == (SEQS - 1) * SYSTEM);
    // Five blocks a sequence, of which two are shared.
    CHECK(counts.referenced_blocks == 5 + (SEQS - 1) * 3);

    // Another tenant shares nothing.
    {
        kvc_seq other;
        uint32_t cached = 99;
        OK(kvc_seq_start(cache, histories[0], PROMPT, 2, &other, &cached));
        CHECK(cached == 0);
        OK(kvc_seq_release(cache, other));
    }

    // A fork shares all; then both go on differently, in one batch with the others.
    OK(kvc_seq_fork(cache, seqs[0], &seqs[SEQS]));
    memcpy(histories[SEQS], histories[0], sizeof histories[0]);
    lengths[SEQS] = lengths[0];
    for (uint32_t round = 0; round < 30; round++) {
        kvc_work work[SEQS + 1];
        const uint32_t *all[SEQS + 1];
        uint32_t now[SEQS + 1];
        uint32_t count = 0;
        for (uint32_t s = 0; s <= SEQS; s++) {
            // Sequence 3 ends early.
            if (s == 3 && round >= 10) {
                continue;
            }
            histories[s][lengths[s]] = 5000 + 7 * s + round;
            work[count].seq = seqs[s];
            work[count].token_count = 1;
            work[count].tokens = &histories[s][lengths[s]];
            lengths[s] += 1;
            now[count] = lengths[s];
            all[count] = histories[s];
            count += 1;
        }
        OK(kvc_step_begin(cache, step, work, count));
        toy_forward(cache, step, work, count, all, now);
        OK(kvc_step_commit(cache, step));
        if (round == 9) {
            OK(kvc_seq_release(cache, seqs[3]));
        }
    }
    {
        uint32_t tokens[LONGEST];
        uint64_t held = 0;
        OK(kvc_seq_tokens(cache, seqs[SEQS], tokens, LONGEST, &held));
        CHECK(held == lengths[SEQS]);
        CHECK(memcmp(tokens, histories[SEQS], held * sizeof *tokens) == 0);
    }

    // What a sequence leaves behind is found by the next with the same tokens.
    for (uint32_t s = 0; s <= SEQS; s++) {
        if (s != 3) {
            OK(kvc_seq_release(cache, seqs[s]));
        }
    }
    stats(cache, &counts);
    CHECK(counts.sequences == 0 && counts.referenced_blocks == 0 && counts.cached_blocks > 0);
    {
        kvc_seq again;
        uint32_t cached = 0;
        OK(kvc_seq_start(cache, histories[2], lengths[2], 1, &again, &cached));
        CHECK(cached >= 96 && cached < lengths[2]);
        toy_feed(cache, step, again, histories[2], cached, lengths[2] - cached);
        OK(kvc_seq_release(cache, again));
    }
    OK(kvc_cache_clear_prefix(cache));
    stats(cache, &counts);
    CHECK(counts.free_blocks == counts.blocks);

    OK(kvc_step_destroy(step));
    OK(kvc_cache_destroy(cache));
    return check_result();
}
