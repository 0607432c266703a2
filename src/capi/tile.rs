//! The tile noun: sealed tiles on the caller's own pointers, for kvc_attend, and their sealing.

use core::ffi::c_void;
use core::sync::atomic::AtomicU32;

use super::attend::kvc_attend_desc;
use super::pointer::{self, Plain, Sized32, flag};
use super::status::{guard, kvc_status};
use super::threads;
use crate::attention::HeadShape;
use crate::cpu::{
    AttendArgs, AttendMaxima, CpuLevel, Executor, KvView, RawBlock, RawTables, ScaleView, SealArgs,
    SealTile, TileAttendArgs, TileView, attend_tiles, attend_tiles_workspace_bytes, seal_tiles,
};
use crate::dtype::KvFormat;
use crate::error::{Error, Result};
use crate::layout::Strides;
use crate::layout::tile::{TileLayout, TileShape};

/// Where the raw rows of one tile of a sequence lie.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_raw_block {
    /// Which tile of the sequence: its tokens are tile * block_tokens and on.
    pub tile: i32,
    /// Raw slot.
    pub slot: i32,
}

/// A full raw tile and the block that it is sealed into.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_seal_tile {
    /// Raw slot.
    pub slot: i32,
    /// Block of the records.
    pub block: i32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_raw_block {}
// SAFETY: integers.
unsafe impl Plain for kvc_seal_tile {}

/// The sealed tiles of one layer (KVC_FORMAT_KT*), and the raw rows of those that are not sealed.
///
/// A query at position p reads its own tile, p / block_tokens, raw, and every tile before it
/// sealed. The record of block b and KV head h lies b * block_bytes + h * head_bytes after records.
/// Raw slot s is block s of staging, or past its end block s - staging_blocks of scratch. A raw
/// block is `[kv_head][token][k_dim]` keys and then `[kv_head][token][v_dim]` values (none with
/// v_in_k), all bf16.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_tile_view {
    /// sizeof(kvc_tile_view); kvc_tile_view_init sets it.
    pub struct_size: u32,
    /// Raw blocks that staging has.
    pub staging_blocks: u32,
    /// Raw blocks that scratch has; may be 0.
    pub scratch_blocks: u32,
    /// 0.
    pub reserved: u32,
    /// Records, 16-byte aligned.
    pub records: *mut c_void,
    /// Bytes from a block to the next, a multiple of 16; 0 for kv_heads * head_bytes.
    pub block_bytes: i64,
    /// Bytes from a KV head to the next, a multiple of 16; 0 for those of a record.
    pub head_bytes: i64,
    /// Raw rows that outlive a step.
    pub staging: *mut c_void,
    /// Bytes from a raw block of staging to the next; 0 for contiguous ones.
    pub staging_block_bytes: i64,
    /// Raw rows of tiles that a step fills from end to end.
    pub scratch: *mut c_void,
    /// Bytes from a raw block of scratch to the next; 0 for contiguous ones.
    pub scratch_block_bytes: i64,
    /// `[seqs + 1]` offsets into raw_blocks, from 0, never decreasing. Read by kvc_attend only.
    pub raw_indptr: *const i32,
    /// The raw tiles of each sequence, ascending: all that hold its queries, and every one before
    /// whose record says that it is not sealed. Read by kvc_attend only.
    pub raw_blocks: *const kvc_raw_block,
}

// SAFETY: integers, pointers.
unsafe impl Plain for kvc_tile_view {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_tile_view {
    const NAME: &'static str = "kvc_tile_view";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        // SAFETY: every bit pattern is a value of a Plain type.
        let zero: Self = unsafe { core::mem::zeroed() };
        Self { struct_size: size_of::<Self>() as u32, ..zero }
    }
}

