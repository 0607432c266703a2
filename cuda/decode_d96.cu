// Paged decode with 96 channels a head.
#include "decode.cuh"

KVC_DECODE(f16, F16, 96, 2)
KVC_DECODE(bf16, Bf16, 96, 2)
