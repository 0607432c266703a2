// Paged decode with 80 channels a head.
#include "decode.cuh"

KVC_DECODE(f16, F16, 80, 3)
KVC_DECODE(bf16, Bf16, 80, 3)
