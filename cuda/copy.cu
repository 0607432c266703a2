// The kernels that copy and zero blocks; they move bytes, so one instance serves every format.
#include "copy.cuh"

KVC_KERNEL(kvc_copy, kvc_copy_params, 256, 4) { kvc::copy_blocks<false>(p); }
KVC_KERNEL(kvc_zero, kvc_copy_params, 256, 4) { kvc::copy_blocks<true>(p); }
