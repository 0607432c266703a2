// The kernel that plans paged decode; it is the same for every cache type and head dimension.
#include "decode_plan.cuh"

KVC_KERNEL(kvc_decode_plan, kvc_decode_plan_params, 256, 1) { kvc::decode_plan(p); }
