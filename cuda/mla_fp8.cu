// Multi-head latent attention decode over FP8, for up to 16 and up to 32 query columns at a time.
#include "mla_blocks.cuh"
#include "mla_token.cuh"

KVC_MLA_TOKEN(fp8_e4m3, Fp8E4m3Rows, 16, KVC_MLA_BLOCKS)
KVC_MLA_TOKEN(fp8_e4m3, Fp8E4m3Rows, 32, 1)
KVC_MLA_TOKEN(fp8_e5m2, Fp8E5m2Rows, 16, KVC_MLA_BLOCKS)
KVC_MLA_TOKEN(fp8_e5m2, Fp8E5m2Rows, 32, 1)
