// Quantised rows in the program's own memory: where codes and scales lie, what comes back, and what
// is refused.
#include "check.h"

enum { BLOCKS = 2, TOKENS = 16, HEADS = 2, DIM = 64, ROWS = 20 };
// A run of int8_t: codes of all tokens, then an f16 each.
enum { RUN = TOKENS * (DIM + 2) };

static unsigned char k[BLOCKS * HEADS * RUN], v[BLOCKS * HEADS * RUN];
static unsigned char k_codes[BLOCKS * TOKENS * HEADS * DIM], v_codes[BLOCKS * TOKENS * HEADS * DIM];
static uint16_t k_side[BLOCKS * TOKENS * HEADS], v_side[BLOCKS * TOKENS * HEADS];
static float k_rows[ROWS * HEADS * DIM], v_rows[ROWS * HEADS * DIM];
static float q[HEADS * DIM], out[HEADS * DIM], again[HEADS * DIM];
static unsigned char workspace[1 << 22];

static void describe_append(kvc_append_desc *d, uint32_t format, void *keys, void *values) {
    static int64_t slots[ROWS];
    for (int i = 0; i < ROWS; i++) {
        slots[i] = i;
    }
    OK(kvc_append_desc_init(d, sizeof *d));
    CHECK(d->scales == NULL);
    d->kv_heads = HEADS;
    d->k_dim = d->v_dim = DIM;
    d->format = format;
    d->dtype = KVC_DTYPE_F32;
    d->block_tokens = TOKENS;
    d->num_blocks = BLOCKS;
    d->rows = ROWS;
    d->k = keys;
    d->v = values;
    d->slots = slots;
    d->k_rows = k_rows;
    d->v_rows = v_rows;
}

static void describe_attend(kvc_attend_desc *d, uint32_t format, const void *keys,
                            const void *values, float *to) {
    static const int32_t table[BLOCKS] = {0, 1}, q_indptr[2] = {0, 1}, kv_lens[1] = {ROWS};
    OK(kvc_attend_desc_init(d, sizeof *d));
    d->q_heads = d->kv_heads = HEADS;
    d->k_dim = d->v_dim = DIM;
    d->format = format;
    d->q_dtype = d->out_dtype = KVC_DTYPE_F32;
    d->block_tokens = TOKENS;
    d->num_blocks = BLOCKS;
    d->seqs = 1;
    d->k = keys;
    d->v = values;
    d->table = table;
    d->table_stride = BLOCKS;
    d->q_indptr = q_indptr;
    d->kv_lens = kv_lens;
    d->q = q;
    d->out = to;
    d->workspace = workspace;
    d->workspace_bytes = sizeof workspace;
}

// The definition over the rows as they were given, in double.
static void check_output(const float *got, float tolerance) {
    for (int h = 0; h < HEADS; h++) {
        double weights[ROWS], sum = 0.0;
        for (int t = 0; t < ROWS; t++) {
            double dot = 0.0;
            for (int c = 0; c < DIM; c++) {
                dot += (double)q[h * DIM + c] * (double)k_rows[(t * HEADS + h) * DIM + c];
            }
            weights[t] = exp(dot / sqrt((double)DIM));
            sum += weights[t];
        }
        for (int c = 0; c < DIM; c++) {
            double o = 0.0;
            for (int t = 0; t < ROWS; t++) {
                o += weights[t] * (double)v_rows[(t * HEADS + h) * DIM + c] / sum;
            }
            CHECK(check_close(got[h * DIM + c], (float)o, tolerance));
        }
    }
}

