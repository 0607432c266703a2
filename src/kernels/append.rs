//! How an append is launched: a power of two of a block's threads for each token.

use super::Launch;
use super::params::AppendParams;
use crate::dtype::DType;
use crate::error::{Error, Result};

kernels! {
    APPEND = "kvc_append", "kvc_append_params", THREADS;
    PLAIN = "kvc_append_plain", "kvc_append_params", THREADS;
}

/// Threads of a block.
const THREADS: u32 = 256;
/// Chunks of 8 channels that a thread should have: their loads are under way together.
const CHUNKS_PER_THREAD: u32 = 4;
/// Threads of a launch below which a token gets more of them.
const MANY_THREADS: u64 = 1 << 16;

/// Fills `tokens_per_block` and gives the launch; `None` where there is nothing to do.
///
/// # Errors
/// `InvalidArgument` where a dimension of `params` is outside what its field documents.
pub fn append_launch(params: &mut AppendParams) -> Result<Option<Launch>> {
    let p = params;
    check_append(p, 8)?;
    if p.tokens == 0 {
        return Ok(None);
    }
    p.tokens_per_block = THREADS / token_threads(p);
    let blocks = p.tokens.div_ceil(p.tokens_per_block);
    if blocks > i32::MAX as u32 {
        return Err(Error::Overflow { what: "blocks of an append" });
    }
    let kernel = if is_copy(p) { &PLAIN } else { &APPEND };
    Ok(Some(Launch { kernel, grid: [blocks, 1, 1], shared_bytes: 0 }))
}

/// Whether 16-bit keys and values, and nothing else, go where they are stored as they are.
fn is_copy(p: &AppendParams) -> bool {
    let halves = [DType::F16.id(), DType::Bf16.id()];
    let same = p.row_dtype == p.cache_dtype && halves.contains(&p.row_dtype);
    same && p.cosines.0 == 0 && p.q_heads == 0
}

/// The threads of a token: a power of two, of which every column of its rows has one.
fn token_threads(p: &AppendParams) -> u32 {
    // Of a row whose halves turn a thread has two chunks.
    let halves = p.cosines.0 != 0 && p.rope_interleaved == 0;
    let paired = if halves { p.rope_dim / 16 } else { 0 };
    let chunks = (p.q_heads + p.kv_heads) * (p.k_dim / 8 - paired) + p.kv_heads * (p.v_dim / 8);
    let columns = (p.k_dim.max(p.v_dim) / 8).next_power_of_two();
    let many = chunks.next_power_of_two().clamp(columns, THREADS);
    let enough = (chunks / CHUNKS_PER_THREAD).max(1).ilog2();
    let mut threads = (1 << enough.min(THREADS.ilog2())).clamp(columns, many);
    while threads < many && u64::from(p.tokens) * u64::from(threads) < MANY_THREADS {
        threads *= 2;
    }
    threads
}

