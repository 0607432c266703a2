// The kernel that splits a batch for cascade attention.
#include "cascade.cuh"

KVC_KERNEL(kvc_cascade_split, kvc_cascade_split_params, 512, 1) { kvc::cascade_split(p); }
