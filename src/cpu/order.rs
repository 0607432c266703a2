//! The order of a call's units: sequence by sequence, but what neighbours begin with in common is
//! attended by all of them, one split after another, while it is in the processor's caches.
//!
//! Only the order is another then: a unit is the same work with the same result.

use super::plan::SeqCut;

/// What precedes a sequence in the batch.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Start {
    /// Units of attention (a cell and a split).
    pub units: u64,
    /// Units of merging (a cell of a sequence with several splits).
    pub merges: u64,
    /// f32s of waiting states.
    pub floats: u64,
    /// Sequences from this one on whose first splits are attended together, this one included; 0 for
    /// one that an earlier one leads.
    pub lead: u32,
    /// How many splits those are.
    pub together: u32,
}

impl Start {
    /// Before the first sequence.
    pub const FIRST: Start = Start { units: 0, merges: 0, floats: 0, lead: 1, together: 0 };

    /// Units that this sequence's place in the order has: those of all it leads in the splits that
    /// they are attended together, and its own in the others.
    pub fn units_here(&self, cut: &SeqCut) -> u64 {
        let together = u64::from(self.lead) * u64::from(self.together);
        cut.cells * (together + u64::from(cut.splits - self.together))
    }

    /// The unit `index` of [`units_here`](Self::units_here): how many sequences further on, its cell
    /// and its split. What several attend is walked by all of them before the next split.
    pub fn unit(&self, cut: &SeqCut, index: u64) -> (u32, u64, u32) {
        let (lead, together) = (u64::from(self.lead), u64::from(self.together));
        let shared = cut.cells * together * lead;
        if index < shared {
            let (member, index) = (index % lead, index / lead);
            return (member as u32, index / together, (index % together) as u32);
        }
        let (index, own) = (index - shared, u64::from(cut.splits) - together);
        (0, index / own, (together + index % own) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Cut;
    use super::*;
    use crate::attention::HeadShape;

    #[test]
    fn every_unit_has_one_place_in_the_order() {
        let shape = HeadShape { q_heads: 32, kv_heads: 8, k_dim: 64, v_dim: 64, v_in_k: false };
        let cut = Cut::new(&shape);
        for (lens, tokens) in [
            (&[9000u32, 9100, 8800][..], 8192),
            (&[9000, 9000], 9000),
            (&[700], 600),
            (&[3000, 600, 513, 2000], 512),
            (&[40, 40], 32),
        ] {
            let cuts: Vec<_> = lens.iter().map(|&len| cut.sequence(1, 0, len)).collect();
            let least = cuts.iter().map(|other| cuts[0].common_splits(other, tokens)).min();
            let together = if lens.len() > 1 { least.unwrap() } else { 0 };
            assert!(cuts.iter().all(|cut| together < cut.splits));
            let mut seen: Vec<_> = cuts
                .iter()
                .map(|cut| vec![0; (cut.cells * u64::from(cut.splits)) as usize])
                .collect();
            for (s, cut) in cuts.iter().enumerate() {
                let lead = if together == 0 {
                    1
                } else if s == 0 {
                    lens.len() as u32
                } else {
                    0
                };
                let start = Start { lead, together, ..Start::FIRST };
                for index in 0..start.units_here(cut) {
                    let (member, cell, split) = start.unit(cut, index);
                    let of = s + member as usize;
                    seen[of][(cell * u64::from(cuts[of].splits)) as usize + split as usize] += 1;
                }
            }
            assert!(seen.iter().flatten().all(|&n| n == 1), "{lens:?}");
        }
        // Other splits, and query rows for the other kernel.
        let long = cut.sequence(1, 0, 100_000);
        assert_eq!(long.common_splits(&cut.sequence(1, 0, 9000), 8192), 0);
        let prefill = cut.sequence(200, 0, 9000);
        assert_eq!(prefill.common_splits(&prefill, 8192), 0);
    }
}
