// Paged decode with 192 channels a head.
#include "decode.cuh"

KVC_DECODE(f16, F16, 192, 2)
KVC_DECODE(bf16, Bf16, 192, 2)
