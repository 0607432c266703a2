//! Chunked prefill over sealed tiles: which kernel, its shared memory, and what a call says of the
//! record. The grid is that of any prefill (prefill.rs).

use super::attend::AttendArgs;
use super::attend_params::prefill_params;
use super::params::{DecodeTileParams, PrefillSealedParams};
use super::prefill::{PrefillBounds, prefill_launch_with};
use super::records::{place_record, record, record_args};
use super::{Kernel, Launch, decode};
use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::layout::tile::TileLayout;

kernels! {
    D64 = "kvc_prefill_sealed_d64", "kvc_prefill_sealed_params", 128;
    D128 = "kvc_prefill_sealed_d128", "kvc_prefill_sealed_params", 128;
}

/// The kernel for a format and head dimension, which serves every format with tiles; `None` where
/// there is no instance.
pub(super) fn sealed_kernel(format: KvFormat, head_dim: u32) -> Option<&'static Kernel> {
    match (format.class(), head_dim) {
        (FormatClass::Tile, 64) => Some(&D64),
        (FormatClass::Tile, 128) => Some(&D128),
        _ => None,
    }
}

/// Tokens that a block has in shared memory at a time.
const KEYS: u32 = 64;
/// Packed rows of a block.
const BLOCK_ROWS: u32 = 128;
/// Bytes of what the kernel needs seldom.
const SIDE_BYTES: u32 = 1024;
/// The most tokens of a tile.
const MAX_TOKENS: u32 = 128;

/// Shared memory behind queries and keys: values, channel by channel, and the codes of 64 tokens with
/// what belongs to them.
pub(super) fn sealed_bytes(format: KvFormat, head_dim: u32) -> u32 {
    let main = |bits: u32| if bits == 3 { 2 } else { bits };
    let codes = |bits: u32| KEYS * head_dim / 8 * main(bits);
    let plane = |bits: u32, tokens: u32| if bits == 3 { tokens * head_dim / 8 } else { 0 };
    let (k, v) = (format.k_bits(), format.v_bits());
    let keys = 2 * head_dim + 16 + codes(k) + plane(k, KEYS);
    // Third bits of values come as a record has them, those of all its tokens.
    let values = 2 * KEYS + codes(v) + plane(v, MAX_TOKENS);
    head_dim * (KEYS + 8) * 2 + SIDE_BYTES + keys + values
}

/// Whether this kernel serves sequences of more than [`TILE_ROWS`](super::TILE_ROWS) rows each, of
/// `rows` together: the rule by which a cache chooses, made for caches that owe nobody equal bits.
///
/// Decode reads a context once for each eight columns, by pieces that the whole device shares; this
/// kernel reads it once for each 128, by one block. The first did 27 columns of 8 by a token in a
/// nanosecond on an H200, so that it has about half of the other's rate whatever the shape, while this
/// one needs blocks for every multiprocessor: with half as many both take about as long.
pub fn prefill_sealed_pays(
    seqs: u32,
    rows: u32,
    q_heads: u32,
    kv_heads: u32,
    multiprocessors: u32,
) -> bool {
    let tiles = u64::from(rows) * u64::from(q_heads / kv_heads.max(1)) / u64::from(BLOCK_ROWS);
    2 * tiles.max(u64::from(seqs)) * u64::from(kv_heads) >= u64::from(multiprocessors)
}

/// The parameters of a call, from the form that all calls have and what decode is told of the same
/// tiles.
///
/// # Errors
/// `NullPointer`, `Misaligned`, `InvalidArgument`: what any attention call is refused for.
pub fn prefill_sealed_params(
    args: &AttendArgs,
    rows: &DecodeTileParams,
) -> Result<PrefillSealedParams> {
    args.check(false)?;
    Ok(PrefillSealedParams {
        call: prefill_params(args),
        records: rows.records,
        raw_indptr: rows.raw_indptr,
        raw_blocks: rows.raw_blocks,
        scratch_k: rows.scratch_k,
        scratch_v: rows.scratch_v,
        record_block: rows.record_block,
        record_head: rows.record_head,
        scratch_k_block: rows.scratch_k_block,
        scratch_k_head: rows.scratch_k_head,
        scratch_k_token: rows.scratch_k_token,
        scratch_v_block: rows.scratch_v_block,
        scratch_v_head: rows.scratch_v_head,
        scratch_v_token: rows.scratch_v_token,
        staging_blocks: rows.staging_blocks,
        scratch_blocks: rows.scratch_blocks,
        ..PrefillSealedParams::default()
    })
}

