//! How chunked prefill is launched.
//!
//! The host knows only maxima. Sequence `i` has the tiles from `q_indptr[i] * group / R + i` on,
//! rounded down, where a tile has R rows and each token has one row for every query head of a
//! group: always enough of them, and from the row offsets alone a thread block finds its own. So
//! there is no workspace and nothing to plan, nothing is read back, and a captured graph can be
//! replayed with other lengths. A tile is computed by one block from its first key to its last, so
//! the result is the same bits in any batch.

use super::params::PrefillParams;
use super::prefill_sealed::{sealed_bytes, sealed_kernel};
use super::prefill_token::token_kernel;
use super::{Kernel, Launch};
use crate::dtype::{DType, FormatClass, KvFormat};
use crate::error::{Error, Result};

kernels! {
    F16_D64 = "kvc_prefill_f16_d64", "kvc_prefill_params", THREADS;
    F16_D80 = "kvc_prefill_f16_d80", "kvc_prefill_params", THREADS;
    F16_D96 = "kvc_prefill_f16_d96", "kvc_prefill_params", THREADS;
    F16_D128 = "kvc_prefill_f16_d128", "kvc_prefill_params", THREADS;
    F16_D192 = "kvc_prefill_f16_d192", "kvc_prefill_params", THREADS;
    F16_D256 = "kvc_prefill_f16_d256", "kvc_prefill_params", THREADS;
    BF16_D64 = "kvc_prefill_bf16_d64", "kvc_prefill_params", THREADS;
    BF16_D80 = "kvc_prefill_bf16_d80", "kvc_prefill_params", THREADS;
    BF16_D96 = "kvc_prefill_bf16_d96", "kvc_prefill_params", THREADS;
    BF16_D128 = "kvc_prefill_bf16_d128", "kvc_prefill_params", THREADS;
    BF16_D192 = "kvc_prefill_bf16_d192", "kvc_prefill_params", THREADS;
    BF16_D256 = "kvc_prefill_bf16_d256", "kvc_prefill_params", THREADS;
}

/// Threads of a block.
const THREADS: u32 = 128;
/// Keys of a tile.
const KEYS: u32 = 64;

/// The prefill kernel for a cache of this format and head dimension.
///
/// # Errors
/// `Unsupported` where the library has no instance.
pub fn prefill_kernel(format: KvFormat, head_dim: u32) -> Result<&'static Kernel> {
    match (format, head_dim) {
        (KvFormat::F16, 64) => Ok(&F16_D64),
        (KvFormat::F16, 80) => Ok(&F16_D80),
        (KvFormat::F16, 96) => Ok(&F16_D96),
        (KvFormat::F16, 128) => Ok(&F16_D128),
        (KvFormat::F16, 192) => Ok(&F16_D192),
        (KvFormat::F16, 256) => Ok(&F16_D256),
        (KvFormat::Bf16, 64) => Ok(&BF16_D64),
        (KvFormat::Bf16, 80) => Ok(&BF16_D80),
        (KvFormat::Bf16, 96) => Ok(&BF16_D96),
        (KvFormat::Bf16, 128) => Ok(&BF16_D128),
        (KvFormat::Bf16, 192) => Ok(&BF16_D192),
        (KvFormat::Bf16, 256) => Ok(&BF16_D256),
        _ => token_kernel(format, head_dim)
            .or_else(|| sealed_kernel(format, head_dim))
            .ok_or(Error::Unsupported { what: "prefill with this KV format and head_dim" }),
    }
}

/// Rows of a tile: the more, the less often keys are read, as far as registers allow.
fn tile_rows(head_dim: u32) -> u32 {
    if head_dim <= 128 { 128 } else { 64 }
}

/// The largest call that a launch must serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillBounds {
    /// How the cache stores K and V.
    pub format: KvFormat,
    /// Channels of a head.
    pub head_dim: u32,
    /// Query heads, a multiple of `kv_heads`.
    pub q_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Sequences, 1 to 2^20.
    pub batch: u32,
    /// Most query tokens of all sequences together, at least 1.
    pub q_tokens: u32,
}

