// Paged decode with 128 channels a head.
#include "decode.cuh"

KVC_DECODE(f16, F16, 128, 2)
KVC_DECODE(bf16, Bf16, 128, 2)
