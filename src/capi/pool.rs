//! The pool noun: `crate::pool::BlockPool` behind a handle.

use super::handle::{self, Noun};
use super::pointer::{self, Plain};
use super::status::{guard, kvc_status};
use crate::error::Result;
use crate::ids::BlockId;
use crate::pool::BlockPool;

/// Blocks 0 to n - 1, each free or held by as many holders as retained it. For engines that keep
/// their own tables and tensors; a kvc_cache has pools of its own.
pub struct kvc_pool(());

impl Noun for BlockPool {
    type Handle = kvc_pool;
    const KIND: usize = 1;
    const NAME: &'static str = "pool";
}

/// What a pool holds now. blocks = free_blocks + held_blocks.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_pool_counts {
    /// Blocks of the pool.
    pub blocks: u32,
    /// Blocks that nobody holds.
    pub free_blocks: u32,
    /// Blocks with at least one holder.
    pub held_blocks: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: four u32.
unsafe impl Plain for kvc_pool_counts {}

/// The pool's ids as Rust has them.
///
/// # Safety
/// As for [`pointer::slice`].
unsafe fn ids<'a>(blocks: *const i32, count: u32) -> Result<&'a [BlockId]> {
    // SAFETY: the caller's promise; BlockId is transparent over u32. Negative ids become numbers
    // that no pool has.
    unsafe { pointer::slice(blocks.cast::<BlockId>(), u64::from(count), "blocks") }
}

/// Makes a pool of `blocks` free blocks, 1 to 2^31 - 1, 8 bytes of memory each. Later calls
/// allocate nothing.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_pool_create(blocks: u32, out: *mut *mut kvc_pool) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out, "out") }?;
        out.write(handle::publish(BlockPool::new(blocks)?)?);
        Ok(())
    })
}

/// Ends a pool. NULL is accepted.
///
/// Threads: per-handle.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_pool_destroy(pool: *mut kvc_pool) -> kvc_status {
    guard(|| handle::destroy::<BlockPool>(pool))
}

/// Takes `n` free blocks, all or none, and writes their ids to `out[n]`. Each has one holder, the
/// caller. KVC_ERR_OUT_OF_BLOCKS where fewer are free; kvc_last_missing_blocks() says how many
/// were missing.
///
/// Threads: per-handle.
///
/// # Safety
/// The module's rules; `out` is writable for `n` ids.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_pool_allocate_n(
    pool: *mut kvc_pool,
    n: u32,
    out: *mut i32,
) -> kvc_status {
    guard(|| {
        let mut pool = handle::exclusive::<BlockPool>(pool)?;
        // SAFETY: the caller's promise; BlockId is transparent over u32.
        let out = unsafe { pointer::slice_out(out.cast::<BlockId>(), u64::from(n), "out") }?;
        pool.allocate_n(out)
    })
}

/// Adds a holder to each of `n` blocks, all or none. A block may occur several times.
///
/// Threads: per-handle.
///
/// # Safety
/// The module's rules; `blocks` is readable for `n` ids.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_pool_retain_n(
    pool: *mut kvc_pool,
    blocks: *const i32,
    n: u32,
) -> kvc_status {
    guard(|| {
        let mut pool = handle::exclusive::<BlockPool>(pool)?;
        // SAFETY: the caller's promise.
        pool.retain_n(unsafe { ids(blocks, n) }?)
    })
}

/// Takes a holder from each of `n` blocks, all or none; a block without holders is free. A block
/// may occur as often as it has holders. Writes how many became free to `out_freed`, which may be
/// NULL.
///
/// Threads: per-handle.
///
/// # Safety
/// The module's rules; `blocks` is readable for `n` ids, `out_freed` writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_pool_free_n(
    pool: *mut kvc_pool,
    blocks: *const i32,
    n: u32,
    out_freed: *mut u32,
) -> kvc_status {
    guard(|| {
        let mut pool = handle::exclusive::<BlockPool>(pool)?;
        // SAFETY: the caller's promise.
        let (blocks, out) =
            unsafe { (ids(blocks, n)?, pointer::maybe_out(out_freed, "out_freed")?) };
        let freed = pool.free_n(blocks)?;
        if let Some(out) = out {
            out.write(freed);
        }
        Ok(())
    })
}

/// Writes how many hold `block` to `out_refs`: 0 where it is free or not a block of the pool.
///
/// Threads: per-handle.
///
/// # Safety
/// The module's rules; `out_refs` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_pool_refs(
    pool: *const kvc_pool,
    block: i32,
    out_refs: *mut u32,
) -> kvc_status {
    guard(|| {
        let pool = handle::shared::<BlockPool>(pool)?;
        // SAFETY: the caller's promise.
        unsafe { pointer::out(out_refs, "out_refs") }?.write(pool.refs(BlockId(block as u32)));
        Ok(())
    })
}

/// Writes the pool's counts to `out`, `out_bytes` (its sizeof) at most.
///
/// Threads: per-handle.
///
/// # Safety
/// The module's rules; `out` is writable for `out_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_pool_stats(
    pool: *const kvc_pool,
    out: *mut kvc_pool_counts,
    out_bytes: u64,
) -> kvc_status {
    guard(|| {
        let pool = handle::shared::<BlockPool>(pool)?;
        let (blocks, free_blocks) = (pool.blocks(), pool.free_blocks());
        let held_blocks = blocks - free_blocks;
        let counts = kvc_pool_counts { blocks, free_blocks, held_blocks, reserved: 0 };
        // SAFETY: the caller's promise.
        unsafe { pointer::write(out, out_bytes, counts, "out", 16) }
    })
}
