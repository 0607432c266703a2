//! Pool, tables and copy-on-write against a naive model: who holds which block, and what each block
//! contains. The contents of a sequence must never change under it, whoever shares its blocks.

use std::collections::{BTreeMap, BTreeSet};

use kvcache::Error;
use kvcache::ids::BlockId;
use kvcache::pool::{BlockPool, BlockTable};
use proptest::prelude::*;

struct Sequence {
    table: BlockTable,
    tokens: Vec<u32>,
}

/// The pool, its users, and a memory that the users write through their tables.
struct Run {
    block_tokens: usize,
    pool: BlockPool,
    memory: Vec<Vec<u32>>,
    sequences: Vec<Sequence>,
    /// References held outside tables.
    held: Vec<BlockId>,
    /// Blocks that the prefix index holds.
    cached: BTreeSet<BlockId>,
    next_token: u32,
}

#[derive(Debug, Clone)]
enum Op {
    New,
    /// A sequence, how many tokens, and whether the copy of its tail fails at first.
    Append(usize, usize, bool),
    Fork(usize),
    Truncate(usize, usize),
    Release(usize),
    /// A new sequence from the full blocks of another, as after a prefix hit.
    Adopt(usize, usize),
    /// Two sequences: equal full blocks of the second become those of the first.
    Merge(usize, usize),
    Hold(usize, usize),
    Drop(usize),
    /// The prefix index takes a full block, and gives one up.
    Cache(usize, usize),
    Uncache(usize),
    /// A batch of raw blocks, then given back with one bad id among them, then properly.
    Batch(usize, u32, usize),
}

fn op() -> impl Strategy<Value = Op> {
    let i = any::<usize>;
    prop_oneof![
        2 => Just(Op::New),
        8 => (i(), 0..20usize, any::<bool>()).prop_map(|(s, n, f)| Op::Append(s, n, f)),
        4 => i().prop_map(Op::Fork),
        3 => (i(), i()).prop_map(|(s, n)| Op::Truncate(s, n)),
        2 => i().prop_map(Op::Release),
        2 => (i(), i()).prop_map(|(s, n)| Op::Adopt(s, n)),
        2 => (i(), i()).prop_map(|(a, b)| Op::Merge(a, b)),
        3 => (i(), i()).prop_map(|(s, n)| Op::Hold(s, n)),
        3 => i().prop_map(Op::Drop),
        4 => (i(), i()).prop_map(|(s, n)| Op::Cache(s, n)),
        3 => i().prop_map(Op::Uncache),
        2 => (0..30usize, any::<u32>(), i()).prop_map(|(n, b, at)| Op::Batch(n, b, at)),
    ]
}

impl Run {
    fn new(block_tokens: usize, blocks: u32) -> Self {
        Run {
            block_tokens,
            pool: BlockPool::new(blocks).unwrap(),
            memory: vec![vec![0; block_tokens]; blocks as usize],
            sequences: vec![Sequence { table: BlockTable::new(), tokens: Vec::new() }],
            held: Vec::new(),
            cached: BTreeSet::new(),
            next_token: 1,
        }
    }

    fn append(&mut self, which: usize, n: usize, fails: bool) {
        let (bt, free) = (self.block_tokens, self.pool.free_blocks() as usize);
        let Sequence { table, tokens } = &mut self.sequences[which];
        let copies = usize::from(n > 0 && table.tail_shared(&self.pool, bt));
        let needed = (tokens.len() + n).div_ceil(bt) - tokens.len().div_ceil(bt);
        assert_eq!(table.blocks_needed(n, bt), Ok(needed));
        if needed + copies > free {
            if needed > free {
                let missing = (needed - free) as u32;
                let error = Error::OutOfBlocks { needed: needed as u32, missing };
                assert_eq!(table.extend(&mut self.pool, n, bt), Err(error));
            }
            return;
        }
        if copies > 0 {
            let shared = table.blocks().to_vec();
            let mut copy = table.make_tail_writable(&mut self.pool, bt).unwrap().unwrap();
            if fails {
                table.undo_copy(&mut self.pool, copy).unwrap();
                assert_eq!(table.blocks(), shared);
                copy = table.make_tail_writable(&mut self.pool, bt).unwrap().unwrap();
            }
            assert_eq!(copy.tokens, tokens.len() % bt);
            let kept = self.memory[copy.src.index()][..copy.tokens].to_vec();
            self.memory[copy.dst.index()][..copy.tokens].copy_from_slice(&kept);
            assert_eq!(copy.finish(&mut self.pool), Ok(false), "others share the source");
        } else if n > 0 {
            assert_eq!(table.make_tail_writable(&mut self.pool, bt), Ok(None));
        }
        table.extend(&mut self.pool, n, bt).unwrap();
        for _ in 0..n {
            let at = tokens.len();
            self.memory[table.blocks()[at / bt].index()][at % bt] = self.next_token;
            tokens.push(self.next_token);
            // Few values, so that equal blocks come up.
            self.next_token = (self.next_token + 1) % 3;
        }
    }

