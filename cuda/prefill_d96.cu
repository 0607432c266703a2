// Chunked prefill with 96 channels a head.
#include "prefill.cuh"

KVC_PREFILL(f16, F16, 96)
KVC_PREFILL(bf16, Bf16, 96)
