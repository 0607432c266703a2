// Sealed tiles on the program's own memory: seal, attend, and what is refused.
#include <stdlib.h>

#include "check.h"

enum { TOKENS = 32, TILES = 4, LEN = TOKENS * 3 + 5, HEADS = 2, Q_HEADS = 4, DIM = 32 };
enum { HALVES = HEADS * TOKENS * DIM * 2 };

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

// A raw element: block `[K|V][head][token][channel]`.
static float raw(const uint16_t *rows, int value, int head, int token, int channel) {
    int at = ((value * HEADS + head) * TOKENS + token % TOKENS) * DIM + channel;
    return from_bf16(rows[token / TOKENS * HALVES + at]);
}

// The last token's attention in one query head, over raw rows.
static void naive(const uint16_t *rows, const float *q, int q_head, float *out) {
    int head = q_head / (Q_HEADS / HEADS);
    float scores[LEN], top = -INFINITY, sum = 0.0f;
    for (int t = 0; t < LEN; t++) {
        scores[t] = 0.0f;
        for (int c = 0; c < DIM; c++) {
            scores[t] += q[q_head * DIM + c] * raw(rows, 0, head, t, c) / sqrtf((float)DIM);
        }
        top = fmaxf(top, scores[t]);
    }
    for (int c = 0; c < DIM; c++) {
        out[c] = 0.0f;
    }
    for (int t = 0; t < LEN; t++) {
        float p = expf(scores[t] - top);
        sum += p;
        for (int c = 0; c < DIM; c++) {
            out[c] += p * raw(rows, 1, head, t, c);
        }
    }
    for (int c = 0; c < DIM; c++) {
        out[c] /= sum;
    }
}

int main(void) {
    uint16_t *rows = malloc(TILES * HALVES * sizeof *rows);
    if (rows == NULL) {
        return 2;
    }
    for (uint32_t i = 0; i < TILES * HALVES; i++) {
        rows[i] = to_bf16(check_noise(i));
    }

    kvc_seal_desc seal;
    kvc_tile_view view;
    OK(kvc_seal_desc_init(&seal, sizeof seal));
    OK(kvc_tile_view_init(&view, sizeof view));
    seal.kv_heads = HEADS;
    seal.k_dim = seal.v_dim = DIM;
    seal.format = KVC_FORMAT_KT8V8;
    seal.block_tokens = TOKENS;
    seal.num_blocks = TILES;
    seal.tiles = &view;
    uint64_t record = 0;
    OK(kvc_seal_record_size(&seal, &record));
    CHECK(record > 2 * TOKENS * DIM && record % 16 == 0);

    // Sealed into blocks in another order than the rows'.
    char *memory = malloc(TILES * HEADS * record + 16);
    if (memory == NULL) {
        return 2;
    }
    char *records = memory + (16 - (uintptr_t)memory % 16);
    memset(records, 0, TILES * HEADS * record);
    kvc_seal_tile list[3] = {{0, 2}, {1, 0}, {2, 3}};
    uint32_t refused[3] = {0, 0, 0};
    view.records = records;
    view.staging = rows;
    view.staging_blocks = TILES;
    seal.list = list;
    seal.count = 3;
    seal.refused = refused;
    OK(kvc_seal(&seal));
    CHECK(refused[0] == 0 && refused[1] == 0 && refused[2] == 0);

    float q[Q_HEADS * DIM], out[Q_HEADS * DIM], expected[DIM];
    for (uint32_t i = 0; i < Q_HEADS * DIM; i++) {
        q[i] = check_noise(i + 5000);
    }
    int32_t table[TILES] = {2, 0, 3, 1}, q_indptr[2] = {0, 1}, kv_lens[1] = {LEN};
    int32_t raw_indptr[2] = {0, 1};
    kvc_raw_block raw_blocks[1] = {{3, 3}};
    uint32_t bad = 0;
    view.raw_indptr = raw_indptr;
    view.raw_blocks = raw_blocks;
    kvc_attend_desc d;
    OK(kvc_attend_desc_init(&d, sizeof d));
    d.q_heads = Q_HEADS;
    d.kv_heads = HEADS;
    d.k_dim = d.v_dim = DIM;
    d.format = KVC_FORMAT_KT8V8;
    d.q_dtype = d.out_dtype = KVC_DTYPE_F32;
    d.block_tokens = TOKENS;
    d.num_blocks = TILES;
    d.seqs = 1;
    d.table = table;
    d.table_stride = TILES;
    d.q_indptr = q_indptr;
    d.kv_lens = kv_lens;
    d.q = q;
    d.out = out;
    d.bad_block = &bad;
    d.tiles = &view;
    OK(kvc_attend_workspace_size(&d, 1, LEN, &d.workspace_bytes));
    d.workspace = malloc(d.workspace_bytes);
    OK(kvc_attend(&d));
    CHECK(bad == 0);
    for (int h = 0; h < Q_HEADS; h++) {
        naive(rows, q, h, expected);
        for (int c = 0; c < DIM; c++) {
            CHECK(check_close(out[h * DIM + c], expected[c], 5e-3f));
        }
    }

    // A tile that is neither sealed nor raw is masked and reported.
    table[1] = 1;
    OK(kvc_attend(&d));
    CHECK(bad == 1);
    table[1] = 0;

    // Rows that cannot be sealed say so, and are read raw where the second table has them.
    uint16_t kept = rows[HALVES];
    rows[HALVES] = 0x7f80;
    OK(kvc_seal(&seal));
    CHECK(refused[0] == 0 && refused[1] == 1 && refused[2] == 0);
    rows[HALVES] = kept;
    kvc_raw_block both[2] = {{1, 1}, {3, 3}};
    raw_indptr[1] = 2;
    view.raw_blocks = both;
    bad = 0;
    OK(kvc_attend(&d));
    CHECK(bad == 0);
    for (int c = 0; c < DIM; c++) {
        naive(rows, q, 0, expected);
        CHECK(check_close(out[c], expected[c], 5e-3f));
    }

    // Bad input.
    d.tiles = NULL;
    FAILS(KVC_ERR_NULL_POINTER, "", kvc_attend(&d));
    d.tiles = &view;
    d.causal = 0;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "causal", kvc_attend(&d));
    d.causal = 1;
    d.block_tokens = 48;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "block_tokens", kvc_attend(&d));
    d.block_tokens = TOKENS;
    d.k_dim = 24;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "multiples of 16", kvc_attend(&d));
    d.k_dim = DIM;
    view.records = records + 4;
    FAILS(KVC_ERR_MISALIGNED, "records", kvc_attend(&d));
    FAILS(KVC_ERR_MISALIGNED, "records", kvc_seal(&seal));
    view.records = records;
    view.staging = NULL;
    FAILS(KVC_ERR_NULL_POINTER, "", kvc_seal(&seal));
    view.staging = rows;
    list[0].block = TILES;
    FAILS(KVC_ERR_BAD_BLOCK, "", kvc_seal(&seal));
    list[0].block = 2;
    list[0].slot = -1;
    FAILS(KVC_ERR_BAD_BLOCK, "", kvc_seal(&seal));
    list[0].slot = 0;
    seal.refused = NULL;
    FAILS(KVC_ERR_NULL_POINTER, "refused", kvc_seal(&seal));
    seal.format = KVC_FORMAT_BF16;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "format", kvc_seal(&seal));
    view.struct_size = 3;
    seal.format = KVC_FORMAT_KT8V8;
    FAILS(KVC_ERR_STRUCT_SIZE, "kvc_tile_view", kvc_seal(&seal));

    free(d.workspace);
    free(memory);
    free(rows);
    return check_result();
}
