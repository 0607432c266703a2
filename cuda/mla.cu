// Multi-head latent attention decode, for up to 16 and up to 32 query columns at a time.
#include "mla.cuh"
#include "mla_blocks.cuh"

KVC_MLA(f16, F16, 16, KVC_MLA_BLOCKS)
KVC_MLA(f16, F16, 32, 1)
KVC_MLA(bf16, Bf16, 16, KVC_MLA_BLOCKS)
KVC_MLA(bf16, Bf16, 32, 1)
