//! What the kernels that copy and zero blocks are given.

use super::{Any, In, Out};

device_struct! {
    /// Copies blocks of one pool to blocks of another (or the same), or fills blocks with zeros.
    ///
    /// A pool is one or more planes (an allocation of one layer, K or V of one layer), each with
    /// every block, all alike. In a plane a block is one or more runs. Whole blocks that lie in one
    /// piece are one run.
    CopyParams, "kvc_copy_params" {
        /// Block 0 of plane 0 of the pool that is read; not used for zeros.
        from: In<Any>,
        /// Block 0 of plane 0 of the pool that is written.
        to: Out<Any>,
        /// Address of block 0 of each plane, `[planes]`; null: `from_plane` bytes apart from `from`.
        from_planes: In<u64>,
        /// The same of the pool that is written.
        to_planes: In<u64>,
        /// `[count][2]` ids, from and to; for zeros `[count]` ids.
        list: In<Any>,
        /// Tokens of each entry, from the first of every run; null for whole runs.
        tokens: In<u32>,
        /// Raised (bit 0: an id outside its pool), or null.
        error_flag: Out<u32>,
        /// Bytes from a plane to the next.
        from_plane: i64,
        /// Bytes from a block to the next.
        from_block: i64,
        /// Bytes from a run of a block to the next.
        from_run: i64,
        /// Bytes from a plane to the next.
        to_plane: i64,
        /// Bytes from a block to the next.
        to_block: i64,
        /// Bytes from a run of a block to the next.
        to_run: i64,
        /// Entries of `list`.
        count: u32,
        /// 1 where ids are int64, 0 where they are int32.
        wide_ids: u32,
        /// Planes of a pool.
        planes: u32,
        /// Runs that a block has in a plane.
        runs: u32,
        /// Bytes of a run, a multiple of 16.
        run_bytes: u32,
        /// Bytes of a token in a run; only with `tokens`.
        token_bytes: u32,
        /// Blocks of the pool that is read.
        from_blocks: u32,
        /// Blocks of the pool that is written.
        to_blocks: u32,
        /// Slices of 4 KiB that a run is cut into; the launch fills it in.
        slices: u32,
        /// Entries times planes, runs and slices; the launch fills it in.
        items: u32,
    }
}
