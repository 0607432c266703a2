// Paged decode with 256 channels a head.
#include "decode.cuh"

KVC_DECODE(f16, F16, 256, 1)
KVC_DECODE(bf16, Bf16, 256, 1)
