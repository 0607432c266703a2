//! How many blocks of a decode kernel a multiprocessor holds at a time, and how deep their pipelines
//! are. What a stage takes is the kernels' own.

/// Shared memory of a multiprocessor of sm_90, in bytes.
pub const SM90_SHARED_BYTES: u32 = 228 * 1024;
/// What the device keeps of a multiprocessor's shared memory for each block.
pub(super) const RESERVED_BYTES: u32 = 1024;

/// The stages of a block's pipeline, and how many such blocks a multiprocessor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Residence {
    pub stages: u32,
    pub blocks: u32,
    pub shared_bytes: u32,
    /// Where a kernel over codes has its queries; 0 for others.
    pub query_at: u32,
}

impl Residence {
    /// The one with the most stages under way, then the most blocks.
    pub fn most_under_way(all: impl Iterator<Item = Self>) -> Option<Self> {
        all.filter(|r| r.blocks > 0).max_by_key(|r| (r.blocks * (r.stages - 1), r.blocks))
    }
}
