//! Paging: the blocks of one layer group, who holds them, and the block tables of sequences.
//!
//! A pool owns the ids `0..blocks` and a reference count each; a table lists the blocks of one
//! sequence in order. Sharing is a reference more, never a copy; the one copy there is, that of a
//! shared, partly full last block before it is written, is described by a [`BlockCopy`] and done
//! by the caller. Nothing here knows what a block holds, where its bytes are, or what a prefix
//! index is: the index is one more holder of references, which the pool marks and counts.
//!
//! ```
//! use kvcache::pool::{BlockPool, BlockTable};
//!
//! let mut pool = BlockPool::new(8)?;
//! let mut table = BlockTable::new();
//! table.extend(&mut pool, 20, 16)?; // two blocks, the second holds 4 tokens
//! let mut beam = table.fork(&mut pool)?; // shares both
//! let copy = beam.make_tail_writable(&mut pool, 16)?.expect("the tail is shared");
//! assert_eq!((copy.src, copy.tokens), (table.blocks()[1], 4));
//! // ... the caller copies block `src` to block `dst` here ...
//! copy.finish(&mut pool)?;
//! beam.extend(&mut pool, 1, 16)?;
//! table.release_all(&mut pool)?;
//! beam.release_all(&mut pool)?;
//! assert_eq!(pool.free_blocks(), 8);
//! # Ok::<(), kvcache::Error>(())
//! ```

mod blocks;
mod idle;
mod table;

pub use blocks::BlockPool;
pub use table::{BlockCopy, BlockTable};