/// Raw tiles that are to be sealed.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_seal_desc {
    /// sizeof(kvc_seal_desc); kvc_seal_desc_init sets it.
    pub struct_size: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Channels of a key: a multiple of 16, to 256 (576 with v_in_k).
    pub k_dim: u32,
    /// Channels of a value: a multiple of 16.
    pub v_dim: u32,
    /// 1: values are the first v_dim channels of the keys.
    pub v_in_k: u32,
    /// KVC_FORMAT_KT*.
    pub format: u32,
    /// Tokens of a tile: 32, 64 or 128.
    pub block_tokens: u32,
    /// Blocks that the records have.
    pub num_blocks: u32,
    /// Tiles to seal.
    pub count: u32,
    /// As in kvc_attend_desc.
    pub threads: u32,
    /// The layer.
    pub tiles: *const kvc_tile_view,
    /// `[count]` what to seal; blocks are distinct.
    pub list: *const kvc_seal_tile,
    /// `[count]`: set to 1 where rows of some head cannot be sealed (NaN, infinity, scales past
    /// f16), else left as it is. The record of such a head says that it is not sealed, and its rows
    /// are read raw as long as raw_blocks has them.
    pub refused: *mut u32,
}

// SAFETY: integers, pointers.
unsafe impl Plain for kvc_seal_desc {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_seal_desc {
    const NAME: &'static str = "kvc_seal_desc";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        // SAFETY: every bit pattern is a value of a Plain type.
        let zero: Self = unsafe { core::mem::zeroed() };
        Self {
            struct_size: size_of::<Self>() as u32,
            format: KvFormat::Kt4v4.id(),
            block_tokens: 64,
            threads: 1,
            ..zero
        }
    }
}

impl kvc_tile_view {
    fn view<'a>(
        &self,
        layout: &'a TileLayout,
        shape: &HeadShape,
        num_blocks: u32,
    ) -> Result<TileView<'a>> {
        if self.reserved != 0 {
            return Err(Error::invalid("reserved", "must be 0"));
        }
        let head_bytes = if self.head_bytes == 0 { layout.bytes() as i64 } else { self.head_bytes };
        let block_bytes = match self.block_bytes {
            0 => head_bytes
                .checked_mul(i64::from(shape.kv_heads))
                .ok_or(Error::Overflow { what: "block_bytes" })?,
            given => given,
        };
        let tokens = layout.shape().tokens;
        let raw = |memory: *mut c_void, blocks: u32, block_bytes: i64| {
            let side = |dim: u32| i64::from(tokens) * i64::from(dim);
            let v_dim = if shape.v_in_k { 0 } else { shape.v_dim };
            let heads = i64::from(shape.kv_heads);
            let block = match block_bytes {
                0 => (side(shape.k_dim) + side(v_dim)) * heads,
                odd if odd % 2 != 0 => {
                    return Err(Error::invalid("staging_block_bytes", "must be even"));
                }
                given => given / 2,
            };
            let strides = |dim: u32| Strides { block, head: side(dim), token: i64::from(dim) };
            let k = memory.cast::<u8>();
            Ok(KvView {
                k,
                v: k.wrapping_offset((side(shape.k_dim) * heads * 2) as isize),
                format: KvFormat::Bf16,
                k_strides: strides(shape.k_dim),
                v_strides: strides(shape.v_dim),
                num_blocks: blocks,
                block_tokens: tokens,
                scales: ScaleView::NONE,
            })
        };
        Ok(TileView {
            layout,
            records: self.records.cast(),
            block_bytes,
            head_bytes,
            num_blocks,
            staging: raw(self.staging, self.staging_blocks, self.staging_block_bytes)?,
            scratch: raw(self.scratch, self.scratch_blocks, self.scratch_block_bytes)?,
        })
    }
}

fn layout_of(format: u32, shape: &HeadShape, tokens: u32) -> Result<TileLayout> {
    let HeadShape { k_dim, v_dim, v_in_k, .. } = *shape;
    TileLayout::new(KvFormat::from_id(format)?, TileShape { k_dim, v_dim, v_in_k, tokens })
}

/// The workspace of kvc_attend for sealed tiles.
pub(super) fn workspace_bytes(desc: &kvc_attend_desc, maxima: &AttendMaxima) -> Result<u64> {
    let shape = desc.shape()?;
    let layout = layout_of(desc.format, &shape, desc.block_tokens)?;
    attend_tiles_workspace_bytes(&shape, &layout, maxima)
}

