//! The part of a model that one cache holds: some of its layers (pipeline parallel), some of its KV
//! heads (tensor parallel), or both.
//!
//! A cache of a part is an ordinary cache of a smaller geometry; the slice says where in the model
//! that geometry lies, so that stored objects and streams of it are never taken for another part.

use alloc::vec::Vec;

use super::{CacheSpec, GroupSpec};
use crate::error::{Error, Result};

/// The layers and KV heads of one layer group that a cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupSlice {
    /// First layer, counted within the group of the whole model.
    pub first_layer: u32,
    /// Layers held.
    pub layers: u32,
    /// First KV head.
    pub first_head: u32,
    /// KV heads held.
    pub heads: u32,
}

impl GroupSlice {
    /// All of a group.
    pub const fn whole(group: &GroupSpec) -> Self {
        Self { first_layer: 0, layers: group.layers, first_head: 0, heads: group.kv_heads }
    }
}

/// The part of a model that a cache holds: one entry for each of its layer groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// One for each layer group of the whole model.
    pub groups: Vec<GroupSlice>,
}

impl Slice {
    /// The whole model.
    pub fn whole(spec: &CacheSpec) -> Self {
        Self { groups: spec.groups.iter().map(GroupSlice::whole).collect() }
    }

    /// The KV heads of rank `rank` of `ranks` tensor-parallel ranks. Where there are fewer heads
    /// than ranks (multi-query, latent attention), neighbouring ranks hold the same head, and so
    /// the same objects.
    ///
    /// # Errors
    /// `InvalidArgument` for a rank that is none, and where heads and ranks do not divide.
    pub fn tensor_parallel(spec: &CacheSpec, rank: u32, ranks: u32) -> Result<Self> {
        if rank >= ranks {
            return Err(Error::invalid("rank", "must be below the number of ranks"));
        }
        let part = |group: &GroupSpec| {
            let heads = group.kv_heads;
            let whole = GroupSlice::whole(group);
            if heads.is_multiple_of(ranks) {
                let each = heads / ranks;
                Ok(GroupSlice { first_head: rank * each, heads: each, ..whole })
            } else if heads > 0 && ranks.is_multiple_of(heads) {
                Ok(GroupSlice { first_head: rank / (ranks / heads), heads: 1, ..whole })
            } else {
                Err(Error::invalid("ranks", "must divide the KV heads, or be divided by them"))
            }
        };
        Ok(Self { groups: spec.groups.iter().map(part).collect::<Result<_>>()? })
    }

    /// The layers of stage `stage` of `stages` pipeline stages: of each group an even share, the
    /// first stages one more where it does not divide.
    ///
    /// # Errors
    /// `InvalidArgument` for a stage that is none, and for more stages than a group has layers.
    pub fn pipeline(spec: &CacheSpec, stage: u32, stages: u32) -> Result<Self> {
        if stage >= stages {
            return Err(Error::invalid("stage", "must be below the number of stages"));
        }
        let part = |group: &GroupSpec| {
            let (each, more) = (group.layers / stages, group.layers % stages);
            if each == 0 {
                return Err(Error::invalid("stages", "must be at most the layers of each group"));
            }
            let first_layer = stage * each + stage.min(more);
            let layers = each + u32::from(stage < more);
            Ok(GroupSlice { first_layer, layers, ..GroupSlice::whole(group) })
        };
        Ok(Self { groups: spec.groups.iter().map(part).collect::<Result<_>>()? })
    }

    /// Checks that it lies within a model.
    ///
    /// # Errors
    /// `InvalidArgument` where it does not, or has no layer or head.
    pub fn check(&self, model: &CacheSpec) -> Result<()> {
        let within = |first: u32, count: u32, all: u32| {
            count > 0 && first.checked_add(count).is_some_and(|end| end <= all)
        };
        let fits = self.groups.len() == model.groups.len()
            && self.groups.iter().zip(&model.groups).all(|(part, group)| {
                within(part.first_layer, part.layers, group.layers)
                    && within(part.first_head, part.heads, group.kv_heads)
            });
        if fits { Ok(()) } else { Err(Error::invalid("slice", "must lie within the model")) }
    }
}

impl CacheSpec {
    /// The geometry of a cache that holds a part of the model that `self` describes.
    ///
    /// # Errors
    /// `InvalidArgument` for a slice that does not lie within it.
    pub fn slice(&self, slice: &Slice) -> Result<CacheSpec> {
        slice.check(self)?;
        let part = |(group, part): (&GroupSpec, &GroupSlice)| GroupSpec {
            layers: part.layers,
            kv_heads: part.heads,
            ..group.clone()
        };
        let groups = self.groups.iter().zip(&slice.groups).map(part).collect();
        Ok(CacheSpec { block_tokens: self.block_tokens, groups })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::KvFormat;

    fn model() -> CacheSpec {
        CacheSpec::uniform(16, GroupSpec::uniform(7, 4, 64, KvFormat::F16))
    }

    #[test]
    fn ranks_and_stages_cover_a_model_once() {
        for ranks in [1, 2, 4] {
            let mut next = 0;
            for rank in 0..ranks {
                let part = Slice::tensor_parallel(&model(), rank, ranks).unwrap();
                assert_eq!(part.groups[0].first_head, next);
                next += part.groups[0].heads;
                assert_eq!(model().slice(&part).unwrap().groups[0].kv_heads, 4 / ranks);
            }
            assert_eq!(next, 4);
        }
        for stages in [1, 2, 3, 7] {
            let mut next = 0;
            for stage in 0..stages {
                let part = Slice::pipeline(&model(), stage, stages).unwrap();
                assert_eq!(part.groups[0].first_layer, next);
                next += part.groups[0].layers;
            }
            assert_eq!(next, 7);
        }
    }

    #[test]
    fn heads_are_shared_where_there_are_too_few() {
        let heads = |rank| Slice::tensor_parallel(&model(), rank, 8).unwrap().groups[0].first_head;
        assert_eq!([0, 1, 2, 7].map(heads), [0, 0, 1, 3]);
    }

    #[test]
    fn what_is_no_part_is_refused() {
        assert!(Slice::tensor_parallel(&model(), 2, 2).is_err());
        assert!(Slice::tensor_parallel(&model(), 0, 3).is_err());
        assert!(Slice::tensor_parallel(&model(), 0, 0).is_err());
        assert!(Slice::pipeline(&model(), 0, 8).is_err());
        let mut part = Slice::whole(&model());
        part.groups[0].first_head = u32::MAX;
        assert!(model().slice(&part).is_err());
        part.groups.clear();
        assert!(model().slice(&part).is_err());
    }
}