/// What an append kernel takes for granted; strides of the caches are multiples of `cache_chunk`.
pub(super) fn check_append(p: &AppendParams, cache_chunk: i64) -> Result<()> {
    if p.k_dim == 0
        || !p.k_dim.is_multiple_of(8)
        || !p.v_dim.is_multiple_of(8)
        || p.k_dim > 1024
        || p.v_dim > 1024
    {
        return Err(Error::invalid("k_dim, v_dim", "must be multiples of 8, at most 1024"));
    }
    if p.kv_heads == 0 || p.kv_heads > 1 << 16 || p.q_heads > 1 << 16 {
        return Err(Error::invalid("kv_heads, q_heads", "must be 1 (0 queries) to 65536"));
    }
    if p.block_tokens == 0 {
        return Err(Error::invalid("block_tokens", "must be at least 1"));
    }
    if !p.rope_dim.is_multiple_of(2) || !p.rope_first.is_multiple_of(8) {
        return Err(Error::invalid("rope_dim, rope_first", "must be even, a multiple of 8"));
    }
    if u64::from(p.rope_first) + u64::from(p.rope_dim) > u64::from(p.k_dim) {
        return Err(Error::invalid("rope_dim", "must end within k_dim"));
    }
    let rotates = p.cosines.0 != 0;
    if rotates && (p.sines.0 == 0 || p.positions.0 == 0) {
        return Err(Error::invalid("sines, positions", "are needed for a rotation"));
    }
    if (p.v_dim != 0) != (p.v.0 != 0) || (p.q_heads != 0) != (p.q.0 != 0) {
        return Err(Error::invalid("v, q", "must be given exactly where their sizes are not 0"));
    }
    let rows = [p.k_token, p.k_head, p.v_token, p.v_head, p.q_token, p.q_head];
    let rows = rows.into_iter().chain([p.q_out_token, p.q_out_head]);
    let keys = [p.k_cache_block, p.k_cache_head, p.k_cache_token];
    let values = [p.v_cache_block, p.v_cache_head, p.v_cache_token];
    let mut cache = keys.into_iter().chain(values);
    let addresses = [p.k.0, p.v.0, p.q.0, p.q_out.0, p.k_cache.0, p.v_cache.0];
    if rows.into_iter().any(|s| s % 8 != 0)
        || cache.any(|s| s % cache_chunk != 0)
        || addresses.iter().any(|a| !a.is_multiple_of(16))
    {
        return Err(Error::invalid(
            "k, v, q, caches",
            "rows must begin at multiples of 8 channels, of codes at multiples of 16 bytes",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::params::In;
    use super::*;

    fn sound() -> AppendParams {
        AppendParams {
            v: In::at(16),
            k_dim: 64,
            v_dim: 64,
            kv_heads: 2,
            block_tokens: 16,
            tokens: 100,
            ..AppendParams::default()
        }
    }

    #[test]
    fn every_token_has_a_block() {
        for (kv_heads, tokens) in [(1, 1), (2, 100), (8, 4097), (200, 3)] {
            let mut p = AppendParams { kv_heads, tokens, ..sound() };
            let launch = append_launch(&mut p).unwrap().unwrap();
            assert!(p.tokens_per_block.is_power_of_two() && p.tokens_per_block <= THREADS);
            assert!(launch.grid[0] * p.tokens_per_block >= tokens);
            assert!((launch.grid[0] - 1) * p.tokens_per_block < tokens);
        }
        assert_eq!(append_launch(&mut AppendParams { tokens: 0, ..sound() }), Ok(None));
    }

    #[test]
    fn what_is_copied_has_a_kernel_of_its_own() {
        let of = |row: DType, cache: DType, q_heads, cosines| {
            let mut p = AppendParams {
                row_dtype: row.id(),
                cache_dtype: cache.id(),
                q: In::at(u64::from(q_heads) * 16),
                q_heads,
                cosines: In::at(cosines),
                sines: In::at(cosines),
                positions: In::at(cosines),
                ..sound()
            };
            append_launch(&mut p).unwrap().unwrap().kernel.name
        };
        assert_eq!(of(DType::Bf16, DType::Bf16, 0, 0), "kvc_append_plain");
        assert_eq!(of(DType::F16, DType::F16, 0, 0), "kvc_append_plain");
        for (row, cache, q_heads, cosines) in [
            (DType::F32, DType::F32, 0, 0),
            (DType::Bf16, DType::F16, 0, 0),
            (DType::Bf16, DType::Bf16, 4, 0),
            (DType::Bf16, DType::Bf16, 0, 16),
        ] {
            assert_eq!(of(row, cache, q_heads, cosines), "kvc_append");
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bad in [
            AppendParams { k_dim: 60, ..sound() },
            AppendParams { k_dim: 0, ..sound() },
            AppendParams { v_dim: 4, ..sound() },
            AppendParams { v_dim: 0, ..sound() },
            AppendParams { kv_heads: 0, ..sound() },
            AppendParams { q_heads: 1, ..sound() },
            AppendParams { block_tokens: 0, ..sound() },
            AppendParams { rope_dim: 66, ..sound() },
            AppendParams { rope_dim: 7, ..sound() },
            AppendParams { cosines: In::at(16), ..sound() },
        ] {
            assert!(append_launch(&mut { bad }).is_err(), "{bad:?}");
        }
    }
}