    fn step(&mut self, op: Op) {
        let bt = self.block_tokens;
        let pick = |n: usize, of: usize| n.checked_rem(of);
        let count = self.sequences.len();
        match op {
            Op::New => self.sequences.push(Sequence { table: BlockTable::new(), tokens: vec![] }),
            Op::Append(s, n, fails) => {
                if let Some(s) = pick(s, count) {
                    self.append(s, n, fails);
                }
            }
            Op::Fork(s) => {
                if let Some(s) = pick(s, count) {
                    let table = self.sequences[s].table.fork(&mut self.pool).unwrap();
                    let tokens = self.sequences[s].tokens.clone();
                    self.sequences.push(Sequence { table, tokens });
                }
            }
            Op::Truncate(s, n) => {
                if let Some(s) = pick(s, count) {
                    let Sequence { table, tokens } = &mut self.sequences[s];
                    let n = n % (tokens.len() + 1);
                    let before = self.pool.free_blocks();
                    let freed = table.truncate(&mut self.pool, n, bt).unwrap();
                    assert_eq!(self.pool.free_blocks(), before + freed);
                    tokens.truncate(n);
                }
            }
            Op::Release(s) => {
                if let Some(s) = pick(s, count) {
                    let mut gone = self.sequences.swap_remove(s);
                    let before = self.pool.free_blocks();
                    let freed = gone.table.release_all(&mut self.pool).unwrap();
                    assert_eq!(self.pool.free_blocks(), before + freed);
                    assert_eq!((gone.table.tokens(), gone.table.blocks().len()), (0, 0));
                }
            }
            Op::Adopt(s, n) => {
                if let Some(s) = pick(s, count) {
                    let n = n % (self.sequences[s].tokens.len() / bt + 1);
                    let blocks = self.sequences[s].table.blocks()[..n].to_vec();
                    let mut table = BlockTable::new();
                    // No block, or none behind a block: a window leaves only what comes first.
                    let bad = [BlockId(self.pool.blocks()), BlockId::NONE];
                    for bad in &bad[..1 + usize::from(n > 0)] {
                        let refused = Err(Error::BadBlock { block: bad.0 });
                        let ids = blocks.iter().copied().chain([*bad]);
                        assert_eq!(table.adopt(&mut self.pool, ids, bt), refused);
                    }
                    table.adopt(&mut self.pool, blocks, bt).unwrap();
                    let tokens = self.sequences[s].tokens[..n * bt].to_vec();
                    self.sequences.push(Sequence { table, tokens });
                }
            }
            Op::Merge(a, b) => {
                if let (Some(a), Some(b)) = (pick(a, count), pick(b, count)) {
                    let full = self.sequences[a].tokens.len() / bt;
                    for i in 0..full.min(self.sequences[b].tokens.len() / bt) {
                        let range = i * bt..(i + 1) * bt;
                        if self.sequences[a].tokens[range.clone()]
                            == self.sequences[b].tokens[range]
                        {
                            let block = self.sequences[a].table.blocks()[i];
                            let table = &mut self.sequences[b].table;
                            table.replace(&mut self.pool, i, block).unwrap();
                        }
                    }
                }
            }
            Op::Hold(s, n) => {
                if let Some(s) = pick(s, count)
                    && let Some(n) = pick(n, self.sequences[s].tokens.len() / bt)
                {
                    let block = self.sequences[s].table.blocks()[n];
                    self.pool.retain(block).unwrap();
                    self.held.push(block);
                }
            }
            Op::Drop(n) => {
                if let Some(n) = pick(n, self.held.len()) {
                    let block = self.held.swap_remove(n);
                    let last = self.pool.refs(block) == 1;
                    assert_eq!(self.pool.release(block), Ok(last));
                }
            }
            Op::Cache(s, n) => {
                if let Some(s) = pick(s, count)
                    && let Some(n) = pick(n, self.sequences[s].tokens.len() / bt)
                {
                    let block = self.sequences[s].table.blocks()[n];
                    let done = self.pool.cache(block);
                    let twice = !self.cached.insert(block);
                    let refused = Err(Error::BadBlock { block: block.0 });
                    assert_eq!(done, if twice { refused } else { Ok(()) });
                }
            }
            Op::Uncache(n) => {
                if let Some(n) = pick(n, self.cached.len()) {
                    let block = *self.cached.iter().nth(n).unwrap();
                    self.cached.remove(&block);
                    let last = self.pool.refs(block) == 1;
                    assert_eq!(self.pool.uncache(block), Ok(last));
                    let refused = Err(Error::BadBlock { block: block.0 });
                    assert_eq!(self.pool.uncache(block), refused, "it is not cached any more");
                }
            }
            Op::Batch(n, bad, at) => self.batch(n, bad, at),
        }
    }

