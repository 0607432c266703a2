//! What the append kernel is given.

use super::{Any, In, Out};

device_struct! {
    /// Append: scatters the K and V rows of new tokens to cache slots, K and Q optionally rotated.
    AppendParams, "kvc_append_params" {
        /// New keys: row of token 0, head 0.
        k: In<Any>,
        /// New values, likewise; null where values lie in keys.
        v: In<Any>,
        /// Queries, likewise, rows of `k_dim`; null to leave them alone.
        q: In<Any>,
        /// Rotated queries; must not overlap `q`.
        q_out: Out<Any>,
        /// Keys of block 0, head 0, token 0.
        k_cache: Out<Any>,
        /// Values of block 0, head 0, token 0.
        v_cache: Out<Any>,
        /// Slot of each token: block * block_tokens + offset, or negative to skip the token, whose rows may
        /// be read all the same.
        slots: In<i64>,
        /// Position of each token; read only with a rotation.
        positions: In<u32>,
        /// Cosines `[rope_positions][rope_dim / 2]`; null for no rotation.
        cosines: In<f32>,
        /// Sines of the same shape.
        sines: In<f32>,
        /// Raised (bit 0: a slot past the pool, bit 1: a position past the tables), or null.
        error_flag: Out<u32>,
        /// Elements from a token to the next in `k`.
        k_token: i64,
        /// Elements from a head to the next in `k`.
        k_head: i64,
        /// Elements from a token to the next in `v`.
        v_token: i64,
        /// Elements from a head to the next in `v`.
        v_head: i64,
        /// Elements from a token to the next in `q`.
        q_token: i64,
        /// Elements from a head to the next in `q`.
        q_head: i64,
        /// Elements from a token to the next in `q_out`.
        q_out_token: i64,
        /// Elements from a head to the next in `q_out`.
        q_out_head: i64,
        /// Elements from a block to the next in `k_cache`.
        k_cache_block: i64,
        /// Elements from a head to the next in `k_cache`.
        k_cache_head: i64,
        /// Elements from a token to the next in `k_cache`.
        k_cache_token: i64,
        /// Elements from a block to the next in `v_cache`.
        v_cache_block: i64,
        /// Elements from a head to the next in `v_cache`.
        v_cache_head: i64,
        /// Elements from a token to the next in `v_cache`.
        v_cache_token: i64,
        /// Tokens of the call.
        tokens: u32,
        /// Tokens that one thread block takes, a power of two.
        tokens_per_block: u32,
        /// Query heads; 0 without `q`.
        q_heads: u32,
        /// KV heads.
        kv_heads: u32,
        /// Channels of a key, a multiple of 8.
        k_dim: u32,
        /// Channels of a value, a multiple of 8; 0 where values lie in keys.
        v_dim: u32,
        /// Tokens of a cache block.
        block_tokens: u32,
        /// Blocks that exist.
        num_blocks: u32,
        /// First channel that rotates, a multiple of 8.
        rope_first: u32,
        /// Channels that rotate, even.
        rope_dim: u32,
        /// Rows of the tables.
        rope_positions: u32,
        /// 0: channel i pairs with i + rope_dim / 2; 1: 2i pairs with 2i + 1.
        rope_interleaved: u32,
        /// Type id of the new rows and of `q_out`.
        row_dtype: u32,
        /// Type id of the cache.
        cache_dtype: u32,
    }
}
