// Attention alone, on the program's own memory: every layout and option against a naive loop.
#include <stdlib.h>

#include "check.h"

enum { BLOCKS = 24, BLOCK_TOKENS = 16, SEQS = 3, Q_TOKENS = 8, TABLE = 8, MAX_HEADS = 4, DIM = 32 };

// Sequence 0 decodes, sequence 1 is a chunk of a prefill, sequence 2 is a whole prompt.
static const int32_t q_indptr[SEQS + 1] = {0, 1, 4, 8};
static const int32_t kv_lens[SEQS] = {100, 37, 4};

// One case: what the call reads, in floats, beside what it is given.
struct tensors {
    float k[BLOCKS * BLOCK_TOKENS * 2 * DIM];
    float v[BLOCKS * BLOCK_TOKENS * 2 * DIM];
    float q[Q_TOKENS * MAX_HEADS * DIM];
    float out[Q_TOKENS * MAX_HEADS * DIM];
    float lse[Q_TOKENS * MAX_HEADS];
    uint16_t k16[BLOCKS * BLOCK_TOKENS * 2 * DIM];
    uint16_t v16[BLOCKS * BLOCK_TOKENS * 2 * DIM];
    int32_t table[SEQS * TABLE];
    int32_t indptr[SEQS + 1];
    int32_t indices[SEQS * TABLE];
    float sinks[MAX_HEADS];
    float slopes[MAX_HEADS];
};

