// Chunked prefill with 256 channels a head.
#include "prefill.cuh"

KVC_PREFILL(f16, F16, 256)
KVC_PREFILL(bf16, Bf16, 256)
