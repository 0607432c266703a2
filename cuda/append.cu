// The append kernels: types are chosen at run time, as they only move bytes.
#include "append_plain.cuh"

KVC_KERNEL(kvc_append, kvc_append_params, 256, 3) { kvc::append(p); }
KVC_KERNEL(kvc_append_plain, kvc_append_params, 256, 5) { kvc::append_plain(p); }
