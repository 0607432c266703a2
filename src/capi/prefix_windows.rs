//! Layer groups with a sliding window in an index of the engine's own: `crate::prefix` has the rules.

use super::pointer;
use super::prefix::{kvc_prefix, write};
use super::status::{guard, kvc_status};
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::layout::MAX_GROUPS;

/// Gives the layer groups of an empty index (KVC_ERR_INVALID_STATE) their sliding windows:
/// `windows[groups]`, one for each of its groups, at most 16, in tokens, the query's own included; 0
/// for a group that sees everything. From then on a hit ends where every group can serve it: one with
/// a window needs the blocks that its window reaches, the others all. An id of -1 stands for the block
/// that a group with a window has not, in what is looked up, inserted and evicted; who inserts such a
/// block again puts it back.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `windows` is readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_set_windows(
    prefix: *mut kvc_prefix,
    windows: *const u32,
    groups: u32,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let given = unsafe { pointer::slice(windows, groups.into(), "windows") }?;
        let mut windows = [None; MAX_GROUPS];
        let Some(windows) = windows.get_mut(..given.len()) else {
            return Err(Error::invalid("windows", "must be one a group, at most 16"));
        };
        for (window, &tokens) in windows.iter_mut().zip(given) {
            *window = (tokens != 0).then_some(tokens);
        }
        write(prefix, |index| index.set_windows(windows))
    })
}

/// Takes `blocks[count]` of a group with a window out of their entries, which stay for the other
/// groups: for the caller to free, once no sequence's window reaches them. How many of them an entry
/// had goes to `out_forgotten`, and those to the front of `blocks`; the rest is behind them.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `blocks` and `out_forgotten` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_forget(
    prefix: *mut kvc_prefix,
    group: u32,
    blocks: *mut i32,
    count: u64,
    out_forgotten: *mut u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise; BlockId is transparent over u32.
        let (blocks, out) = unsafe {
            (
                pointer::slice_out(blocks.cast::<BlockId>(), count, "blocks")?,
                pointer::out(out_forgotten, "out_forgotten")?,
            )
        };
        out.write(write(prefix, |index| {
            if group as usize >= index.groups() {
                return Err(Error::invalid("group", "is not in the index"));
            }
            let mut forgotten = 0;
            for at in 0..blocks.len() {
                if index.forget(group as usize, blocks[at]) {
                    blocks.swap(at, forgotten);
                    forgotten += 1;
                }
            }
            Result::Ok(forgotten as u64)
        })?);
        Ok(())
    })
}
