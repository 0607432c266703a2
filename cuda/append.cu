// The append kernel: one instance, types chosen at run time, as it only moves bytes.
#include "append.cuh"

KVC_KERNEL(kvc_append, kvc_append_params, 256, 3) { kvc::append(p); }