// bfloat16 by truncation: the bits that are kept are the value that both sides see.
static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static struct tensors *make_tensors(void) {
    struct tensors *t = malloc(sizeof *t);
    if (t == NULL) {
        exit(2);
    }
    for (uint32_t i = 0; i < BLOCKS * BLOCK_TOKENS * 2 * DIM; i++) {
        t->k16[i] = to_bf16(check_noise(i));
        t->v16[i] = to_bf16(check_noise(i + 1000000));
        t->k[i] = from_bf16(t->k16[i]);
        t->v[i] = from_bf16(t->v16[i]);
    }
    for (uint32_t i = 0; i < Q_TOKENS * MAX_HEADS * DIM; i++) {
        t->q[i] = 2.0f * check_noise(i + 2000000);
    }
    for (uint32_t h = 0; h < MAX_HEADS; h++) {
        t->sinks[h] = (float)h - 1.0f;
        t->slopes[h] = 0.25f / (float)(h + 1);
    }
    // Blocks in a scrambled order; what lies past a length is poison that must not be read.
    int32_t next = 0;
    t->indptr[0] = 0;
    for (int s = 0; s < SEQS; s++) {
        int blocks = (kv_lens[s] + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        for (int i = 0; i < TABLE; i++) {
            t->table[s * TABLE + i] = i < blocks ? (7 * next++ + 3) % BLOCKS : INT32_MIN;
        }
        memcpy(t->indices + t->indptr[s], t->table + s * TABLE, (size_t)blocks * sizeof(int32_t));
        t->indptr[s + 1] = t->indptr[s] + blocks;
    }
    return t;
}

static void fresh_outputs(struct tensors *t) {
    for (int i = 0; i < Q_TOKENS * MAX_HEADS * DIM; i++) {
        t->out[i] = NAN;
    }
    for (int i = 0; i < Q_TOKENS * MAX_HEADS; i++) {
        t->lse[i] = NAN;
    }
}

// The definition, in double, for the options and strides of `d`.
static void check_against_naive(const char *name, const kvc_attend_desc *d,
                                const struct tensors *t) {
    float worst = 0.0f;
    int group = (int)(d->q_heads / d->kv_heads);
    int64_t dim = (int64_t)d->k_dim;
    double scale = d->scale != 0.0f ? (double)d->scale : 1.0 / sqrt((double)d->k_dim);
    for (int s = 0; s < SEQS; s++) {
        for (int i = q_indptr[s]; i < q_indptr[s + 1]; i++) {
            int position = kv_lens[s] - q_indptr[s + 1] + i;
            for (int h = 0; h < (int)d->q_heads; h++) {
                double scores[256];
                double o[DIM] = {0};
                double top = -INFINITY;
                double sum = 0.0;
                const float *q = t->q + (i * (int64_t)d->q_heads + h) * dim;
                for (int j = 0; j < kv_lens[s]; j++) {
                    int64_t block = t->table[s * TABLE + j / BLOCK_TOKENS];
                    int64_t at = block * d->k_block_stride + (h / group) * d->k_head_stride +
                                 (j % BLOCK_TOKENS) * d->k_token_stride;
                    int visible = (!d->causal || j <= position) &&
                                  (d->window == 0 || position - j < (int)d->window);
                    double score = 0.0;
                    for (int64_t c = 0; c < dim; c++) {
                        score += (double)q[c] * (double)t->k[at + c];
                    }
                    score *= scale;
                    if (d->softcap != 0.0f) {
                        score = (double)d->softcap * tanh(score / (double)d->softcap);
                    }
                    if (d->alibi != NULL) {
                        score += (double)t->slopes[h] * (j - position);
                    }
                    scores[j] = visible ? score : -INFINITY;
                    top = fmax(top, scores[j]);
                }
                for (int j = 0; j < kv_lens[s]; j++) {
                    int64_t block = t->table[s * TABLE + j / BLOCK_TOKENS];
                    int64_t token = j % BLOCK_TOKENS;
                    const float *v = d->v_in_k ? t->k + block * d->k_block_stride +
                                                     token * d->k_token_stride
                                               : t->v + block * d->v_block_stride +
                                                     (h / group) * d->v_head_stride +
                                                     token * d->v_token_stride;
                    double p = exp(scores[j] - top);
                    sum += p;
                    for (int c = 0; c < (int)d->v_dim; c++) {
                        o[c] += p * (double)v[c];
                    }
                }
                if (d->sinks != NULL) {
                    sum += exp((double)t->sinks[h] - top);
                }
                int row = i * (int)d->q_heads + h;
                if (!check_close(t->lse[row], (float)(top + log(sum)), 1e-3f)) {
                    check_fail(__FILE__, __LINE__, name, "lse");
                }
                for (int c = 0; c < (int)d->v_dim; c++) {
                    float error = fabsf(t->out[row * (int)d->v_dim + c] - (float)(o[c] / sum));
                    worst = error <= worst ? worst : error;
                }
            }
        }
    }
    if (!(worst <= 2e-3f)) {
        char more[64];
        snprintf(more, sizeof more, "is off by %g", (double)worst);
        check_fail(__FILE__, __LINE__, name, more);
    }
}

static void run_case(const char *name, kvc_attend_desc d, struct tensors *t) {
    uint64_t bytes = 0;
    uint32_t bad_block = 0;
    fresh_outputs(t);
    OK(kvc_attend_workspace_size(&d, Q_TOKENS, 128, &bytes));
    char *workspace = malloc(bytes + 1);
    if (workspace == NULL) {
        exit(2);
    }
    memset(workspace, 0xFF, bytes + 1);
    // Any alignment will do.
    d.workspace = workspace + 1;
    d.workspace_bytes = bytes;
    d.bad_block = &bad_block;
    OK(kvc_attend(&d));
    CHECK(bad_block == 0);
    check_against_naive(name, &d, t);
    free(workspace);
}

int main(void) {
    struct tensors *t = make_tensors();
    kvc_attend_desc base;
    char name[64];
    uint64_t bytes = 77;

    OK(kvc_attend_desc_init(&base, sizeof base));
    CHECK(base.struct_size == sizeof base && base.causal == 1 && base.threads == 1);
    base.q_heads = 4;
    base.kv_heads = 2;
    base.k_dim = base.v_dim = DIM;
    base.format = KVC_FORMAT_F32;
    base.q_dtype = base.out_dtype = KVC_DTYPE_F32;
    base.block_tokens = BLOCK_TOKENS;
    base.num_blocks = BLOCKS;
    base.seqs = SEQS;
    base.k = t->k;
    base.v = t->v;
    // HND: [block][head][token][dim].
    base.k_block_stride = base.v_block_stride = 2 * BLOCK_TOKENS * DIM;
    base.k_head_stride = base.v_head_stride = BLOCK_TOKENS * DIM;
    base.k_token_stride = base.v_token_stride = DIM;
    base.table = t->table;
    base.table_stride = TABLE;
    base.q_indptr = q_indptr;
    base.kv_lens = kv_lens;
    base.q = t->q;
    base.out = t->out;
    base.lse = t->lse;

    run_case("HND", base, t);
    {
        // Strides of 0 mean the same layout.
        kvc_attend_desc d = base;
        uint64_t size = 0;
        d.k_block_stride = d.k_head_stride = d.k_token_stride = 0;
        d.v_block_stride = d.v_head_stride = d.v_token_stride = 0;
        OK(kvc_attend_workspace_size(&d, Q_TOKENS, 128, &size));
        d.workspace = malloc(size);
        d.workspace_bytes = size;
        fresh_outputs(t);
        OK(kvc_attend(&d));
        check_against_naive("strides of 0", &base, t);
        // Too little is refused with the size that is needed, before anything is written.
        fresh_outputs(t);
        d.workspace_bytes = 8;
        FAILS(KVC_ERR_BUFFER_TOO_SMALL, "needed", kvc_attend(&d));
        CHECK(isnan(t->out[0]) && isnan(t->lse[0]));
        free(d.workspace);
    }
    {
        // NHD: [block][token][head][dim].
        kvc_attend_desc d = base;
        d.k_head_stride = d.v_head_stride = DIM;
        d.k_token_stride = d.v_token_stride = 2 * DIM;
        run_case("NHD", d, t);
    }
    {
        kvc_attend_desc d = base;
        d.table = t->indices;
        d.table_indptr = t->indptr;
        run_case("CSR", d, t);
    }
    {
        kvc_attend_desc d = base;
        d.format = KVC_FORMAT_BF16;
        d.k = t->k16;
        d.v = t->v16;
        run_case("bf16", d, t);
    }
    {
        kvc_attend_desc d = base;
        d.window = 20;
        d.scale = 0.3f;
        run_case("window", d, t);
        d.softcap = 2.0f;
        run_case("softcap", d, t);
        d.sinks = t->sinks;
        run_case("sinks", d, t);
        d.alibi = t->slopes;
        run_case("alibi", d, t);
        d.causal = 0;
        d.window = 0;
        run_case("not causal", d, t);
    }
    {
        // Latent attention: one head, values in keys.
        kvc_attend_desc d = base;
        d.kv_heads = 1;
        d.v_in_k = 1;
        d.v_dim = 24;
        d.v = NULL;
        run_case("latent", d, t);
    }
    {
        kvc_attend_desc d = base;
        d.threads = 0;
        run_case("threads", d, t);
    }
    {
        // A table entry that is no block is masked and reported.
        kvc_attend_desc d = base;
        uint32_t bad_block = 0;
        int32_t kept = t->table[0];
        uint64_t size = 0;
        OK(kvc_attend_workspace_size(&d, Q_TOKENS, 128, &size));
        d.workspace = malloc(size);
        d.workspace_bytes = size;
        d.bad_block = &bad_block;
        t->table[0] = BLOCKS;
        OK(kvc_attend(&d));
        CHECK(bad_block == 1);
        t->table[0] = kept;
        free(d.workspace);
    }
    {
        // Two halves of the keys, without causality, merge to the whole.
        float out[2][Q_TOKENS * MAX_HEADS * DIM];
        float lse[2][Q_TOKENS * MAX_HEADS];
        int32_t halves[2][SEQS] = {{48, 16, 0}, {52, 21, 4}};
        int32_t second[SEQS * TABLE];
        uint64_t size = 0;
        kvc_attend_desc d = base;
        d.causal = 0;
        OK(kvc_attend_workspace_size(&d, Q_TOKENS, 128, &size));
        d.workspace = malloc(size);
        d.workspace_bytes = size;
        memset(second, 0, sizeof second);
        for (int s = 0; s < SEQS; s++) {
            int skipped = halves[0][s] / BLOCK_TOKENS;
            memcpy(second + s * TABLE, t->table + s * TABLE + skipped,
                   (size_t)(TABLE - skipped) * sizeof(int32_t));
        }
        for (int half = 0; half < 2; half++) {
            d.kv_lens = halves[half];
            d.table = half == 0 ? t->table : second;
            d.out = out[half];
            d.lse = lse[half];
            OK(kvc_attend(&d));
        }
        CHECK(lse[0][7 * 4] == -INFINITY && out[0][7 * 4 * DIM] == 0.0f);
        OK(kvc_merge_states(out[0], lse[0], out[1], lse[1], Q_TOKENS * 4, DIM));
        memcpy(t->out, out[0], sizeof t->out);
        memcpy(t->lse, lse[0], sizeof t->lse);
        free(d.workspace);
        d = base;
        d.causal = 0;
        check_against_naive("merged halves", &d, t);
        FAILS(KVC_ERR_INVALID_ARGUMENT, "overlap",
              kvc_merge_states(out[0], lse[0], out[0] + 4, lse[1], Q_TOKENS * 4, DIM));
        FAILS(KVC_ERR_OVERFLOW, "rows", kvc_merge_states(out[0], lse[0], out[1], lse[1], UINT64_MAX, 8));
    }

    // The kernel has a name before it runs.
    OK(kvc_attend_kernel(&base, 1, name, sizeof name));
    CHECK(strncmp(name, "attend_decode_cpu_", 18) == 0);
    OK(kvc_attend_kernel(&base, 1000, name, sizeof name));
    CHECK(strncmp(name, "attend_tile_cpu_", 16) == 0 && strstr(name, "_f32") != NULL);
    FAILS(KVC_ERR_BUFFER_TOO_SMALL, "buf", kvc_attend_kernel(&base, 1, name, 4));

    // Misuse.
    {
        kvc_attend_desc d = base;
        fresh_outputs(t);
        FAILS(KVC_ERR_NULL_POINTER, "kvc_attend_desc", kvc_attend(NULL));
        d.struct_size = 8;
        FAILS(KVC_ERR_STRUCT_SIZE, "kvc_attend_desc", kvc_attend(&d));
        d = base;
        d.q_heads = 3;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "q_heads", kvc_attend(&d));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "q_heads", kvc_attend_workspace_size(&d, 1, 1, &bytes));
        CHECK(bytes == 77);
        d = base;
        d.k_dim = 20;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "k_dim", kvc_attend(&d));
        d = base;
        d.format = 99;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "format", kvc_attend(&d));
        d = base;
        d.q_dtype = 0;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "dtype", kvc_attend(&d));
        d = base;
        d.causal = 2;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "causal", kvc_attend(&d));
        d = base;
        d.reserved = 1;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "reserved", kvc_attend(&d));
        d = base;
        d.scale = NAN;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "scale", kvc_attend(&d));
        d = base;
        d.threads = 7;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "threads", kvc_attend(&d));
        d = base;
        d.k = NULL;
        FAILS(KVC_ERR_NULL_POINTER, "k", kvc_attend(&d));
        d = base;
        d.v = (const char *)t->v + 1;
        FAILS(KVC_ERR_MISALIGNED, "v is not aligned to 4", kvc_attend(&d));
        d = base;
        d.out = (char *)t->out + 2;
        FAILS(KVC_ERR_MISALIGNED, "out", kvc_attend(&d));
        d = base;
        d.q = NULL;
        FAILS(KVC_ERR_NULL_POINTER, "q", kvc_attend(&d));
        d = base;
        d.kv_lens = NULL;
        FAILS(KVC_ERR_NULL_POINTER, "kv_lens", kvc_attend(&d));
        // Sequence 0 has 100 tokens, 7 blocks: an eighth entry would be another sequence's.
        d = base;
        d.table_stride = 6;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "table_stride", kvc_attend(&d));
        d = base;
        d.k_block_stride = INT64_MAX;
        FAILS(KVC_ERR_OVERFLOW, "stride", kvc_attend(&d));
        CHECK(isnan(t->out[0]) && isnan(t->lse[0]));
    }
    free(t);
    return check_result();
}