/// The kernel, the grid and the shared memory of chunked prefill within some bounds: what a call
/// within them will run.
///
/// # Errors
/// `InvalidArgument` for bounds outside their documented ranges, `Unsupported` where there is no
/// kernel, `Overflow` where there would be more than 2^30 rows or 2^31 - 1 blocks.
pub fn prefill_info(bounds: &PrefillBounds) -> Result<Launch> {
    let b = bounds;
    let kernel = prefill_kernel(b.format, b.head_dim)?;
    if b.kv_heads == 0
        || b.q_heads == 0
        || !b.q_heads.is_multiple_of(b.kv_heads)
        || b.q_heads > 1 << 16
    {
        return Err(Error::invalid("q_heads", "must be a positive multiple of kv_heads"));
    }
    if b.batch == 0 || b.batch > 1 << 20 || b.q_tokens == 0 {
        return Err(Error::invalid("batch, q_tokens", "must be 1 to 2^20, at least 1"));
    }
    let overflow = Error::Overflow { what: "prefill grid" };
    let rows = u64::from(b.q_tokens) * u64::from(b.q_heads / b.kv_heads);
    if rows > 1 << 30 {
        return Err(overflow);
    }
    let tiles = rows / u64::from(tile_rows(b.head_dim)) + u64::from(b.batch);
    let blocks = tiles * u64::from(b.kv_heads);
    let blocks = i32::try_from(blocks).map_err(|_| overflow)?.unsigned_abs();
    // A tile of queries, of keys and of values, each row with eight elements more.
    let row_bytes = (b.head_dim + 8) * 2;
    let behind = match b.format.class() {
        FormatClass::Tile => sealed_bytes(b.format, b.head_dim),
        _ => KEYS * row_bytes,
    };
    let shared_bytes = (tile_rows(b.head_dim) + KEYS) * row_bytes + behind;
    Ok(Launch { kernel, grid: [blocks, 1, 1], shared_bytes })
}

/// Fills what the bounds determine of `params` and gives the launch.
///
/// # Errors
/// Those of [`prefill_info`]; `NullPointer` for a missing address that is not optional;
/// `InvalidArgument` for no block size, an unknown type, a scale or soft-cap that is not finite, a
/// negative soft-cap, or rows that do not begin at multiples of 16 bytes.
pub fn prefill_launch(bounds: &PrefillBounds, params: &mut PrefillParams) -> Result<Launch> {
    if !bounds.format.is_float() {
        return Err(Error::InvalidState { why: "the bounds are for rows of codes" });
    }
    prefill_launch_with(bounds, params, 16 / i64::from(bounds.format.dtype().bytes()))
}