/// kvc_attend for sealed tiles: `args` is everything but the cache.
///
/// # Safety
/// As for kvc_attend.
pub(super) unsafe fn attend(
    desc: &kvc_attend_desc,
    args: &AttendArgs<'_>,
    level: CpuLevel,
    executor: &dyn Executor,
    workspace: &mut [u8],
) -> Result<()> {
    let layout = layout_of(desc.format, &args.shape, desc.block_tokens)?;
    // SAFETY: the caller's promise.
    let view = unsafe { pointer::read(desc.tiles) }?;
    let args = TileAttendArgs {
        shape: args.shape,
        scoring: args.scoring,
        tiles: view.view(&layout, &args.shape, desc.num_blocks)?,
        tables: args.tables,
        // The same two integers.
        raw: RawTables { indptr: view.raw_indptr, blocks: view.raw_blocks.cast::<RawBlock>() },
        seqs: args.seqs,
        q_indptr: args.q_indptr,
        kv_lens: args.kv_lens,
        q: args.q,
        out: args.out,
        lse: args.lse,
        bad_block: args.bad_block,
    };
    // SAFETY: the caller's promise.
    unsafe { attend_tiles(&args, level, executor, workspace) }
}

/// Fills a kvc_tile_view of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `view` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_tile_view_init(
    view: *mut kvc_tile_view,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(view, struct_size) })
}

/// Fills a kvc_seal_desc of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `desc` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seal_desc_init(
    desc: *mut kvc_seal_desc,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(desc, struct_size) })
}

impl kvc_seal_desc {
    fn shape(&self) -> Result<HeadShape> {
        let shape = HeadShape {
            q_heads: self.kv_heads,
            kv_heads: self.kv_heads,
            k_dim: self.k_dim,
            v_dim: self.v_dim,
            v_in_k: flag(self.v_in_k, "v_in_k")?,
        };
        shape.check()?;
        Ok(shape)
    }
}

/// Writes the bytes of one record of `desc` to `out_bytes`. No pointer of `desc` is followed.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_bytes` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seal_record_size(
    desc: *const kvc_seal_desc,
    out_bytes: *mut u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (desc, out) = unsafe { (pointer::read(desc)?, pointer::out(out_bytes, "out_bytes")?) };
        let layout = layout_of(desc.format, &desc.shape()?, desc.block_tokens)?;
        out.write(layout.bytes() as u64);
        Ok(())
    })
}

/// Seals full raw tiles, all heads of a layer: the same bits on every CPU and with any number of
/// threads. Bad arguments are answered before anything is written.
///
/// Threads: thread-safe, where calls share no records.
///
/// # Safety
/// The module's rules; all rows of the listed slots are readable, the listed blocks' records and
/// `refused` writable, and nobody else touches those records during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seal(desc: *const kvc_seal_desc) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let desc = unsafe { pointer::read(desc) }?;
        // SAFETY: see above.
        let view = unsafe { pointer::read(desc.tiles) }?;
        let shape = desc.shape()?;
        let layout = layout_of(desc.format, &shape, desc.block_tokens)?;
        let count = u64::from(desc.count);
        // SAFETY: see above.
        let list = unsafe { pointer::slice(desc.list, count, "list") }?;
        // SAFETY: see above.
        let refused = unsafe { pointer::slice_out(desc.refused, count, "refused") }?;
        // SAFETY: AtomicU32 and kvc_seal_tile have the layouts of u32 and SealTile, and `refused`
        // is borrowed for the call.
        let (list, refused) = unsafe {
            let refused = refused.as_mut_ptr().cast::<AtomicU32>().cast_const();
            (
                core::slice::from_raw_parts(list.as_ptr().cast::<SealTile>(), list.len()),
                core::slice::from_raw_parts(refused, list.len()),
            )
        };
        let tiles = view.view(&layout, &shape, desc.num_blocks)?;
        let args = SealArgs { shape, tiles, list, refused };
        let level = CpuLevel::chosen()?;
        // SAFETY: see above.
        threads::with(desc.threads, |threads| unsafe { seal_tiles(&args, level, threads) })
    })
}
