//! Rotary position embedding (Su et al., 2021): pairs of channels of Q and K turned by an angle
//! that grows with the position.
//!
//! Angles are computed in f64, so that they are right at a million tokens, where f32 has lost all
//! but a few bits of the fast-turning pairs. Knows rows and positions, nothing of caches.

use alloc::vec::Vec;

use crate::error::{Error, Result};
use crate::layout::MAX_HEAD_DIM;

/// The most pairs of a row.
pub const MAX_ROPE_PAIRS: usize = 128;

/// Which channels form a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RopeStyle {
    /// Channel `i` with `i + pairs`: Llama in Hugging Face's layout, GPT-NeoX, Qwen, Mistral.
    Halves = 1,
    /// Channel `2 i` with `2 i + 1`: the paper's layout, GPT-J, DeepSeek.
    Interleaved = 2,
}

/// Frequencies and layout of one model's rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    style: RopeStyle,
    first_channel: u32,
    pairs: u32,
    scale: f32,
    frequencies: [f64; MAX_ROPE_PAIRS],
}

impl Rope {
    /// `rotary_dim` channels from the first on, pair `i` turning by `theta^(-2 i / rotary_dim)` a
    /// token.
    ///
    /// # Errors
    /// `InvalidArgument` for an odd `rotary_dim`, one of 0 or past 256, or a `theta` that is not
    /// above 1 and finite.
    pub fn new(style: RopeStyle, rotary_dim: u32, theta: f32) -> Result<Self> {
        if !(theta > 1.0 && theta.is_finite()) {
            return Err(Error::invalid("theta", "must be above 1 and finite"));
        }
        if rotary_dim == 0
            || !rotary_dim.is_multiple_of(2)
            || rotary_dim as usize > 2 * MAX_ROPE_PAIRS
        {
            return Err(Error::invalid("rotary_dim", "must be even, 2 to 256"));
        }
        let mut frequencies = [0.0; MAX_ROPE_PAIRS];
        for (i, f) in frequencies.iter_mut().enumerate().take(rotary_dim as usize / 2) {
            *f = libm::pow(f64::from(theta), -2.0 * i as f64 / f64::from(rotary_dim));
        }
        Ok(Self { style, first_channel: 0, pairs: rotary_dim / 2, scale: 1.0, frequencies })
    }

    /// Frequencies as the model gives them, in radians a token: what long-context scalings such as
    /// Llama 3's and YaRN come down to.
    ///
    /// # Errors
    /// `InvalidArgument` for none, more than 128, or one that is not finite.
    pub fn from_frequencies(style: RopeStyle, radians_per_token: &[f32]) -> Result<Self> {
        let pairs = radians_per_token.len();
        if pairs == 0 || pairs > MAX_ROPE_PAIRS {
            return Err(Error::invalid("frequencies", "must be 1 to 128"));
        }
        if !radians_per_token.iter().all(|f| f.is_finite()) {
            return Err(Error::invalid("frequencies", "must be finite"));
        }
        let mut frequencies = [0.0; MAX_ROPE_PAIRS];
        frequencies.iter_mut().zip(radians_per_token).for_each(|(to, &f)| *to = f64::from(f));
        Ok(Self { style, first_channel: 0, pairs: pairs as u32, scale: 1.0, frequencies })
    }

    /// Starts at `channel` instead of the first (512 for the latent rows of DeepSeek).
    pub fn from_channel(self, channel: u32) -> Self {
        Self { first_channel: channel, ..self }
    }

    /// Multiplies rotated channels by `scale` (YaRN's attention factor).
    pub fn scaled(self, scale: f32) -> Self {
        Self { scale, ..self }
    }

    /// Rotates rows in place: `rows` is `[positions][heads][head_dim]`, any number of heads.
    ///
    /// # Errors
    /// `InvalidArgument` where the length does not fit, or a head has fewer channels than are
    /// rotated.
    pub fn rotate(&self, rows: &mut [f32], head_dim: u32, positions: &[u32]) -> Result<()> {
        self.check(head_dim)?;
        let fits = rows.len().is_multiple_of(positions.len().max(1) * head_dim as usize);
        if !fits || positions.is_empty() != rows.is_empty() {
            return Err(Error::invalid("rows", "must be [positions][heads][head_dim]"));
        }
        let token = rows.len() / positions.len().max(1);
        let mut turn = [(0.0, 0.0); MAX_ROPE_PAIRS];
        for (row, &position) in rows.chunks_exact_mut(token.max(1)).zip(positions) {
            let turn = self.turn(position, &mut turn);
            for head in row.chunks_exact_mut(head_dim as usize) {
                self.rotate_head(head, turn);
            }
        }
        Ok(())
    }

    /// Which channels form a pair.
    pub fn style(&self) -> RopeStyle {
        self.style
    }

    /// The first channel that is rotated, and how many are.
    pub fn channels(&self) -> (u32, u32) {
        (self.first_channel, 2 * self.pairs)
    }

