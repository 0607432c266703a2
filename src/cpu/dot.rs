//! How a query meets a key: the ways to multiply two vectors' worth of channels at a time.
//!
//! A query row is prepared once in the order and precision that the keys are loaded in.

use core::marker::PhantomData;

use super::vector::{PairDot, Stored, Vector};

/// Dot products of prepared queries with stored keys, [`CHANNELS`](Self::CHANNELS) a step.
///
/// # Safety
/// As for [`Vector`].
pub(crate) unsafe trait KeyDot<V: Vector> {
    /// A step of a key.
    type Key: Copy;
    /// A step of a prepared query.
    type Query: Copy;
    /// Channels of a step.
    const CHANNELS: usize = 2 * V::LANES;
    /// Keys that meet four rows at once: 2 or 4.
    const KEYS: usize = 4;
    /// Bytes of a stored channel.
    const BYTES: usize;
    /// Bytes of a prepared query a channel, at most 4.
    const QUERY_BYTES: usize;
    /// Whether rows are codes of bytes, whose heads have scales.
    const CODED: bool = false;

    /// Prepares a row of `dim` f32, a multiple of `2 * LANES`.
    unsafe fn prepare(row: *const f32, dim: usize, to: *mut u8);
    /// Reads a step of a prepared query.
    unsafe fn load_query(p: *const u8) -> Self::Query;
    /// Reads a step of a key.
    unsafe fn load(p: *const u8) -> Self::Key;
    /// Reads `n < CHANNELS` channels of a key and nothing after them; the others are 0.
    unsafe fn load_part(p: *const u8, n: usize) -> Self::Key;
    /// `acc` plus the products, spread over the lanes in an order fixed for the type.
    unsafe fn dot(acc: V, query: Self::Query, key: Self::Key) -> V;
}

/// Keys widened to f32: exact products in f32.
pub(crate) struct Widened<S>(PhantomData<S>);

#[allow(clippy::undocumented_unsafe_blocks)] // the callers' promise, as the trait says
// SAFETY: only instructions of `V`.
unsafe impl<V: Vector, S: Stored> KeyDot<V> for Widened<S> {
    type Key = [V; 2];
    type Query = [V; 2];
    const KEYS: usize = if V::LANES == 16 && S::BYTES == 4 { 2 } else { 4 };
    const BYTES: usize = S::BYTES;
    const QUERY_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn prepare(row: *const f32, dim: usize, to: *mut u8) {
        let to = to.cast::<f32>();
        unsafe {
            if !S::EVEN_ODD {
                return core::ptr::copy_nonoverlapping(row, to, dim);
            }
            for pair in (0..dim).step_by(2 * V::LANES) {
                for i in 0..V::LANES {
                    to.add(pair + i).write(row.add(pair + 2 * i).read());
                    to.add(pair + V::LANES + i).write(row.add(pair + 2 * i + 1).read());
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn load_query(p: *const u8) -> [V; 2] {
        let p = p.cast::<f32>();
        unsafe { [V::load(p), V::load(p.add(V::LANES))] }
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> [V; 2] {
        unsafe { S::load2(p) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const u8, n: usize) -> [V; 2] {
        unsafe { S::load2_part(p, n) }
    }
    #[inline(always)]
    unsafe fn dot(acc: V, query: [V; 2], key: [V; 2]) -> V {
        unsafe { query[1].fma(key[1], query[0].fma(key[0], acc)) }
    }
}

/// bf16 keys times bf16 queries by the machine's pair products: for queries that are bf16 anyway.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // used where the machine has such products
pub(crate) struct Pairs;

#[allow(clippy::undocumented_unsafe_blocks)] // the callers' promise, as the trait says
// SAFETY: only instructions of `V`.
unsafe impl<V: PairDot> KeyDot<V> for Pairs {
    type Key = V::Pairs;
    type Query = V::Pairs;
    const BYTES: usize = 2;
    const QUERY_BYTES: usize = 2;

    #[inline(always)]
    unsafe fn prepare(row: *const f32, dim: usize, to: *mut u8) {
        for c in 0..dim {
            // The value is a bf16, so its upper half is all of it.
            unsafe { to.cast::<u16>().add(c).write((row.add(c).read().to_bits() >> 16) as u16) }
        }
    }
    #[inline(always)]
    unsafe fn load_query(p: *const u8) -> V::Pairs {
        unsafe { V::load_pairs(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> V::Pairs {
        unsafe { V::load_pairs(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const u8, n: usize) -> V::Pairs {
        unsafe { V::load_pairs_part(p.cast(), n) }
    }
    #[inline(always)]
    unsafe fn dot(acc: V, query: V::Pairs, key: V::Pairs) -> V {
        unsafe { acc.dot_pairs(query, key) }
    }
}

/// bf16 keys times f16 queries, each the sum of two bf16: exact, as 8 + 8 bits hold f16's 11.
/// Wider queries would be cut to 16 bits.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // used where the machine has such products
pub(crate) struct SplitPairs;

#[allow(clippy::undocumented_unsafe_blocks)] // the callers' promise, as the trait says
// SAFETY: only instructions of `V`.
unsafe impl<V: PairDot> KeyDot<V> for SplitPairs {
    type Key = V::Pairs;
    type Query = [V::Pairs; 2];
    const BYTES: usize = 2;
    const QUERY_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn prepare(row: *const f32, dim: usize, to: *mut u8) {
        let (to, step) = (to.cast::<u16>(), 2 * V::LANES);
        for c in 0..dim {
            // A step of the upper parts, then a step of the lower ones.
            let at = c / step * 2 * step + c % step;
            unsafe {
                // Of f16's 11 bits the first 8, and the rest: 0 for an infinite value.
                let x = row.add(c).read();
                let high = x.to_bits() >> 16;
                let low = if x.is_finite() { x - f32::from_bits(high << 16) } else { 0.0 };
                to.add(at).write(high as u16);
                to.add(at + step).write((low.to_bits() >> 16) as u16);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_query(p: *const u8) -> [V::Pairs; 2] {
        let p = p.cast::<u16>();
        unsafe { [V::load_pairs(p), V::load_pairs(p.add(2 * V::LANES))] }
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> V::Pairs {
        unsafe { V::load_pairs(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const u8, n: usize) -> V::Pairs {
        unsafe { V::load_pairs_part(p.cast(), n) }
    }
    #[inline(always)]
    unsafe fn dot(acc: V, query: [V::Pairs; 2], key: V::Pairs) -> V {
        unsafe { acc.dot_pairs(query[1], key).dot_pairs(query[0], key) }
    }
}