/// The same for any rows; `chunk` units of their strides are 16 bytes.
pub(super) fn prefill_launch_with(
    bounds: &PrefillBounds,
    params: &mut PrefillParams,
    chunk: i64,
) -> Result<Launch> {
    let launch = prefill_info(bounds)?;
    let p = params;
    if p.block_tokens == 0 {
        return Err(Error::invalid("block_tokens", "must be at least 1"));
    }
    let q_dtype = DType::from_id(p.q_dtype)?;
    let out_dtype = DType::from_id(p.out_dtype)?;
    let rows = [
        ("k", chunk, p.k.0, [p.k_block, p.k_head, p.k_token]),
        ("v", chunk, p.v.0, [p.v_block, p.v_head, p.v_token]),
        ("q", i64::from(16 / q_dtype.bytes()), p.q.0, [p.q_row, p.q_head, 0]),
        ("out", i64::from(16 / out_dtype.bytes()), p.out.0, [p.out_row, p.out_head, 0]),
    ];
    for (what, chunk, address, strides) in rows {
        if !address.is_multiple_of(16) || strides.iter().any(|stride| stride % chunk != 0) {
            return Err(Error::invalid(what, "rows must begin at multiples of 16 bytes"));
        }
    }
    let needed = [
        ("q", p.q.0),
        ("k", p.k.0),
        ("v", p.v.0),
        ("out", p.out.0),
        ("q_indptr", p.q_indptr.0),
        ("table", p.table.0),
        ("seq_lens", p.seq_lens.0),
    ];
    if let Some(&(what, _)) = needed.iter().find(|(_, address)| *address == 0) {
        return Err(Error::NullPointer { what });
    }
    if !p.scale.is_finite() || !p.softcap.is_finite() || p.softcap < 0.0 {
        return Err(Error::invalid("scale, softcap", "must be finite, the latter not negative"));
    }
    // No context is longer than this.
    const NO_WINDOW: u32 = i32::MAX.unsigned_abs();
    p.window = if p.window == 0 { NO_WINDOW } else { p.window.min(NO_WINDOW) };
    let plain = p.softcap == 0.0 && p.slopes.0 == 0 && p.scale > 0.0;
    p.transform = u32::from(!plain);
    p.factor = if plain { p.scale * core::f32::consts::LOG2_E } else { 1.0 };
    p.batch = bounds.batch;
    p.q_tokens = bounds.q_tokens;
    p.q_heads = bounds.q_heads;
    p.kv_heads = bounds.kv_heads;
    Ok(launch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::params::{In, Out};

    fn sound() -> PrefillBounds {
        PrefillBounds {
            format: KvFormat::F16,
            head_dim: 64,
            q_heads: 4,
            kv_heads: 2,
            batch: 5,
            q_tokens: 79,
        }
    }

    #[test]
    fn a_launch_says_what_will_run() {
        let info = prefill_info(&sound()).unwrap();
        assert_eq!((info.kernel.name, info.kernel.threads), ("kvc_prefill_f16_d64", 128));
        // 158 rows are one whole tile of 128, and each sequence may have a part of one.
        assert_eq!((info.grid, info.shared_bytes), ([(1 + 5) * 2, 1, 1], 256 * 72 * 2));
        // The largest dimension fits the 99 KiB that a block may have on the smallest devices.
        for (head_dim, rows) in [(80, 128), (96, 128), (128, 128), (192, 64), (256, 64)] {
            let info = prefill_info(&PrefillBounds { head_dim, ..sound() }).unwrap();
            assert_eq!(info.grid[0], (158 / rows + 5) * 2);
            assert!(info.shared_bytes <= 99 << 10, "{info:?}");
        }
    }

    #[test]
    fn bounds_outside_the_ranges_are_refused() {
        for bad in [
            PrefillBounds { head_dim: 72, ..sound() },
            PrefillBounds { format: KvFormat::F32, ..sound() },
            PrefillBounds { q_heads: 5, ..sound() },
            PrefillBounds { q_heads: 0, ..sound() },
            PrefillBounds { q_heads: 1 << 17, ..sound() },
            PrefillBounds { kv_heads: 0, ..sound() },
            PrefillBounds { batch: 0, ..sound() },
            PrefillBounds { batch: u32::MAX, ..sound() },
            PrefillBounds { q_tokens: 0, ..sound() },
            PrefillBounds { q_tokens: u32::MAX, ..sound() },
            PrefillBounds { q_heads: 65536, kv_heads: 65536, q_tokens: 1 << 30, ..sound() },
        ] {
            assert!(prefill_info(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_launch_needs_sound_parameters() {
        let params = PrefillParams {
            q: In::at(256),
            k: In::at(256),
            v: In::at(256),
            out: Out::at(256),
            q_indptr: In::at(256),
            table: In::at(256),
            seq_lens: In::at(256),
            block_tokens: 16,
            q_dtype: DType::F32.id(),
            out_dtype: DType::F16.id(),
            q_row: 4,
            out_row: 8,
            scale: 0.5,
            ..PrefillParams::default()
        };
        let mut p = params;
        assert_eq!(prefill_launch(&sound(), &mut p), prefill_info(&sound()));
        assert_eq!((p.batch, p.q_tokens, p.q_heads, p.kv_heads), (5, 79, 4, 2));
        assert_eq!((p.window, p.transform), (i32::MAX as u32, 0));
        assert!(p.factor > 0.72 && p.factor < 0.73, "{}", p.factor);
        for mut special in [
            PrefillParams { softcap: 1.0, ..params },
            PrefillParams { slopes: In::at(256), ..params },
            PrefillParams { scale: -0.5, ..params },
            PrefillParams { scale: 0.0, window: 1 << 31, ..params },
        ] {
            prefill_launch(&sound(), &mut special).unwrap();
            assert_eq!((special.transform, special.factor), (1, 1.0));
            assert_eq!(special.window, i32::MAX as u32);
        }
        for mut bad in [
            PrefillParams { q: In::NULL, ..params },
            PrefillParams { seq_lens: In::NULL, ..params },
            PrefillParams { k: In::at(264), ..params },
            PrefillParams { q_row: 2, ..params },
            PrefillParams { out_row: 4, ..params },
            PrefillParams { v_token: 4, ..params },
            PrefillParams { block_tokens: 0, ..params },
            PrefillParams { q_dtype: 9, ..params },
            PrefillParams { scale: f32::NAN, ..params },
            PrefillParams { scale: f32::INFINITY, ..params },
            PrefillParams { softcap: -1.0, ..params },
            PrefillParams { softcap: f32::INFINITY, ..params },
        ] {
            assert!(prefill_launch(&sound(), &mut bad).is_err(), "{bad:?}");
        }
    }
}
