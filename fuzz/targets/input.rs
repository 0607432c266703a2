//! A fuzzer's bytes as a program: small numbers mostly, wild ones now and then.

pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte; 0 past the end.
    pub fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    /// Below `n`, at most 256.
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.byte()) % n
    }

    /// True one time in 16.
    pub fn seldom(&mut self) -> bool {
        self.byte() >= 240
    }

    /// Small, or one of the numbers that break arithmetic.
    pub fn number(&mut self) -> u64 {
        match self.byte() {
            small @ 0..=239 => u64::from(small) % 40,
            wild => {
                let edges = [
                    0,
                    1 << 15,
                    1 << 16,
                    (1 << 31) - 1,
                    1 << 31,
                    u64::from(u32::MAX),
                    1 << 32,
                    1 << 62,
                    u64::MAX / 16,
                    u64::MAX,
                ];
                edges[usize::from(wild) % edges.len()]
            }
        }
    }

    pub fn number32(&mut self) -> u32 {
        self.number() as u32
    }

    /// Token ids that often agree with each other.
    pub fn tokens(&mut self, most: usize) -> Vec<u32> {
        let count = self.below(most + 1);
        // A cache refuses those past 2^31, the whole prompt with them.
        let last = if self.seldom() { u32::MAX } else { (1 << 31) - 1 };
        (0..count).map(|_| [0, 0, 0, 1, 2, last][self.below(6)]).collect()
    }
}
