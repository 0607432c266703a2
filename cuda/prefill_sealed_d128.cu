// Chunked prefill over sealed tiles with 128 channels a head.
#include "prefill_sealed.cuh"

KVC_PREFILL_SEALED(128)
