// The kernel that merges partial attention results; the types of its rows are chosen at run time.
#include "merge.cuh"

KVC_KERNEL(kvc_merge, kvc_merge_params, 256, 4) { kvc::merge(p); }
