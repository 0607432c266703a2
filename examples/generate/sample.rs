//! Choosing the next token: the most likely one, or a draw at a temperature.

pub struct Sampler {
    temperature: f32,
    state: u64,
}

impl Sampler {
    /// Temperature 0 is greedy and needs no seed.
    pub fn new(temperature: f32, seed: u64) -> Self {
        Self { temperature, state: seed }
    }

    pub fn pick(&mut self, logits: &[f32]) -> u32 {
        if self.temperature == 0.0 {
            return argmax(logits);
        }
        let max = logits[argmax(logits) as usize];
        let weight = |logit: f32| f64::from((logit - max) / self.temperature).exp();
        let mut left =
            logits.iter().map(|&logit| weight(logit)).sum::<f64>() * uniform(&mut self.state);
        let drawn = logits.iter().position(|&logit| {
            left -= f64::from((logit - max) / self.temperature).exp();
            left < 0.0
        });
        drawn.map_or(argmax(logits), |token| token as u32)
    }
}

/// The first of the largest.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// SplitMix64, in [0, 1).
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}
