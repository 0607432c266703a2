//! Latent attention decode over rows of codes: which kernel, how much shared memory, and what a call says
//! of scales. Work is cut as for any latent attention (mla.rs).

use super::decode_token::{Scales, check_scales};
use super::mla::{MLA_DIM, MlaPlan, TOKENS, shared_bytes};
use super::params::MlaTokenParams;
use super::{Kernel, Launch};
use crate::dtype::{DType, FormatClass, KvFormat};
use crate::error::{Error, Result};

kernels! {
    E4M3_C16 = "kvc_mla_fp8_e4m3_c16", "kvc_mla_token_params", 256;
    E4M3_C32 = "kvc_mla_fp8_e4m3_c32", "kvc_mla_token_params", 256;
    E5M2_C16 = "kvc_mla_fp8_e5m2_c16", "kvc_mla_token_params", 256;
    E5M2_C32 = "kvc_mla_fp8_e5m2_c32", "kvc_mla_token_params", 256;
    INT8_C16 = "kvc_mla_int8_t_c16", "kvc_mla_token_params", 256;
    INT8_C32 = "kvc_mla_int8_t_c32", "kvc_mla_token_params", 256;
    INT4_C16 = "kvc_mla_int4_t_c16", "kvc_mla_token_params", 256;
    INT4_C32 = "kvc_mla_int4_t_c32", "kvc_mla_token_params", 256;
}

/// The kernel for a format and as many columns at a time; `None` where there is none.
pub(super) fn token_kernel(format: KvFormat, columns: u32) -> Option<&'static Kernel> {
    match (format, columns) {
        (KvFormat::Fp8E4m3, 16) => Some(&E4M3_C16),
        (KvFormat::Fp8E4m3, 32) => Some(&E4M3_C32),
        (KvFormat::Fp8E5m2, 16) => Some(&E5M2_C16),
        (KvFormat::Fp8E5m2, 32) => Some(&E5M2_C32),
        (KvFormat::Int8T, 16) => Some(&INT8_C16),
        (KvFormat::Int8T, 32) => Some(&INT8_C32),
        (KvFormat::Int4T, 16) => Some(&INT4_C16),
        (KvFormat::Int4T, 32) => Some(&INT4_C32),
        _ => None,
    }
}

/// Parts of a latent with scales of their own: its 512 channels, and its rotary ones.
const PARTS: u32 = 2;

/// Bytes of a block table's description.
const TABLE: u32 = 40;

/// Shared memory of a kernel, as cuda/mla_token.cuh lays it out.
pub(super) fn token_shared_bytes(format: KvFormat, columns: u32) -> u32 {
    let row = format.row_bytes(MLA_DIM) as u32;
    let stages = if row == MLA_DIM { 4 } else { 7 };
    let scales = match format.row_scale_bytes(MLA_DIM, PARTS) as u32 {
        0 => 4,
        bytes => stages * TOKENS * bytes,
    };
    // Factors of the scores, sums of the queries and the tokens seen of a column; the rows' scales; what
    // is worked on, and its block table.
    let own = shared_bytes(columns, row, stages) + 5 * columns * 4 + scales + 20;
    (own.next_multiple_of(8) + TABLE).next_multiple_of(16)
}

impl MlaPlan {
    /// [`decode_launch`](Self::decode_launch) for rows of codes.
    ///
    /// # Errors
    /// As there, and for scales that are misaligned or not given.
    pub fn decode_token_launch(
        &self,
        workspace: u64,
        params: &mut MlaTokenParams,
    ) -> Result<Launch> {
        let format = self.format();
        if format.class() != FormatClass::Token {
            return Err(Error::InvalidState { why: "the plan is not for rows of codes" });
        }
        let p = &*params;
        let strides = [p.k_scale_block, 0, p.k_scale_token];
        check_scales(
            format,
            &Scales {
                addresses: [p.k_scales.0; 2],
                strides: [strides; 2],
                heads: [p.k_heads.0, 0],
            },
        )?;
        let chunk = i64::from(16 / DType::from_id(p.call.q_dtype)?.bytes());
        let strides = [p.call.q_row, p.call.q_head];
        if !p.call.q.0.is_multiple_of(16) || strides.iter().any(|stride| stride % chunk != 0) {
            return Err(Error::invalid("q", "rows must begin at multiples of 16 bytes"));
        }
        self.fill(workspace, &mut params.call, 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::params::{In, MlaParams};
    use crate::kernels::{MlaBounds, Pieces};

    fn plan(format: KvFormat, q_heads: u32) -> MlaPlan {
        MlaPlan::new(MlaBounds {
            format,
            q_heads,
            q_len: 1,
            batch: 4,
            max_tokens: 1 << 17,
            pieces: Pieces::Balanced,
            multiprocessors: 132,
        })
        .unwrap()
    }

    fn params() -> MlaTokenParams {
        let dtype = DType::Bf16.id();
        let call = MlaParams {
            block_tokens: 64,
            q_dtype: dtype,
            out_dtype: dtype,
            scale: 0.1,
            ..MlaParams::default()
        };
        MlaTokenParams { call, k_scales: In::at(512), ..MlaTokenParams::default() }
    }

    #[test]
    fn every_instance_fits_a_multiprocessor() {
        for kernel in KERNELS {
            let (name, columns) = kernel.name.rsplit_once("_c").unwrap();
            let format = KvFormat::from_name(name.strip_prefix("kvc_mla_").unwrap()).unwrap();
            let columns: u32 = columns.parse().unwrap();
            assert_eq!(token_kernel(format, columns), Some(*kernel));
            let plan = plan(format, columns);
            let launch = plan.decode_token_launch(256, &mut params()).unwrap();
            assert_eq!((plan.kernel(), launch.kernel), (*kernel, *kernel));
            // Two narrow blocks fit the 164 KB of sm_80, a wide one the 99 KB of sm_86.
            let shared = launch.shared_bytes;
            assert!(if columns == 16 {
                2 * (shared + 1024) <= 164 << 10
            } else {
                shared <= 99 << 10
            });
            // What cuda/mla_token.cuh lays over the tiles: sums of all columns.
            assert!(shared > columns * 516 * 4);
        }
    }

    #[test]
    fn impossible_calls_are_refused() {
        let call = |change: fn(&mut MlaTokenParams), format| {
            let mut params = params();
            change(&mut params);
            plan(format, 16).decode_token_launch(256, &mut params)
        };
        let changes: [fn(&mut MlaTokenParams); 7] = [
            |p| p.call.k_block = 8,
            |p| p.call.k_token = 577,
            |p| p.call.q_head = 580,
            |p| p.call.q = In::at(8),
            |p| p.k_heads = In::at(2),
            |p| p.call.scale = f32::INFINITY,
            |p| p.call.block_tokens = 0,
        ];
        for change in changes {
            for format in [KvFormat::Fp8E4m3, KvFormat::Int8T] {
                assert!(call(change, format).is_err());
            }
        }
        let of_scales: [fn(&mut MlaTokenParams); 3] =
            [|p| p.k_scales = In::NULL, |p| p.k_scales = In::at(513), |p| p.k_scale_token = 3];
        for change in of_scales {
            assert!(call(change, KvFormat::Fp8E5m2).is_ok());
            assert!(
                call(change, KvFormat::Int8T).is_err() && call(change, KvFormat::Int4T).is_err()
            );
        }
        // Plans of floats and of codes are apart.
        assert!(plan(KvFormat::Int8T, 16).decode_launch(256, &mut params().call).is_err());
        assert!(plan(KvFormat::Bf16, 16).decode_token_launch(256, &mut params()).is_err());
    }
}
