//! How many leading tokens two slices share: the comparison that makes the index exact.
//!
//! Long runs are compared as slices, which becomes the platform's `memcmp`; the position of the
//! first difference is then found in ever smaller steps.

use crate::ids::TokenId;

/// The length of the longest common prefix of `a` and `b`.
#[inline]
pub(super) fn common_prefix(a: &[TokenId], b: &[TokenId]) -> usize {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    let mut at = 0;
    at += equal_chunks::<512>(&a[at..], &b[at..]);
    at += equal_chunks::<64>(&a[at..], &b[at..]);
    at += equal_chunks::<8>(&a[at..], &b[at..]);
    at + a[at..].iter().zip(&b[at..]).take_while(|(x, y)| x == y).count()
}

/// How many tokens of whole, equal chunks of `N` both slices begin with.
#[inline(always)]
fn equal_chunks<const N: usize>(a: &[TokenId], b: &[TokenId]) -> usize {
    let (a, b) = (a.as_chunks::<N>().0, b.as_chunks::<N>().0);
    a.iter().zip(b).take_while(|(x, y)| x == y).count() * N
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn finds_the_first_difference_at_every_position() {
        for n in [0, 1, 7, 8, 9, 63, 64, 65, 511, 512, 513, 1100] {
            let a: Vec<u32> = (0..n).collect();
            assert_eq!(common_prefix(&a, &a), n as usize);
            for at in (0..n as usize).step_by(if cfg!(miri) { 61 } else { 1 }) {
                let mut b = a.clone();
                b[at] = u32::MAX;
                assert_eq!(common_prefix(&a, &b), at);
                assert_eq!(common_prefix(&a, &a[..at]), at);
            }
        }
    }
}
