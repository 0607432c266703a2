//! Which instructions the kernels may use: detection, and the override `KVCACHE_CPU`.
//!
//! With `std` the CPU is asked once, at run time; without, the level is what the compiler was told
//! it may assume. Nothing here runs a kernel.

use crate::error::{Error, Result};

/// An instruction set for which kernels exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CpuLevel {
    /// Plain Rust, on any machine.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and DQ (and what `Avx2` needs).
    Avx512,
    /// `Avx512`, the dot products of AVX512_BF16 and AVX512_VNNI, and the byte permutations of
    /// AVX512_VBMI (Zen 4, Sapphire Rapids and newer).
    Avx512Bf16,
    /// AArch64 with Advanced SIMD.
    Neon,
    /// `Neon` and the dot products of bytes (FEAT_DotProd: Armv8.2 and newer), which sealed tiles are
    /// read by.
    NeonDotprod,
}

impl CpuLevel {
    const ALL: [CpuLevel; 6] = [
        CpuLevel::Scalar,
        CpuLevel::Avx2,
        CpuLevel::Avx512,
        CpuLevel::Avx512Bf16,
        CpuLevel::Neon,
        CpuLevel::NeonDotprod,
    ];

    /// The name that `KVCACHE_CPU` takes.
    pub const fn name(self) -> &'static str {
        match self {
            CpuLevel::Scalar => "scalar",
            CpuLevel::Avx2 => "avx2",
            CpuLevel::Avx512 => "avx512",
            CpuLevel::Avx512Bf16 => "avx512bf16",
            CpuLevel::Neon => "neon",
            CpuLevel::NeonDotprod => "neondotprod",
        }
    }

    /// The levels this build can run on this CPU, the lowest first; never empty.
    pub fn available() -> impl Iterator<Item = CpuLevel> {
        Self::ALL.into_iter().filter(|level| level.is_available())
    }

    /// The best level of this CPU.
    pub fn detected() -> CpuLevel {
        Self::available().last().unwrap_or(CpuLevel::Scalar)
    }

    /// The level that calls use: the best one, or the one that the environment variable
    /// `KVCACHE_CPU` names (with `std`; read once).
    ///
    /// # Errors
    /// `InvalidArgument` where the variable has an unknown value, `Unsupported` where it names a
    /// level that this CPU does not have: nobody who asked for a level gets another one in
    /// silence.
    pub fn chosen() -> Result<CpuLevel> {
        #[cfg(feature = "std")]
        {
            static CHOSEN: std::sync::OnceLock<Result<CpuLevel>> = std::sync::OnceLock::new();
            *CHOSEN.get_or_init(|| match std::env::var_os("KVCACHE_CPU") {
                Some(name) => Self::from_override(name.to_str().unwrap_or("?")),
                None => Ok(Self::detected()),
            })
        }
        #[cfg(not(feature = "std"))]
        Ok(Self::detected())
    }

    /// What `KVCACHE_CPU=name` gives; an empty name counts as unset.
    #[cfg_attr(not(feature = "std"), allow(dead_code))]
    fn from_override(name: &str) -> Result<CpuLevel> {
        if name.is_empty() {
            return Ok(Self::detected());
        }
        let level =
            Self::ALL.into_iter().find(|level| level.name() == name).ok_or(Error::invalid(
                "KVCACHE_CPU",
                "must be scalar, avx2, avx512, avx512bf16, neon or neondotprod",
            ))?;
        if level.is_available() {
            Ok(level)
        } else {
            Err(Error::Unsupported { what: "the level that KVCACHE_CPU names" })
        }
    }

    /// Whether this build has the level and this CPU its instructions.
    pub fn is_available(self) -> bool {
        match self {
            CpuLevel::Scalar => true,
            CpuLevel::Avx2 => has::avx2(),
            CpuLevel::Avx512 => !cfg!(fuzzing) && has::avx512(),
            CpuLevel::Avx512Bf16 => !cfg!(fuzzing) && has::avx512_bf16(),
            CpuLevel::Neon => arm::NEON,
            CpuLevel::NeonDotprod => arm::NEON && arm::dotprod(),
        }
    }
}

#[cfg(all(target_arch = "x86_64", feature = "std", not(miri)))]
mod has {
    use std::arch::is_x86_feature_detected as cpu;

    pub fn avx2() -> bool {
        cpu!("avx2") && cpu!("fma") && cpu!("f16c")
    }
    pub fn avx512() -> bool {
        avx2() && cpu!("avx512f") && cpu!("avx512bw") && cpu!("avx512vl") && cpu!("avx512dq")
    }
    pub fn avx512_bf16() -> bool {
        avx512() && cpu!("avx512bf16") && cpu!("avx512vnni") && cpu!("avx512vbmi")
    }
}

#[cfg(not(all(target_arch = "x86_64", feature = "std", not(miri))))]
mod has {
    pub fn avx2() -> bool {
        cfg!(all(target_feature = "avx2", target_feature = "fma", target_feature = "f16c"))
    }
    pub fn avx512() -> bool {
        avx2()
            && cfg!(all(
                target_feature = "avx512f",
                target_feature = "avx512bw",
                target_feature = "avx512vl",
                target_feature = "avx512dq"
            ))
    }
    pub fn avx512_bf16() -> bool {
        avx512()
            && cfg!(all(
                target_feature = "avx512bf16",
                target_feature = "avx512vnni",
                target_feature = "avx512vbmi"
            ))
    }
}

/// The same of AArch64.
mod arm {
    pub const NEON: bool = cfg!(all(target_arch = "aarch64", target_feature = "neon"));

    #[cfg(all(target_arch = "aarch64", feature = "std", not(miri)))]
    pub fn dotprod() -> bool {
        std::arch::is_aarch64_feature_detected!("dotprod")
    }
    #[cfg(not(all(target_arch = "aarch64", feature = "std", not(miri))))]
    pub fn dotprod() -> bool {
        cfg!(target_feature = "dotprod")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_override_is_obeyed_or_refused() {
        assert_eq!(CpuLevel::from_override("scalar"), Ok(CpuLevel::Scalar));
        assert_eq!(CpuLevel::from_override(""), Ok(CpuLevel::detected()));
        assert!(matches!(CpuLevel::from_override("sse9"), Err(Error::InvalidArgument { .. })));
        for level in CpuLevel::ALL {
            match CpuLevel::from_override(level.name()) {
                Ok(got) => assert!(got == level && level.is_available()),
                Err(error) => {
                    assert!(!level.is_available());
                    assert!(matches!(error, Error::Unsupported { .. }));
                }
            }
        }
    }
}
