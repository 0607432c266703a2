//! The softmax state of a row over a set of keys, and its merge.
//!
//! States over disjoint key sets merge to the state of their union, in any order up to rounding;
//! that is what lets kernels cut a long context into pieces. No pointers, no SIMD.

use alloc::vec;
use alloc::vec::Vec;

use crate::error::{Error, Result};

/// Running softmax of one row: the largest score, the sum of `exp(score - m)`, and the values
/// weighted by the same.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftmaxState {
    /// Largest score; -inf before any key.
    pub m: f64,
    /// Sum of `exp(score - m)`.
    pub l: f64,
    /// Sum of `exp(score - m) * v`, a channel each.
    pub o: Vec<f64>,
}

impl SoftmaxState {
    /// The state over no keys, for values of `v_dim` channels.
    pub fn new(v_dim: usize) -> Self {
        Self { m: f64::NEG_INFINITY, l: 0.0, o: vec![0.0; v_dim] }
    }

    /// Adds one key's score and value. A score of -inf adds nothing.
    pub fn push(&mut self, score: f64, value: impl Iterator<Item = f64>) {
        let (old, new) = self.raise(score);
        if new == 0.0 {
            return;
        }
        self.l = self.l * old + new;
        for (o, v) in self.o.iter_mut().zip(value) {
            *o = *o * old + new * v;
        }
    }

    /// Adds the keys of another state. Both must have the same number of channels.
    pub fn merge(&mut self, other: &SoftmaxState) {
        let (old, new) = self.raise(other.m);
        if new == 0.0 {
            return;
        }
        self.l = self.l * old + other.l * new;
        for (o, v) in self.o.iter_mut().zip(&other.o) {
            *o = *o * old + new * v;
        }
    }

    /// Raises `m` to at least `m`; the factors for what is held and for what comes in.
    fn raise(&mut self, m: f64) -> (f64, f64) {
        if m == f64::NEG_INFINITY {
            return (1.0, 0.0);
        }
        let top = self.m.max(m);
        let factors = (libm::exp(self.m - top), libm::exp(m - top));
        self.m = top;
        factors
    }

    /// Output and LSE, with the logit of an attention sink if there is one. No key: zeros and -inf.
    pub fn finish(&self, sink: Option<f64>) -> (Vec<f64>, f64) {
        if self.m == f64::NEG_INFINITY {
            return (vec![0.0; self.o.len()], f64::NEG_INFINITY);
        }
        let top = sink.map_or(self.m, |sink| sink.max(self.m));
        let scale = libm::exp(self.m - top);
        let l = self.l * scale + sink.map_or(0.0, |sink| libm::exp(sink - top));
        (self.o.iter().map(|o| o * scale / l).collect(), top + libm::log(l))
    }
}

/// Merges normalised outputs over two disjoint key sets, row by row, into the first: `out` and
/// `other` hold `rows` rows of `v_dim`, `lse` and `other_lse` one value a row. A row of LSE -inf
/// holds nothing.
///
/// # Errors
/// `InvalidArgument` where the lengths do not fit together; nothing is changed then.
pub fn merge_states(
    out: &mut [f32],
    lse: &mut [f32],
    other: &[f32],
    other_lse: &[f32],
    v_dim: usize,
) -> Result<()> {
    let fits = lse.len().checked_mul(v_dim) == Some(out.len());
    if !fits || other.len() != out.len() || other_lse.len() != lse.len() {
        return Err(Error::invalid("out, lse", "must hold the same rows, v_dim channels each"));
    }
    for (row, (lse, &other_lse)) in lse.iter_mut().zip(other_lse).enumerate() {
        if other_lse == f32::NEG_INFINITY {
            continue;
        }
        let (a, b) = (f64::from(*lse), f64::from(other_lse));
        let top = a.max(b);
        let (wa, wb) = (libm::exp(a - top), libm::exp(b - top));
        let (sum, at) = (wa + wb, row * v_dim);
        for (o, &x) in out[at..at + v_dim].iter_mut().zip(&other[at..at + v_dim]) {
            // A weight of 0 stands for a row that holds nothing, whatever it contains.
            let kept = if wa == 0.0 { 0.0 } else { f64::from(*o) * wa };
            *o = ((kept + f64::from(x) * wb) / sum) as f32;
        }
        *lse = (top + libm::log(sum)) as f32;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_parts_is_the_same_as_one_pass() {
        let scores = [0.3, -2.0, 900.0, 899.5, f64::NEG_INFINITY, -900.0];
        let value = |i: usize| [i as f64, 1.0 - i as f64].into_iter();
        let mut whole = SoftmaxState::new(2);
        let mut parts = [SoftmaxState::new(2), SoftmaxState::new(2), SoftmaxState::new(2)];
        for (i, &score) in scores.iter().enumerate() {
            whole.push(score, value(i));
            parts[i / 3].push(score, value(i));
        }
        let mut merged = parts[2].clone();
        merged.merge(&parts[1]);
        merged.merge(&parts[0]);
        for sink in [None, Some(-5.0), Some(901.0)] {
            let (want, want_lse) = whole.finish(sink);
            let (got, got_lse) = merged.finish(sink);
            assert!((want_lse - got_lse).abs() < 1e-12);
            for (want, got) in want.iter().zip(&got) {
                assert!((want - got).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn nothing_seen_is_zero_and_minus_infinity() {
        let empty = SoftmaxState::new(3);
        assert_eq!(empty.finish(Some(4.0)), (vec![0.0; 3], f64::NEG_INFINITY));
        let (mut out, mut lse) = (vec![f32::NAN; 2], vec![f32::NEG_INFINITY]);
        merge_states(&mut out, &mut lse, &[3.0, 4.0], &[1.5], 2).unwrap();
        assert_eq!((out.as_slice(), lse[0]), ([3.0, 4.0].as_slice(), 1.5));
        merge_states(&mut out, &mut lse, &[f32::NAN; 2], &[f32::NEG_INFINITY], 2).unwrap();
        assert_eq!((out.as_slice(), lse[0]), ([3.0, 4.0].as_slice(), 1.5));
        assert!(merge_states(&mut out, &mut lse, &[0.0; 3], &[0.0], 2).is_err());
    }
}
