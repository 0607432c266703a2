// Multi-head latent attention decode over INT8_T and INT4_T, for up to 16 and up to 32 query columns at
// a time.
#include "mla_blocks.cuh"
#include "mla_token.cuh"

KVC_MLA_TOKEN(int8_t, Int8Rows, 16, KVC_MLA_BLOCKS)
KVC_MLA_TOKEN(int8_t, Int8Rows, 32, 1)
KVC_MLA_TOKEN(int4_t, Int4Rows, 16, KVC_MLA_BLOCKS)
KVC_MLA_TOKEN(int4_t, Int4Rows, 32, 1)
