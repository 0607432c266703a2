// Steps: what they reserve, every way to misuse one, dtypes, rope, and cancelling.
#include "toy_model.h"

int main(void) {
    kvc_cache *cache = toy_cache(6, 4);
    kvc_cache *other = toy_cache(6, 4);
    kvc_step *step = NULL;
    kvc_step *second = NULL;
    kvc_cache_counts before;
    kvc_cache_counts after;
    kvc_work work[2];
    uint32_t prompt[100];
    uint32_t positions[40];
    uint32_t rows = 77;
    uint32_t cached = 0;
    kvc_seq seqs[2];
    float k[20 * KV_HEADS * HEAD_DIM];
    float v[20 * KV_HEADS * HEAD_DIM];
    float q[20 * Q_HEADS * HEAD_DIM];
    float out[20 * Q_HEADS * HEAD_DIM];
    float lse[20 * Q_HEADS];

    for (uint32_t i = 0; i < 100; i++) {
        prompt[i] = 10 + i;
    }
    for (uint32_t i = 0; i < 20; i++) {
        toy_row(k + i * KV_HEADS * HEAD_DIM, TOY_K, prompt[i], i, 0, KV_HEADS);
        toy_row(v + i * KV_HEADS * HEAD_DIM, TOY_V, prompt[i], i, 0, KV_HEADS);
        toy_row(q + i * Q_HEADS * HEAD_DIM, TOY_Q, prompt[i], i, 0, Q_HEADS);
    }
    FAILS(KVC_ERR_NULL_POINTER, "out", kvc_step_create(NULL));
    OK(kvc_step_create(&step));
    OK(kvc_step_create(&second));
    OK(kvc_seq_start(cache, prompt, 100, 0, &seqs[0], &cached));
    OK(kvc_seq_start(cache, prompt + 50, 50, 0, &seqs[1], &cached));
    work[0].seq = seqs[0];
    work[0].token_count = 20;
    work[0].tokens = prompt;
    work[1] = work[0];

    // A closed step.
    OK(kvc_step_rows(step, NULL, 0, &rows));
    CHECK(rows == 0);
    FAILS(KVC_ERR_INVALID_STATE, "open",
          kvc_step_append(cache, step, 0, 0, k, v, KVC_DTYPE_F32, NULL));
    FAILS(KVC_ERR_INVALID_STATE, "open", kvc_step_commit(cache, step));
    FAILS(KVC_ERR_INVALID_STATE, "open", kvc_step_cancel(cache, step));

    // Work that is refused; nothing is taken.
    OK(kvc_cache_stats(cache, &before, sizeof before));
    FAILS(KVC_ERR_NULL_POINTER, "work", kvc_step_begin(cache, step, NULL, 1));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "work", kvc_step_begin(cache, step, work, 0));
    FAILS(KVC_ERR_INVALID_STATE, "step", kvc_step_begin(cache, step, work, 2));
    work[1].seq = UINT32_MAX;
    FAILS(KVC_ERR_STALE_HANDLE, "sequence", kvc_step_begin(cache, step, work, 2));
    work[1].seq = seqs[1];
    work[1].token_count = 0;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "tokens", kvc_step_begin(cache, step, work, 2));
    work[1].token_count = 4;
    work[1].tokens = NULL;
    FAILS(KVC_ERR_NULL_POINTER, "tokens", kvc_step_begin(cache, step, work, 2));
    work[1].tokens = prompt;
    work[1].token_count = 90;
    FAILS(KVC_ERR_OUT_OF_BLOCKS, "8 blocks needed, 2 missing", kvc_step_begin(cache, step, work, 2));
    CHECK(kvc_last_missing_blocks() == 2);
    OK(kvc_cache_stats(cache, &after, sizeof after));
    CHECK(memcmp(&before, &after, sizeof before) == 0);

    // An open step.
    OK(kvc_step_begin(cache, step, work, 1));
    FAILS(KVC_ERR_INVALID_STATE, "open", kvc_step_begin(cache, step, work, 1));
    FAILS(KVC_ERR_INVALID_STATE, "step", kvc_step_begin(cache, second, work, 1));
    FAILS(KVC_ERR_INVALID_STATE, "step", kvc_seq_release(cache, seqs[0]));
    FAILS(KVC_ERR_INVALID_STATE, "open", kvc_step_commit(other, step));
    FAILS(KVC_ERR_BUFFER_TOO_SMALL, "20 needed", kvc_step_rows(step, positions, 19, &rows));
    OK(kvc_step_rows(step, positions, 40, &rows));
    CHECK(rows == 20 && positions[0] == 0 && positions[19] == 19);
    FAILS(KVC_ERR_INVALID_ARGUMENT, "layer",
          kvc_step_append(cache, step, 0, LAYERS, k, v, KVC_DTYPE_F32, NULL));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "group",
          kvc_step_append(cache, step, 1, 0, k, v, KVC_DTYPE_F32, NULL));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "dtype", kvc_step_append(cache, step, 0, 0, k, v, 9, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "k",
          kvc_step_append(cache, step, 0, 0, NULL, v, KVC_DTYPE_F32, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "v",
          kvc_step_append(cache, step, 0, 0, k, NULL, KVC_DTYPE_F32, NULL));
    FAILS(KVC_ERR_MISALIGNED, "k",
          kvc_step_append(cache, step, 0, 0, (char *)k + 2, v, KVC_DTYPE_F32, NULL));
    OK(kvc_step_append(cache, step, 0, 0, k, v, KVC_DTYPE_F32, NULL));
    out[0] = 42.0f;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "q_heads",
          kvc_step_attend(cache, step, 0, 0, 3, q, KVC_DTYPE_F32, out, KVC_DTYPE_F32, NULL, NULL));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "q_heads",
          kvc_step_attend(cache, step, 0, 0, 0, q, KVC_DTYPE_F32, out, KVC_DTYPE_F32, NULL, NULL));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "q_heads",
          kvc_step_attend(cache, step, 0, 0, UINT32_MAX - 3, q, KVC_DTYPE_F32, out, KVC_DTYPE_F32,
                          NULL, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "out",
          kvc_step_attend(cache, step, 0, 0, Q_HEADS, q, KVC_DTYPE_F32, NULL, KVC_DTYPE_F32, NULL,
                          NULL));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "overlap",
          kvc_step_attend(cache, step, 0, 0, Q_HEADS, q, KVC_DTYPE_F32, q, KVC_DTYPE_F32, NULL,
                          NULL));
    {
        kvc_scoring scoring;
        FAILS(KVC_ERR_STRUCT_SIZE, "kvc_scoring", kvc_scoring_init(&scoring, 8));
        OK(kvc_scoring_init(&scoring, sizeof scoring));
        CHECK(scoring.causal == 1);
        scoring.softcap = -1.0f;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "softcap",
              kvc_step_attend(cache, step, 0, 0, Q_HEADS, q, KVC_DTYPE_F32, out, KVC_DTYPE_F32,
                              &scoring, NULL));
        CHECK(out[0] == 42.0f);
        // A window of one: each row sees itself alone, and its output is its own value.
        scoring.softcap = 0.0f;
        scoring.window = 1;
        OK(kvc_step_attend(cache, step, 0, 0, Q_HEADS, q, KVC_DTYPE_F32, out, KVC_DTYPE_F32,
                           &scoring, lse));
        for (uint32_t c = 0; c < HEAD_DIM; c++) {
            CHECK(check_close(out[(7 * Q_HEADS + 3) * HEAD_DIM + c],
                              v[(7 * KV_HEADS + 1) * HEAD_DIM + c], 1e-5f));
        }
    }
    OK(kvc_step_attend(cache, step, 0, 0, Q_HEADS, q, KVC_DTYPE_F32, out, KVC_DTYPE_F32, NULL, lse));
    for (uint32_t i = 0; i < 20; i++) {
        toy_check(__FILE__, __LINE__, out + i * Q_HEADS * HEAD_DIM, lse + i * Q_HEADS, prompt, i, 0);
    }

    // bfloat16 in and out: the upper halves of the floats.
    {
        uint16_t q16[20 * Q_HEADS * HEAD_DIM];
        uint16_t out16[20 * Q_HEADS * HEAD_DIM];
        for (uint32_t i = 0; i < 20 * Q_HEADS * HEAD_DIM; i++) {
            uint32_t bits;
            memcpy(&bits, &q[i], sizeof bits);
            q16[i] = (uint16_t)(bits >> 16);
        }
        OK(kvc_step_attend(cache, step, 0, 0, Q_HEADS, q16, KVC_DTYPE_BF16, out16, KVC_DTYPE_BF16,
                           NULL, NULL));
        for (uint32_t i = 0; i < 20 * Q_HEADS * HEAD_DIM; i++) {
            uint32_t bits = (uint32_t)out16[i] << 16;
            float x;
            memcpy(&x, &bits, sizeof x);
            CHECK(check_close(x, out[i], 0.02f));
        }
    }

    // Rotating keys in the library and queries here is the same as rotating both.
    {
        kvc_rope rope;
        float rotated_k[20 * KV_HEADS * HEAD_DIM];
        float rotated_q[20 * Q_HEADS * HEAD_DIM];
        float expected[20 * Q_HEADS * HEAD_DIM];
        OK(kvc_rope_init(&rope, sizeof rope));
        rope.rotary_dim = HEAD_DIM;
        memcpy(rotated_k, k, sizeof k);
        memcpy(rotated_q, q, sizeof q);
        OK(kvc_rope_rotate(&rope, rotated_k, KV_HEADS, HEAD_DIM, positions, 20));
        OK(kvc_rope_rotate(&rope, rotated_q, Q_HEADS, HEAD_DIM, positions, 20));
        OK(kvc_step_append(cache, step, 0, 0, rotated_k, v, KVC_DTYPE_F32, NULL));
        OK(kvc_step_attend(cache, step, 0, 0, Q_HEADS, rotated_q, KVC_DTYPE_F32, expected,
                           KVC_DTYPE_F32, NULL, NULL));
        OK(kvc_step_append(cache, step, 0, 0, k, v, KVC_DTYPE_F32, &rope));
        OK(kvc_step_attend(cache, step, 0, 0, Q_HEADS, rotated_q, KVC_DTYPE_F32, out,
                           KVC_DTYPE_F32, NULL, NULL));
        for (uint32_t i = 0; i < 20 * Q_HEADS * HEAD_DIM; i++) {
            CHECK(check_close(out[i], expected[i], 1e-5f));
        }
        rope.rotary_dim = 2 * HEAD_DIM;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "rope",
              kvc_step_append(cache, step, 0, 0, k, v, KVC_DTYPE_F32, &rope));
    }

    // Cancelling gives everything back.
    OK(kvc_step_cancel(cache, step));
    OK(kvc_cache_stats(cache, &after, sizeof after));
    CHECK(memcmp(&before, &after, sizeof before) == 0);

    // Destroying an open step cancels it.
    OK(kvc_step_begin(cache, second, work, 1));
    OK(kvc_step_destroy(second));
    FAILS(KVC_ERR_STALE_HANDLE, "step", kvc_step_rows(second, NULL, 0, &rows));
    OK(kvc_cache_stats(cache, &after, sizeof after));
    CHECK(memcmp(&before, &after, sizeof before) == 0);
    OK(kvc_seq_release(cache, seqs[0]));

    // A step may outlive the cache that has it open, and serve another.
    work[0].seq = seqs[1];
    OK(kvc_step_begin(cache, step, work, 1));
    OK(kvc_cache_destroy(cache));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_step_commit(cache, step));
    FAILS(KVC_ERR_INVALID_STATE, "open", kvc_step_commit(other, step));
    OK(kvc_step_destroy(step));
    OK(kvc_step_destroy(NULL));
    OK(kvc_cache_destroy(other));
    return check_result();
}