/// [`prefill_launch`](super::prefill_launch) for sealed tiles, of `block_tokens` tokens. Fills also
/// what the layout of the record determines.
///
/// # Errors
/// As there; `InvalidArgument` for a call that is not causal, tiles of other than 64 or 128 tokens, or
/// records that do not begin at multiples of 16 bytes; `NullPointer`.
pub fn prefill_sealed_launch(
    bounds: &PrefillBounds,
    params: &mut PrefillSealedParams,
) -> Result<Launch> {
    if bounds.format.class() != FormatClass::Tile {
        return Err(Error::InvalidState { why: "the bounds are not for sealed tiles" });
    }
    let p = params;
    let tokens = p.call.block_tokens;
    if ![KEYS, MAX_TOKENS].contains(&tokens) {
        return Err(Error::Unsupported {
            what: "tiles of other than 64 or 128 tokens on a device",
        });
    }
    if p.call.causal != 1 {
        return Err(Error::invalid("causal", "must be set for sealed tiles"));
    }
    record_args!(p).check()?;
    let layout = record(bounds.format, bounds.head_dim, tokens)?;
    let launch = prefill_launch_with(bounds, &mut p.call, decode::CHUNK_ELEMENTS)?;
    place_record!(p, bounds.format, &layout);
    p.k_bits = bounds.format.k_bits();
    p.v_bits = bounds.format.v_bits();
    Ok(launch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::params::{In, Out, PrefillParams};
    use crate::kernels::{SM90_SHARED_BYTES, prefill_info, residence::RESERVED_BYTES};

    fn bounds(format: KvFormat, head_dim: u32) -> PrefillBounds {
        PrefillBounds { format, head_dim, q_heads: 8, kv_heads: 2, batch: 3, q_tokens: 100 }
    }

    fn tile_formats() -> impl Iterator<Item = KvFormat> {
        KvFormat::ALL.iter().copied().filter(|f| f.class() == FormatClass::Tile)
    }

    /// The sources ask for two blocks a multiprocessor; on the smallest devices one must fit.
    #[test]
    fn two_blocks_have_room() {
        for format in tile_formats() {
            for head_dim in [64, 128] {
                let info = prefill_info(&bounds(format, head_dim)).unwrap();
                assert!(info.kernel.name.starts_with("kvc_prefill_sealed_d"), "{info:?}");
                assert!(2 * (info.shared_bytes + RESERVED_BYTES) <= SM90_SHARED_BYTES, "{info:?}");
                assert!(info.shared_bytes <= 99 << 10, "{info:?}");
                // Of devices with 164 KB, beside 8-bit codes of 128 channels one.
                let two = 2 * (info.shared_bytes + RESERVED_BYTES) <= 164 << 10;
                assert_eq!(two, (format, head_dim) != (KvFormat::Kt8v8, 128), "{info:?}");
            }
            assert!(prefill_info(&bounds(format, 96)).is_err());
        }
    }

    /// A prompt of 256 tokens alone on a device of 132 multiprocessors is at the border.
    #[test]
    fn few_rows_stay_with_decode() {
        assert!(!prefill_sealed_pays(1, 255, 32, 8, 132));
        assert!(prefill_sealed_pays(1, 288, 32, 8, 132));
        assert!(!prefill_sealed_pays(8, 72, 32, 8, 132));
        assert!(prefill_sealed_pays(9, 81, 32, 8, 132));
        assert!(prefill_sealed_pays(1, 9, 4, 2, 4));
    }

    #[test]
    fn a_launch_needs_sound_parameters() {
        let call = PrefillParams {
            q: In::at(256),
            k: In::at(256),
            v: In::at(256),
            out: Out::at(256),
            q_indptr: In::at(256),
            table: In::at(256),
            seq_lens: In::at(256),
            block_tokens: 64,
            causal: 1,
            q_dtype: 2,
            out_dtype: 2,
            scale: 0.1,
            ..PrefillParams::default()
        };
        let sound = PrefillSealedParams {
            call,
            records: In::at(256),
            raw_indptr: In::at(256),
            raw_blocks: In::at(256),
            ..PrefillSealedParams::default()
        };
        let bounds = bounds(KvFormat::Kt3v3, 128);
        let mut p = sound;
        assert_eq!(prefill_sealed_launch(&bounds, &mut p), prefill_info(&bounds));
        assert_eq!((p.k_bits, p.v_bits, p.tile_tokens, p.v_rotated), (3, 3, 64, 1));
        assert_eq!((p.k_plane_at, p.v_codes_at), (64 * 32, 64 * 48));
        for mut bad in [
            PrefillSealedParams { call: PrefillParams { causal: 0, ..call }, ..sound },
            PrefillSealedParams { call: PrefillParams { block_tokens: 32, ..call }, ..sound },
            PrefillSealedParams { call: PrefillParams { q: In::NULL, ..call }, ..sound },
            PrefillSealedParams { call: PrefillParams { k_token: 4, ..call }, ..sound },
            PrefillSealedParams { records: In::NULL, ..sound },
            PrefillSealedParams { records: In::at(264), ..sound },
            PrefillSealedParams { record_block: 8, ..sound },
            PrefillSealedParams { raw_indptr: In::NULL, ..sound },
            PrefillSealedParams { scratch_blocks: 1, ..sound },
            PrefillSealedParams { scratch_v_token: 4, ..sound },
            PrefillSealedParams { staging_blocks: 1 << 31, ..sound },
        ] {
            assert!(prefill_sealed_launch(&bounds, &mut bad).is_err(), "{bad:?}");
        }
        let other = PrefillBounds { format: KvFormat::Int8T, ..bounds };
        assert!(prefill_sealed_launch(&other, &mut { sound }).is_err());
    }
}
