//! What the kernels that mirror a prefix index on the device and look up in it are given.

use alloc::string::String;

use super::{CType, DeviceStruct, In, Out};

device_struct! {
    /// A run of words to write into the image of a prefix index.
    LookupPatch, "kvc_lookup_patch_run" {
        /// First word of the image that is written.
        to: i64,
        /// First word of the uploaded ones.
        from: u32,
        /// How many, at most 1,024.
        words: u32,
    }
}

device_struct! {
    /// Writes uploaded words to their places in the image of a prefix index.
    LookupPatchParams, "kvc_lookup_patch_params" {
        /// `[count]` runs, no two of which overlap.
        patches: In<LookupPatch>,
        /// The uploaded words.
        words: In<u32>,
        /// The image.
        image: Out<u32>,
        /// Raised (bit 4: a run outside the image or the uploaded words), or null.
        error_flag: Out<u32>,
        /// Words of the image.
        image_words: i64,
        /// How many words were uploaded.
        uploaded: u32,
        /// Runs.
        count: u32,
    }
}

device_struct! {
    /// Looks up a batch of token sequences in the image of a prefix index.
    LookupParams, "kvc_lookup_params" {
        /// The image's head: how much of each part is in use, and the seeds of its tables.
        head: In<u32>,
        /// The nodes, 8 words each.
        nodes: In<u32>,
        /// The table of branches, 2 words a place.
        branches: In<u32>,
        /// The table of namespaces, likewise.
        spaces: In<u32>,
        /// Tokens of every slot.
        slot_tokens: In<u32>,
        /// Block ids of every slot.
        slot_ids: In<u32>,
        /// Tokens of all requests.
        tokens: In<u32>,
        /// Where the tokens of each request begin, `[requests + 1]`.
        indptr: In<i32>,
        /// Namespace of each request; null where all are in namespace 0.
        namespaces: In<u64>,
        /// Tokens of each request that whole cached blocks cover.
        matched: Out<u32>,
        /// Their block ids, `[block][group]`, in rows of `block_stride`.
        blocks: Out<i32>,
        /// How many tokens after those agree with one more cached block, or null.
        tail_tokens: Out<u32>,
        /// The ids of that block, `[requests][groups]`, -1 where there is none; or null.
        tail_blocks: Out<i32>,
        /// Raised (bit 1: row offsets that do not ascend, bit 4: an image that is not whole; the
        /// request then matches no further), or null.
        error_flag: Out<u32>,
        /// Ids from a request to the next in `blocks`.
        block_stride: i64,
        /// Requests.
        requests: u32,
        /// The most blocks that a request matches.
        max_blocks: u32,
        /// Tokens at the end of each request that are not looked up.
        leave: u32,
        /// Tokens of a block.
        block_tokens: u32,
        /// Ids of a block.
        groups: u32,
        /// Nodes that the image has room for.
        node_room: u32,
        /// Places of the table of branches that it has room for.
        branch_room: u32,
        /// Places of the table of namespaces that it has room for.
        space_room: u32,
        /// Slots that it has room for.
        slot_room: u32,
        /// Keeps the size a multiple of 8. Zero.
        reserved: u32,
    }
}

impl CType for LookupPatch {
    fn declare(field: &str) -> String {
        alloc::format!("{} {field}", Self::C_NAME)
    }
}