    fn batch(&mut self, n: usize, bad: u32, at: usize) {
        let free = self.pool.free_blocks();
        let mut out = vec![BlockId::NONE; n];
        if n as u32 > free {
            let error = Error::OutOfBlocks { needed: n as u32, missing: n as u32 - free };
            assert_eq!(self.pool.allocate_n(&mut out), Err(error));
            assert!(out.iter().all(|&b| b == BlockId::NONE));
            return;
        }
        self.pool.allocate_n(&mut out).unwrap();
        assert!(out.iter().all(|&b| self.pool.refs(b) == 1));
        // Any id that nobody holds, or one of the batch a second time.
        let bad = if bad.is_multiple_of(2) && n > 0 { out[at % n] } else { BlockId(bad | 1 << 31) };
        let mut list = out.clone();
        list.insert(at % (n + 1), bad);
        assert_eq!(self.pool.free_n(&list), Err(Error::BadBlock { block: bad.0 }));
        assert_eq!(self.pool.free_n(&out), Ok(n as u32));
        assert_eq!(self.pool.free_blocks(), free);
    }

    fn check(&self) {
        self.pool.audit().unwrap();
        let mut holders: BTreeMap<u32, u32> = BTreeMap::new();
        let tables = self.sequences.iter().flat_map(|s| s.table.blocks());
        for block in tables.chain(&self.held).chain(&self.cached) {
            *holders.entry(block.0).or_default() += 1;
        }
        let mut only = 0;
        for block in 0..self.pool.blocks() {
            let want = holders.get(&block).copied().unwrap_or(0);
            assert_eq!(self.pool.refs(BlockId(block)), want, "holders of block {block}");
            let cached = self.cached.contains(&BlockId(block));
            assert_eq!(self.pool.is_cached(BlockId(block)), cached);
            only += u32::from(cached && want == 1);
        }
        assert_eq!(self.pool.cached_blocks(), only, "blocks that only the index holds");
        assert_eq!(self.pool.free_blocks() as usize + holders.len(), self.memory.len());
        for s in &self.sequences {
            let bt = self.block_tokens;
            assert_eq!(s.table.tokens(), s.tokens.len());
            assert_eq!(s.table.blocks().len(), s.tokens.len().div_ceil(bt));
            for (tokens, block) in s.tokens.chunks(bt).zip(s.table.blocks()) {
                assert_eq!(&self.memory[block.index()][..tokens.len()], tokens, "a sharer wrote");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn the_pool_is_the_model(
        block_tokens in prop::sample::select(vec![1usize, 3, 4, 16]),
        blocks in 1..60u32,
        ops in prop::collection::vec(op(), 1..250),
    ) {
        let mut run = Run::new(block_tokens, blocks);
        for op in ops {
            run.step(op);
            run.check();
        }
        for mut s in run.sequences.drain(..) {
            s.table.release_all(&mut run.pool).unwrap();
        }
        for block in std::mem::take(&mut run.cached) {
            run.pool.uncache(block).unwrap();
        }
        for block in run.held.drain(..) {
            run.pool.release(block).unwrap();
        }
        prop_assert_eq!(run.pool.free_blocks(), blocks);
    }
}
