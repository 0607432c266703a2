// Append alone, on the program's own memory: rounding, slots, layouts, rotation.
#include "check.h"

enum { BLOCKS = 3, TOKENS = 16, HEADS = 2, DIM = 8, ROWS = 4 };

static float k[BLOCKS * TOKENS * HEADS * DIM];
static float v[BLOCKS * TOKENS * HEADS * DIM];
static uint16_t k16[BLOCKS * TOKENS * HEADS * DIM];
static uint16_t v16[BLOCKS * TOKENS * HEADS * DIM];

static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    // Round to nearest, ties to even.
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

int main(void) {
    float k_rows[ROWS * HEADS * DIM];
    float v_rows[ROWS * HEADS * DIM];
    int64_t slots[ROWS] = {35, -1, 0, 17};
    uint32_t positions[ROWS] = {0, 1, 1000, 131071};
    kvc_append_desc d;
    kvc_rope rope;

    for (uint32_t i = 0; i < ROWS * HEADS * DIM; i++) {
        k_rows[i] = check_noise(i);
        v_rows[i] = check_noise(i + 500);
    }
    OK(kvc_append_desc_init(&d, sizeof d));
    d.kv_heads = HEADS;
    d.k_dim = d.v_dim = DIM;
    d.format = KVC_FORMAT_F32;
    d.dtype = KVC_DTYPE_F32;
    d.block_tokens = TOKENS;
    d.num_blocks = BLOCKS;
    d.rows = ROWS;
    d.k = k;
    d.v = v;
    d.slots = slots;
    d.k_rows = k_rows;
    d.v_rows = v_rows;
    OK(kvc_append(&d));
    for (uint32_t i = 0; i < BLOCKS * TOKENS; i++) {
        for (uint32_t h = 0; h < HEADS; h++) {
            for (uint32_t c = 0; c < DIM; c++) {
                // [block][head][token][dim].
                uint32_t at = (((i / TOKENS) * HEADS + h) * TOKENS + i % TOKENS) * DIM + c;
                float expected_k = 0.0f;
                float expected_v = 0.0f;
                for (uint32_t row = 0; row < ROWS; row++) {
                    if (slots[row] == (int64_t)i) {
                        expected_k = k_rows[(row * HEADS + h) * DIM + c];
                        expected_v = v_rows[(row * HEADS + h) * DIM + c];
                    }
                }
                CHECK(k[at] == expected_k && v[at] == expected_v);
            }
        }
    }

    // To bf16, in NHD, from rows with strides.
    d.format = KVC_FORMAT_BF16;
    d.k = k16;
    d.v = v16;
    d.k_block_stride = d.v_block_stride = TOKENS * HEADS * DIM;
    d.k_head_stride = d.v_head_stride = DIM;
    d.k_token_stride = d.v_token_stride = HEADS * DIM;
    // Heads the other way round.
    d.k_rows = k_rows + DIM;
    d.k_rows_token_stride = HEADS * DIM;
    d.k_rows_head_stride = -DIM;
    OK(kvc_append(&d));
    for (uint32_t c = 0; c < DIM; c++) {
        CHECK(k16[(35 * HEADS + 0) * DIM + c] == to_bf16(k_rows[1 * DIM + c]));
        CHECK(k16[(17 * HEADS + 1) * DIM + c] == to_bf16(k_rows[3 * HEADS * DIM + c]));
        CHECK(v16[(17 * HEADS + 1) * DIM + c] == to_bf16(v_rows[(3 * HEADS + 1) * DIM + c]));
    }

    // Rotation, against its definition in double.
    OK(kvc_rope_init(&rope, sizeof rope));
    CHECK(rope.style == KVC_ROPE_HALVES && rope.theta == 10000.0f && rope.scale == 1.0f);
    rope.rotary_dim = DIM;
    OK(kvc_append_desc_init(&d, sizeof d));
    d.kv_heads = HEADS;
    d.k_dim = d.v_dim = DIM;
    d.format = KVC_FORMAT_F32;
    d.dtype = KVC_DTYPE_F32;
    d.block_tokens = TOKENS;
    d.num_blocks = BLOCKS;
    d.rows = ROWS;
    d.k = k;
    d.v = v;
    d.slots = slots;
    d.k_rows = k_rows;
    d.v_rows = v_rows;
    d.rope = &rope;
    d.positions = positions;
    for (uint32_t style = KVC_ROPE_HALVES; style <= KVC_ROPE_INTERLEAVED; style++) {
        rope.style = style;
        OK(kvc_append(&d));
        for (uint32_t i = 0; i < DIM / 2; i++) {
            uint32_t left = style == KVC_ROPE_HALVES ? i : 2 * i;
            uint32_t right = style == KVC_ROPE_HALVES ? i + DIM / 2 : 2 * i + 1;
            double angle = 131071.0 * pow(10000.0, -2.0 * i / DIM);
            const float *row = k_rows + (3 * HEADS + 1) * DIM;
            // Slot 17: block 1, token 1.
            const float *got = k + ((1 * HEADS + 1) * TOKENS + 1) * DIM;
            CHECK(check_close(got[left],
                              (float)((double)row[left] * cos(angle) - (double)row[right] * sin(angle)),
                              1e-5f));
            CHECK(check_close(got[right],
                              (float)((double)row[right] * cos(angle) + (double)row[left] * sin(angle)),
                              1e-5f));
        }
    }
    {
        // Given frequencies are the same as computed ones.
        float frequencies[DIM / 2];
        float rows[HEADS * DIM];
        float same[HEADS * DIM];
        uint32_t position = 3;
        for (int i = 0; i < DIM / 2; i++) {
            frequencies[i] = powf(10000.0f, -2.0f * (float)i / DIM);
        }
        memcpy(rows, k_rows, sizeof rows);
        memcpy(same, k_rows, sizeof same);
        OK(kvc_rope_rotate(&rope, rows, HEADS, DIM, &position, 1));
        rope.frequencies = frequencies;
        OK(kvc_rope_rotate(&rope, same, HEADS, DIM, &position, 1));
        for (int i = 0; i < HEADS * DIM; i++) {
            CHECK(check_close(same[i], rows[i], 1e-6f));
        }
        rope.frequencies = NULL;
    }

    // Refused before anything is written.
    memset(k, 0x5A, sizeof k);
    slots[3] = BLOCKS * TOKENS;
    FAILS(KVC_ERR_BAD_BLOCK, "block 3", kvc_append(&d));
    slots[3] = -2;
    FAILS(KVC_ERR_BAD_BLOCK, "block", kvc_append(&d));
    slots[3] = 17;
    rope.style = 0;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "style", kvc_append(&d));
    rope.style = KVC_ROPE_HALVES;
    rope.theta = 0.5f;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "theta", kvc_append(&d));
    rope.theta = 10000.0f;
    d.positions = NULL;
    FAILS(KVC_ERR_NULL_POINTER, "positions", kvc_append(&d));
    d.positions = positions;
    d.slots = NULL;
    FAILS(KVC_ERR_NULL_POINTER, "slots", kvc_append(&d));
    d.slots = slots;
    d.v_rows = NULL;
    FAILS(KVC_ERR_NULL_POINTER, "v", kvc_append(&d));
    d.v_rows = v_rows;
    d.k = (char *)k + 1;
    FAILS(KVC_ERR_MISALIGNED, "k", kvc_append(&d));
    d.k = k;
    d.dtype = 7;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "dtype", kvc_append(&d));
    d.dtype = KVC_DTYPE_F32;
    d.k_block_stride = INT64_MIN;
    FAILS(KVC_ERR_OVERFLOW, "stride", kvc_append(&d));
    d.k_block_stride = 0;
    d.struct_size -= 8;
    FAILS(KVC_ERR_STRUCT_SIZE, "kvc_append_desc", kvc_append(&d));
    FAILS(KVC_ERR_NULL_POINTER, "kvc_append_desc", kvc_append(NULL));
    {
        unsigned char first = 0;
        memcpy(&first, k, 1);
        CHECK(first == 0x5A);
    }
    return check_result();
}
