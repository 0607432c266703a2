//! Seeded random numbers for tests: the same on every machine.

/// SplitMix64.
pub struct Rng(u64);

#[allow(dead_code, reason = "each test uses some of it")]
impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Roughly normal: mean 0, variance 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..6).map(|_| self.next() as f64 / u64::MAX as f64 - 0.5).sum();
        (sum * std::f64::consts::SQRT_2) as f32
    }
}
