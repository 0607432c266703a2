//! One step of the engine: which sequences get which new tokens, and the ragged batch that all
//! layers of that step share. Built once by `begin`, read by every `append` and `attend`.

use alloc::vec::Vec;

use crate::cpu::{AttendBatch, RawRows};
use crate::device::DeviceBatch;
use crate::ids::{SeqId, TokenId};

/// New tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    /// A live sequence, at most once in a step.
    pub seq: SeqId,
    /// The tokens to append: a chunk of its prompt, or what was sampled last. At least one.
    pub tokens: &'a [TokenId],
}

/// A reusable plan of one step. Belongs to the cache that opened it; reusing it keeps its buffers.
#[derive(Debug, Default)]
pub struct Step {
    /// The cache that has it open.
    pub(super) owner: Option<u64>,
    pub(super) seqs: Vec<SeqId>,
    pub(super) tokens: Vec<TokenId>,
    /// Position of each new token in its sequence.
    pub(super) positions: Vec<u32>,
    /// Where the rows of each sequence begin, and one past the last.
    pub(super) q_indptr: Vec<i32>,
    /// Tokens of each sequence, the new ones included.
    pub(super) kv_lens: Vec<i32>,
    pub(super) groups: Vec<GroupTables>,
    /// The same tables where the kernels of a device read them.
    pub(super) device: DeviceBatch,
}

/// Block tables of the step's sequences in one layer group, as the kernels read them.
#[derive(Debug, Default)]
pub(super) struct GroupTables {
    pub indptr: Vec<i32>,
    pub indices: Vec<i32>,
    /// Where each new token goes: `block * block_tokens + offset`.
    pub slots: Vec<i64>,
    /// Raw rows, where the format has sealed tiles.
    pub raw: RawRows,
    /// For each tile that the step fills: the sequence's place in the step, and the tile.
    pub filled: Vec<(usize, usize)>,
}

impl Step {
    /// An empty step.
    pub fn new() -> Self {
        Self::default()
    }

    /// New tokens of all sequences: the rows that `append` and `attend` expect.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Position of each row in its sequence, for engines that rotate Q and K themselves.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// The last row of each sequence, in the order of the work: where next-token logits come from.
    pub fn last_rows(&self) -> impl Iterator<Item = usize> + '_ {
        self.q_indptr.iter().skip(1).map(|&end| end as usize - 1)
    }

    /// The step's batch in a layer group.
    pub(super) fn batch(&self, group: usize) -> (AttendBatch<'_>, &RawRows) {
        let GroupTables { indptr, indices, raw, .. } = &self.groups[group];
        let (q_indptr, kv_lens) = (&self.q_indptr, &self.kv_lens);
        (AttendBatch { q_indptr, kv_lens, indptr, indices }, raw)
    }

    /// Whether a cache has it open.
    pub fn is_open(&self) -> bool {
        self.owner.is_some()
    }

    /// Closes and empties it, keeping the buffers.
    pub(super) fn clear(&mut self) {
        self.owner = None;
        self.seqs.clear();
        self.tokens.clear();
        self.positions.clear();
        self.q_indptr.clear();
        self.kv_lens.clear();
        for group in &mut self.groups {
            group.indptr.clear();
            group.indices.clear();
            group.slots.clear();
            group.raw.clear();
            group.filled.clear();
        }
    }
}
