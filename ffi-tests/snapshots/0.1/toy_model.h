// A toy model for the cache programs: keys, values and queries that follow from a token and its
// position, and attention over a token history by the definition, in double.
#ifndef TOY_MODEL_H
#define TOY_MODEL_H

#include <stdlib.h>

#include "check.h"

enum { LAYERS = 2, KV_HEADS = 2, Q_HEADS = 4, HEAD_DIM = 16 };

static inline float toy_value(uint32_t what, uint32_t token, uint32_t position, uint32_t layer,
                              uint32_t head, uint32_t channel) {
    return check_noise(
        ((((what * 31 + token) * 1009 + position) * 7 + layer) * 13 + head) * 257 + channel);
}

// Fills [heads][HEAD_DIM] of one row.
static inline void toy_row(float *row, uint32_t what, uint32_t token, uint32_t position,
                           uint32_t layer, uint32_t heads) {
    for (uint32_t h = 0; h < heads; h++) {
        for (uint32_t c = 0; c < HEAD_DIM; c++) {
            row[h * HEAD_DIM + c] = toy_value(what, token, position, layer, h, c);
        }
    }
}

enum { TOY_K = 1, TOY_V = 2, TOY_Q = 3 };

// Checks the outputs and LSEs of the token at `position` of `tokens`: [Q_HEADS][HEAD_DIM].
static inline void toy_check(const char *file, int line, const float *out, const float *lse,
                             const uint32_t *tokens, uint32_t position, uint32_t layer) {
    for (uint32_t h = 0; h < Q_HEADS; h++) {
        uint32_t kv = h / (Q_HEADS / KV_HEADS);
        double top = -INFINITY;
        double sum = 0.0;
        double o[HEAD_DIM] = {0};
        double *scores = malloc((position + 1) * sizeof *scores);
        if (scores == NULL) {
            exit(2);
        }
        for (uint32_t j = 0; j <= position; j++) {
            scores[j] = 0.0;
            for (uint32_t c = 0; c < HEAD_DIM; c++) {
                scores[j] += (double)toy_value(TOY_Q, tokens[position], position, layer, h, c) *
                             (double)toy_value(TOY_K, tokens[j], j, layer, kv, c);
            }
            scores[j] /= sqrt((double)HEAD_DIM);
            top = fmax(top, scores[j]);
        }
        for (uint32_t j = 0; j <= position; j++) {
            double p = exp(scores[j] - top);
            sum += p;
            for (uint32_t c = 0; c < HEAD_DIM; c++) {
                o[c] += p * (double)toy_value(TOY_V, tokens[j], j, layer, kv, c);
            }
        }
        free(scores);
        for (uint32_t c = 0; c < HEAD_DIM; c++) {
            if (!check_close(out[h * HEAD_DIM + c], (float)(o[c] / sum), 2e-5f)) {
                check_fail(file, line, "attention", "differs from the definition");
                return;
            }
        }
        if (!check_close(lse[h], (float)(top + log(sum)), 2e-5f)) {
            check_fail(file, line, "lse", "differs from the definition");
            return;
        }
    }
}

static inline kvc_group_spec toy_group(void) {
    kvc_group_spec group;
    OK(kvc_group_spec_init(&group, sizeof group));
    group.layers = LAYERS;
    group.kv_heads = KV_HEADS;
    group.k_dim = group.v_dim = HEAD_DIM;
    group.format = KVC_FORMAT_F32;
    return group;
}

static inline kvc_cache *toy_cache(uint32_t blocks, uint32_t max_seqs) {
    kvc_cache *cache = NULL;
    kvc_group_spec group = toy_group();
    kvc_cache_options options;
    OK(kvc_cache_options_init(&options, sizeof options));
    options.blocks = blocks;
    options.max_seqs = max_seqs;
    options.threads = 2;
    OK(kvc_cache_create(&options, &group, 1, &cache));
    return cache;
}

// Runs all layers of an open step. `histories[i]` are all tokens of the i-th sequence of the work
// and `lengths[i]` how many, the new ones included; every new row is checked.
static inline void toy_forward(kvc_cache *cache, kvc_step *step, const kvc_work *work,
                               uint32_t work_count, const uint32_t *const *histories,
                               const uint32_t *lengths) {
    uint32_t rows = 0;
    uint32_t expected = 0;
    for (uint32_t i = 0; i < work_count; i++) {
        expected += work[i].token_count;
    }
    uint32_t *positions = malloc(expected * sizeof *positions);
    float *k = malloc(expected * KV_HEADS * HEAD_DIM * sizeof *k);
    float *v = malloc(expected * KV_HEADS * HEAD_DIM * sizeof *v);
    float *q = malloc(expected * Q_HEADS * HEAD_DIM * sizeof *q);
    float *out = malloc(expected * Q_HEADS * HEAD_DIM * sizeof *out);
    float *lse = malloc(expected * Q_HEADS * sizeof *lse);
    if (!positions || !k || !v || !q || !out || !lse) {
        exit(2);
    }
    OK(kvc_step_rows(step, positions, expected, &rows));
    CHECK(rows == expected);
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        uint32_t row = 0;
        for (uint32_t i = 0; i < work_count; i++) {
            for (uint32_t t = 0; t < work[i].token_count; t++, row++) {
                uint32_t position = lengths[i] - work[i].token_count + t;
                uint32_t token = work[i].tokens[t];
                CHECK(positions[row] == position && histories[i][position] == token);
                toy_row(k + row * KV_HEADS * HEAD_DIM, TOY_K, token, position, layer, KV_HEADS);
                toy_row(v + row * KV_HEADS * HEAD_DIM, TOY_V, token, position, layer, KV_HEADS);
                toy_row(q + row * Q_HEADS * HEAD_DIM, TOY_Q, token, position, layer, Q_HEADS);
            }
        }
        for (uint32_t i = 0; i < rows * Q_HEADS * HEAD_DIM; i++) {
            out[i] = NAN;
        }
        OK(kvc_step_append(cache, step, 0, layer, k, v, KVC_DTYPE_F32, NULL));
        OK(kvc_step_attend(cache, step, 0, layer, Q_HEADS, q, KVC_DTYPE_F32, out, KVC_DTYPE_F32,
                           NULL, lse));
        row = 0;
        for (uint32_t i = 0; i < work_count; i++) {
            for (uint32_t t = 0; t < work[i].token_count; t++, row++) {
                toy_check(__FILE__, __LINE__, out + row * Q_HEADS * HEAD_DIM, lse + row * Q_HEADS,
                          histories[i], lengths[i] - work[i].token_count + t, layer);
            }
        }
    }
    free(positions);
    free(k);
    free(v);
    free(q);
    free(out);
    free(lse);
}

// Appends `count` tokens of `history` from `start` on to one sequence, in one committed step.
static inline void toy_feed(kvc_cache *cache, kvc_step *step, kvc_seq seq, const uint32_t *history,
                            uint32_t start, uint32_t count) {
    kvc_work work;
    uint32_t length = start + count;
    work.seq = seq;
    work.token_count = count;
    work.tokens = history + start;
    OK(kvc_step_begin(cache, step, &work, 1));
    toy_forward(cache, step, &work, 1, &history, &length);
    OK(kvc_step_commit(cache, step));
}

#endif  // TOY_MODEL_H