int main(void) {
    kvc_append_desc a;
    kvc_attend_desc d;
    kvc_scales scales;
    float heads[HEADS] = {0.004f, 0.02f};

    for (uint32_t i = 0; i < ROWS * HEADS * DIM; i++) {
        k_rows[i] = check_noise(i);
        v_rows[i] = check_noise(i + 7000);
    }
    for (uint32_t i = 0; i < HEADS * DIM; i++) {
        q[i] = 2.0f * check_noise(i + 90000);
    }

    // Natively: runs of codes with their scales behind them.
    describe_append(&a, KVC_FORMAT_INT8_T, k, v);
    OK(kvc_append(&a));
    describe_attend(&d, KVC_FORMAT_INT8_T, k, v, out);
    OK(kvc_attend(&d));
    check_output(out, 0.02f);

    // The same bytes where codes are NHD and scales in tensors of their own.
    OK(kvc_scales_init(&scales, sizeof scales));
    scales.k = k_side;
    scales.v = v_side;
    scales.k_block_stride = scales.v_block_stride = TOKENS * HEADS * 2;
    scales.k_head_stride = scales.v_head_stride = 2;
    scales.k_token_stride = scales.v_token_stride = HEADS * 2;
    describe_append(&a, KVC_FORMAT_INT8_T, k_codes, v_codes);
    a.k_block_stride = a.v_block_stride = TOKENS * HEADS * DIM;
    a.k_head_stride = a.v_head_stride = DIM;
    a.k_token_stride = a.v_token_stride = HEADS * DIM;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "scales", kvc_append(&a));
    a.scales = &scales;
    OK(kvc_append(&a));
    for (int t = 0; t < ROWS; t++) {
        for (int h = 0; h < HEADS; h++) {
            const unsigned char *run = k + (t / TOKENS * HEADS + h) * RUN;
            CHECK(memcmp(k_codes + (t * HEADS + h) * DIM, run + t % TOKENS * DIM, DIM) == 0);
            CHECK(memcmp(k_side + t * HEADS + h, run + TOKENS * DIM + t % TOKENS * 2, 2) == 0);
        }
    }
    describe_attend(&d, KVC_FORMAT_INT8_T, k_codes, v_codes, again);
    d.k_block_stride = d.v_block_stride = TOKENS * HEADS * DIM;
    d.k_head_stride = d.v_head_stride = DIM;
    d.k_token_stride = d.v_token_stride = HEADS * DIM;
    d.scales = &scales;
    OK(kvc_attend(&d));
    CHECK(memcmp(out, again, sizeof out) == 0);
    scales.k_token_stride = 3;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "scales", kvc_attend(&d));
    scales.k_token_stride = HEADS * 2;
    scales.k_heads = heads;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "k head scales", kvc_attend(&d));
    scales.k_unrotated = 2;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "k_unrotated", kvc_attend(&d));
    scales.struct_size = 4;
    FAILS(KVC_ERR_STRUCT_SIZE, "kvc_scales", kvc_attend(&d));

    // fp8 with a scale a head.
    OK(kvc_scales_init(&scales, sizeof scales));
    scales.k_heads = scales.v_heads = heads;
    describe_append(&a, KVC_FORMAT_FP8_E4M3, k_codes, v_codes);
    a.scales = &scales;
    OK(kvc_append(&a));
    describe_attend(&d, KVC_FORMAT_FP8_E4M3, k_codes, v_codes, out);
    d.scales = &scales;
    OK(kvc_attend(&d));
    check_output(out, 0.05f);
    heads[1] = 0.0f;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "head scales", kvc_attend(&d));
    heads[1] = NAN;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "head scales", kvc_append(&a));
    heads[1] = 0.02f;
    k_rows[5] = INFINITY;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "finite", kvc_append(&a));

    // Impossible for the format.
    d.k_dim = d.v_dim = 24;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "16", kvc_attend(&d));
    d.k_dim = d.v_dim = DIM;
    d.format = KVC_FORMAT_KT4V4;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "tiles", kvc_attend(&d));

    // A cache whose heads have scales; set before anything is stored.
    {
        kvc_group_spec group;
        kvc_cache *cache;
        kvc_seq seq;
        uint32_t cached, prompt[1] = {1};
        OK(kvc_group_spec_init(&group, sizeof group));
        group.layers = 1;
        group.kv_heads = HEADS;
        group.k_dim = group.v_dim = DIM;
        group.format = KVC_FORMAT_FP8_E4M3;
        OK(kvc_cache_create(NULL, &group, 1, &cache));
        OK(kvc_cache_set_scales(cache, 0, 0, heads, heads, HEADS));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "layer", kvc_cache_set_scales(cache, 0, 1, heads, heads, HEADS));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "scales", kvc_cache_set_scales(cache, 0, 0, heads, NULL, HEADS));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "scales", kvc_cache_set_scales(cache, 0, 0, heads, heads, 1));
        FAILS(KVC_ERR_NULL_POINTER, "k", kvc_cache_set_scales(cache, 0, 0, NULL, heads, HEADS));
        OK(kvc_seq_start(cache, prompt, 1, 0, &seq, &cached));
        FAILS(KVC_ERR_INVALID_STATE, "sequences",
              kvc_cache_set_scales(cache, 0, 0, heads, heads, HEADS));
        OK(kvc_cache_destroy(cache));
        FAILS(KVC_ERR_STALE_HANDLE, "", kvc_cache_set_scales(cache, 0, 0, heads, heads, HEADS));
    }
    return check_result();
}
