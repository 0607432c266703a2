//! From a level to its kernels: the only place that names the leaf files. A fuzzer's build
//! (`cfg(fuzzing)`) has no AVX-512: it is after the code around the kernels, and instrumented ones
//! take minutes to build.

use super::kernels::Kernels;
use super::level::CpuLevel;
use super::sealed::SealedKernels;
use crate::dtype::KvFormat;

impl Kernels {
    /// The kernels for `format` at `level`, which must be available.
    pub fn of(level: CpuLevel, format: KvFormat) -> Self {
        match level {
            #[cfg(target_arch = "x86_64")]
            CpuLevel::Avx2 => super::x86_64::avx2::kernels(format),
            #[cfg(all(target_arch = "x86_64", not(fuzzing)))]
            CpuLevel::Avx512 => super::x86_64::avx512::kernels(format),
            #[cfg(all(target_arch = "x86_64", not(fuzzing)))]
            CpuLevel::Avx512Bf16 => super::x86_64::avx512::kernels_bf16(format),
            #[cfg(target_arch = "aarch64")]
            CpuLevel::Neon | CpuLevel::NeonDotprod => super::aarch64::neon::kernels(format),
            _ => super::scalar::kernels(format),
        }
    }
}

impl SealedKernels {
    /// The kernels for sealed tiles at `level`, which must be available.
    pub fn of(level: CpuLevel) -> Self {
        match level {
            #[cfg(target_arch = "x86_64")]
            CpuLevel::Avx2 => super::x86_64::avx2::sealed(),
            #[cfg(all(target_arch = "x86_64", not(fuzzing)))]
            CpuLevel::Avx512 => super::x86_64::avx512::sealed(),
            #[cfg(all(target_arch = "x86_64", not(fuzzing)))]
            CpuLevel::Avx512Bf16 => super::x86_64::avx512::sealed_vnni(),
            #[cfg(target_arch = "aarch64")]
            CpuLevel::Neon => super::aarch64::neon::sealed(),
            #[cfg(target_arch = "aarch64")]
            CpuLevel::NeonDotprod => super::aarch64::neon::sealed_dotprod(),
            _ => super::scalar::sealed(),
        }
    }
}
