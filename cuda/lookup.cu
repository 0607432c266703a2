// The kernels that keep an image of the prefix index on the device and look up in it.
#include "lookup.cuh"

KVC_KERNEL(kvc_lookup, kvc_lookup_params, 64, 8) { kvc::lookup(p); }
KVC_KERNEL(kvc_lookup_patch, kvc_lookup_patch_params, 256, 4) { kvc::lookup_patch(p); }
