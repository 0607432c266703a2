// Append to rows of codes of latents.
#include "append_latent.cuh"

KVC_KERNEL(kvc_append_latent, kvc_append_token_params, 256, 2) { kvc::append_latent(p); }
