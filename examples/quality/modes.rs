//! Outliers and offsets as real models have them, put into a model that has few: each change of K
//! is undone in Q, each of V in the output, so that the f32 model computes the same.

use std::error::Error;

/// What is done to K and V before they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nothing.
    Natural,
    /// Four rotary pairs of each head 10 to 30 times larger in K and smaller in Q, six channels of
    /// V 2 to 6 times larger.
    Outliers,
    /// A constant of 10 to 30 times a channel's spread added to six channels of K after rotation: it
    /// moves all scores of a query alike, which softmax does not see.
    Offsets,
}

impl Mode {
    pub const ALL: [Mode; 3] = [Mode::Natural, Mode::Outliers, Mode::Offsets];

    pub fn name(self) -> &'static str {
        match self {
            Mode::Natural => "natural",
            Mode::Outliers => "outliers",
            Mode::Offsets => "offsets",
        }
    }

    pub fn from_name(name: &str) -> Result<Self, Box<dyn Error>> {
        let found = Self::ALL.into_iter().find(|mode| mode.name() == name);
        found.ok_or_else(|| format!("no mode is called {name}").into())
    }

    /// The factors and offsets of one layer and KV head, which depend on nothing else: a model has
    /// the same outliers in every text.
    pub fn change(self, layer: usize, head: usize, dim: usize) -> Change {
        let mut change =
            Change { k_scale: vec![1.0; dim], k_offset: vec![0.0; dim], v_scale: vec![1.0; dim] };
        // Channels that differ from head to head, never twice the same in one.
        let pick = |n: usize, of: usize| (7 * layer + 13 * head + n * (of / 6 - 1) + 3) % of;
        match self {
            Mode::Natural => {}
            Mode::Outliers => {
                for n in 0..4 {
                    let (pair, scale) = (pick(n, dim / 2), 10.0 + 20.0 * n as f32 / 3.0);
                    change.k_scale[pair] = scale;
                    change.k_scale[pair + dim / 2] = scale;
                }
                for n in 0..6 {
                    change.v_scale[pick(n, dim)] = 2.0 + 0.8 * n as f32;
                }
            }
            Mode::Offsets => {
                for n in 0..6 {
                    let sign = if n % 2 == 0 { K_SPREAD } else { -K_SPREAD };
                    change.k_offset[pick(n, dim)] = sign * (10.0 + 4.0 * n as f32);
                }
            }
        }
        change
    }
}

/// About the spread of a key channel over a text: root mean square of the channels' deviations, all
/// layers and heads of the model. It grows with the text: 1.46 over 128 tokens, 1.84 over 1024, 2.26
/// over 4096. Every run compares it with what it measures.
pub const K_SPREAD: f32 = 1.6;

/// Factors and offsets by channel: K is stored as `k * k_scale + k_offset`, V as `v * v_scale`.
pub struct Change {
    pub k_scale: Vec<f32>,
    pub k_offset: Vec<f32>,
    pub v_scale: Vec<f32>,
}
