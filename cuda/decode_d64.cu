// Paged decode with 64 channels a head.
#include "decode.cuh"

KVC_DECODE(f16, F16, 64, 3)
KVC_DECODE(bf16, Bf16, 64, 3)