    /// Cosines and sines `[positions][pairs]`, the scale included: what kernels with tables read.
    pub fn tables(&self, positions: &[u32]) -> (Vec<f32>, Vec<f32>) {
        let mut turn = [(0.0, 0.0); MAX_ROPE_PAIRS];
        let count = positions.len() * self.pairs as usize;
        let (mut cosines, mut sines) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for &position in positions {
            for &(cos, sin) in self.turn(position, &mut turn) {
                cosines.push(cos);
                sines.push(sin);
            }
        }
        (cosines, sines)
    }

    /// Whether rows of `dim` channels have those that are rotated.
    pub(crate) fn check(&self, dim: u32) -> Result<()> {
        let end = self.first_channel.checked_add(2 * self.pairs);
        if dim == 0 || dim > MAX_HEAD_DIM || end.is_none_or(|end| end > dim) {
            return Err(Error::invalid("rope", "rotates channels that the rows do not have"));
        }
        Ok(())
    }

    /// Cosine and sine of each pair at a position.
    pub(super) fn turn<'a>(
        &self,
        position: u32,
        buffer: &'a mut [(f32, f32); MAX_ROPE_PAIRS],
    ) -> &'a [(f32, f32)] {
        let pairs = self.pairs as usize;
        for (to, frequency) in buffer.iter_mut().zip(&self.frequencies[..pairs]) {
            let (sin, cos) = libm::sincos(f64::from(position) * frequency);
            *to = (cos as f32 * self.scale, sin as f32 * self.scale);
        }
        &buffer[..pairs]
    }

    /// Turns the pairs of one head; `head` was checked to have them.
    pub(super) fn rotate_head(&self, head: &mut [f32], turn: &[(f32, f32)]) {
        let pairs = turn.len();
        let channels = &mut head[self.first_channel as usize..][..2 * pairs];
        match self.style {
            RopeStyle::Halves => {
                let (left, right) = channels.split_at_mut(pairs);
                for ((a, b), &(cos, sin)) in left.iter_mut().zip(right).zip(turn) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
            RopeStyle::Interleaved => {
                for (pair, &(cos, sin)) in channels.chunks_exact_mut(2).zip(turn) {
                    let (a, b) = (pair[0], pair[1]);
                    (pair[0], pair[1]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_turn_pairs_by_the_papers_angle() {
        let rows: Vec<f32> = (0..16).map(|i| (i as f32 * 0.7).sin()).collect();
        let positions = [3u32, 1_000_003];
        for style in [RopeStyle::Halves, RopeStyle::Interleaved] {
            let rope = Rope::new(style, 8, 10_000.0).unwrap();
            let mut turned = rows.clone();
            rope.rotate(&mut turned, 8, &positions).unwrap();
            for (n, &position) in positions.iter().enumerate() {
                for i in 0..4 {
                    let (x, y) = match style {
                        RopeStyle::Halves => (n * 8 + i, n * 8 + i + 4),
                        RopeStyle::Interleaved => (n * 8 + 2 * i, n * 8 + 2 * i + 1),
                    };
                    let angle = f64::from(position) * 10_000f64.powf(-2.0 * i as f64 / 8.0);
                    let (a, b) = (f64::from(rows[x]), f64::from(rows[y]));
                    let want =
                        [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()];
                    for (at, want) in [x, y].into_iter().zip(want) {
                        let error = (f64::from(turned[at]) - want).abs();
                        assert!(error <= 3e-7, "{style:?} {position} {i}: off by {error}");
                    }
                }
            }
        }
    }

    #[test]
    fn only_the_rotary_channels_change() {
        let rope =
            Rope::new(RopeStyle::Interleaved, 64, 1e6).unwrap().from_channel(512).scaled(2.0);
        let mut rows = [1.0f32; 576];
        rope.rotate(&mut rows, 576, &[0]).unwrap();
        assert!(rows[..512].iter().all(|&x| x == 1.0) && rows[512..].iter().all(|&x| x == 2.0));
        assert!(rope.rotate(&mut rows[..512], 512, &[0]).is_err());
        assert!(rope.rotate(&mut rows[..500], 576, &[0]).is_err());
        assert!(rope.rotate(&mut rows, 576, &[]).is_err());
        assert!(rope.rotate(&mut [], 576, &[]).is_ok());
    }

    #[test]
    fn impossible_parameters_are_refused() {
        for dim in [0, 7, 258, u32::MAX] {
            assert!(Rope::new(RopeStyle::Halves, dim, 1e4).is_err());
        }
        for theta in [1.0, 0.0, -5.0, f32::NAN, f32::INFINITY] {
            assert!(Rope::new(RopeStyle::Halves, 64, theta).is_err());
        }
        assert!(Rope::from_frequencies(RopeStyle::Halves, &[]).is_err());
        assert!(Rope::from_frequencies(RopeStyle::Halves, &[0.0; 129]).is_err());
        assert!(Rope::from_frequencies(RopeStyle::Halves, &[f32::NAN]).is_err());
    }
}
