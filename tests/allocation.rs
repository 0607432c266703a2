//! Memory: a pool and an index that have reached their size allocate no more; and where the system
//! refuses memory, whatever call it is in says so or does less, and nothing breaks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use kvcache::Error;
use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::dtype::KvFormat;
use kvcache::ids::{BlockId, Namespace, TokenId};
use kvcache::kernels::{LookupImage, LookupUpload};
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::pool::{BlockPool, BlockTable};
use kvcache::prefix::{Eviction, Hint, Hit, Part, PrefixIndex, Retention};

/// The system's allocator, with a count and a fuse for the thread that sets them.
struct Fused;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
    /// Allocations until the next is refused; negative: never.
    static FUSE: Cell<i64> = const { Cell::new(-1) };
}

fn refused() -> bool {
    let refused = FUSE.try_with(|fuse| {
        let left = fuse.get();
        fuse.set(if left < 0 { -1 } else { left - 1 });
        left == 0
    });
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
    refused.unwrap_or(false)
}

// SAFETY: hands every call on to the system's allocator unchanged, or refuses it by a null pointer.
unsafe impl GlobalAlloc for Fused {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the system allocator's.
        if refused() { std::ptr::null_mut() } else { unsafe { System.alloc(layout) } }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        if refused() { std::ptr::null_mut() } else { unsafe { System.realloc(at, layout, size) } }
    }
}

#[global_allocator]
static ALLOCATOR: Fused = Fused;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = COUNT.get();
    work();
    COUNT.get() - before
}

/// Runs `work` with its allocation number `n` refused; true if there was one.
fn with_refusal(n: i64, work: impl FnOnce()) -> bool {
    FUSE.set(n);
    work();
    FUSE.replace(-1) < 0
}

const BLOCK: usize = 4;

struct Churn {
    random: u64,
    tokens: Vec<TokenId>,
    ids: Vec<BlockId>,
    same: Vec<BlockId>,
    hit: Hit,
    /// Whether it gives priorities and hints.
    steers: bool,
    now: u64,
}

impl Churn {
    fn new() -> Self {
        let buffer = || Vec::with_capacity(64);
        Churn {
            random: 1,
            tokens: Vec::with_capacity(256),
            ids: buffer(),
            same: buffer(),
            hit: Hit { blocks: buffer(), tail_blocks: buffer(), ..Hit::default() },
            steers: false,
            now: 0,
        }
    }

    fn below(&mut self, n: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.random >> 33) % n
    }

    /// What a cache does for one request.
    fn step(&mut self, index: &mut PrefixIndex) -> Result<(), Error> {
        let space = Namespace(self.below(3));
        let blocks = 1 + self.below(20) as usize;
        self.tokens.clear();
        for _ in 0..blocks * BLOCK {
            let token = self.below(8) / 6;
            self.tokens.push(token as u32);
        }
        self.ids.clear();
        self.ids.resize(blocks, BlockId(9));
        index.lookup(space, &self.tokens, usize::MAX, &mut self.hit);
        let pin = index.lock(self.hit.at)?;
        let missing = blocks - self.hit.tokens / BLOCK;
        let lacking = missing.saturating_sub(index.free_blocks());
        index.evict(lacking, &mut |_| true, &mut |_| ());
        let inserted = index.insert(space, &self.tokens, &self.ids, &mut self.same);
        index.unlock(pin)?;
        let inserted = inserted?;
        assert_eq!(inserted.present + inserted.stored, blocks);
        index.touch(inserted.at)?;
        if !self.steers {
            return Ok(());
        }
        // As an engine does that knows something.
        self.now += 1;
        index.advance(self.now)?;
        let (start, from) = (self.below(60) as usize, self.below(20) as usize);
        match self.below(4) {
            0 => index.hint(inserted.at, from, Hint::SessionEnded),
            1 => index.hint(inserted.at, from, Hint::ExpectedAt { ms: self.now + 40 }),
            _ => {
                let (end, duration_ms) = (Some(start + 30), Some(1 + start as u32));
                let range = Retention { start, end, priority: from as u8 * 5, duration_ms };
                index.prioritize(inserted.at, &[range])
            }
        }
    }
}

/// Every policy, left alone and steered.
const WAYS: [(Eviction, bool); 10] = {
    use Eviction::*;
    let plain = [Lru, Lfu, Fifo, Slru, S3Fifo];
    let mut all = [(Lru, false); 10];
    let mut n = 0;
    while n < 10 {
        all[n] = (plain[n / 2], n % 2 == 1);
        n += 1;
    }
    all
};

#[test]
fn a_full_index_allocates_no_more() {
    for (eviction, steers) in WAYS {
        let mut index = PrefixIndex::with_eviction(BLOCK, 1, 500, eviction).unwrap();
        let mut churn = Churn { steers, ..Churn::new() };
        let mut run = |steps| {
            for _ in 0..steps {
                churn.step(&mut index).unwrap();
            }
        };
        run(20_000);
        assert_eq!(allocations(|| run(20_000)), 0, "{eviction:?} {steers}");
        index.audit().unwrap();
        assert_eq!(index.free_blocks(), 0);
    }
}

#[test]
fn a_pool_allocates_no_more() {
    let mut pool = BlockPool::new(64).unwrap();
    let mut table = BlockTable::new();
    table.extend(&mut pool, 256, BLOCK).unwrap();
    table.release_all(&mut pool).unwrap();
    let work = || {
        for tokens in 0..256 {
            table.extend(&mut pool, tokens, BLOCK).unwrap();
            table.truncate(&mut pool, tokens / 2, BLOCK).unwrap();
            table.release_all(&mut pool).unwrap();
        }
    };
    assert_eq!(allocations(work), 0);
}

#[test]
fn every_refusal_in_the_index_is_survived() {
    for (eviction, steers) in WAYS {
        refuse_each(eviction, steers);
    }
}

fn refuse_each(eviction: Eviction, steers: bool) {
    for n in 0.. {
        let mut refusals = 0;
        let mut checked = None;
        // What it sends is made before; what it receives grows as it goes.
        let mut churn = Churn { same: Vec::new(), hit: Hit::default(), steers, ..Churn::new() };
        let happened = with_refusal(n, || {
            let mut index = match PrefixIndex::with_eviction(BLOCK, 1, 60, eviction) {
                Ok(index) => index,
                Err(error) => {
                    assert!(matches!(error, Error::OutOfMemory { .. }));
                    return;
                }
            };
            for _ in 0..200 {
                if let Err(error) = churn.step(&mut index) {
                    assert!(matches!(error, Error::OutOfMemory { .. }));
                    refusals += 1;
                }
            }
            checked = Some(index);
        });
        assert!(refusals < 2, "a refusal outlasts its call");
        if let Some(index) = checked {
            index.audit().unwrap();
            assert_eq!(index.stats().pins, 0);
            if !happened {
                assert!(n > 10, "the loop did not reach the index's allocations");
                break;
            }
        }
    }
}

/// Writes an upload to an image that lies in host memory.
fn apply(upload: &LookupUpload, image: &mut [u32]) {
    for patch in &upload.patches {
        let (to, from, words) = (patch.to as usize, patch.from as usize, patch.words as usize);
        image[to..to + words].copy_from_slice(&upload.words[from..from + words]);
    }
}

#[test]
fn every_refusal_in_a_mirrored_index_is_survived() {
    for n in 0.. {
        let mut checked = None;
        let mut index = PrefixIndex::new(BLOCK, 1, 60).unwrap();
        let image = LookupImage::new(&index).unwrap();
        let mut mirror = vec![0; image.bytes() as usize / 4];
        let mut churn = Churn { same: Vec::new(), hit: Hit::default(), ..Churn::new() };
        let happened = with_refusal(n, || {
            let mut upload = LookupUpload::default();
            while let Err(error) = index.start_mirror() {
                assert!(matches!(error, Error::OutOfMemory { .. }) && !index.is_mirrored());
            }
            for _ in 0..60 {
                if let Err(error) = churn.step(&mut index) {
                    assert!(matches!(error, Error::OutOfMemory { .. }));
                }
                if let Err(error) = image.sync(&mut index, &mut upload) {
                    // What it took must come again: look before it is written anew.
                    assert!(matches!(error, Error::OutOfMemory { .. }));
                    break;
                }
                apply(&upload, &mut mirror);
            }
            checked = Some(upload);
        });
        let mut upload = checked.unwrap();
        index.audit().unwrap();
        image.sync(&mut index, &mut upload).unwrap();
        apply(&upload, &mut mirror);
        let mut full = mirror.clone();
        index.mark_all();
        image.sync(&mut index, &mut upload).unwrap();
        apply(&upload, &mut full);
        // All but the slots, of which free ones may differ.
        let slots = index.most_records(Part::Tokens) as usize * (BLOCK + 1) + 64;
        assert_eq!(mirror[..mirror.len() - slots], full[..mirror.len() - slots]);
        if !happened {
            assert!(n > 10, "the loop did not reach the mirror's allocations");
            break;
        }
    }
}

#[test]
fn every_refusal_in_pool_and_table_is_survived() {
    for n in 0.. {
        let mut left = None;
        let happened = with_refusal(n, || {
            let Ok(mut pool) = BlockPool::new(64) else { return };
            let mut table = BlockTable::new();
            let mut other = BlockTable::new();
            let extended = table.extend(&mut pool, 100, BLOCK);
            assert_eq!(table.tokens(), if extended.is_ok() { 100 } else { 0 });
            if let Ok(mut fork) = table.fork(&mut pool) {
                fork.release_all(&mut pool).unwrap();
            }
            let adopted = other.adopt(&mut pool, table.blocks().iter().copied(), BLOCK);
            assert_eq!(other.tokens(), if adopted.is_ok() { table.tokens() } else { 0 });
            other.release_all(&mut pool).unwrap();
            table.release_all(&mut pool).unwrap();
            left = Some(pool);
        });
        if let Some(pool) = left {
            pool.audit().unwrap();
            assert_eq!(pool.free_blocks(), 64);
            if !happened {
                assert!(n > 4);
                break;
            }
        }
    }
}

/// A request and its fork, one layer, from the prompt to the end.
fn cache_life(cache: &mut KvCache, step: &mut Step) -> Result<(), Error> {
    let prompt: Vec<TokenId> = PROMPT.to_vec();
    let (row, layer) = ([1.0f32; 8], LayerId::uniform(0));
    let pass = |cache: &mut KvCache, step: &mut Step, work: &[Work]| {
        cache.begin(step, work)?;
        let mut out = [0.0f32; 8 * 64];
        for _ in 0..2 {
            let rows = step.rows();
            let k = &KEYS[..rows * row.len()];
            cache.append(step, layer, k.into(), k.into(), None)?;
            let (out, scoring) = ((&mut out[..k.len()]).into(), Scoring::causal(8));
            cache.attend(step, layer, k.into(), out, &scoring, None)?;
        }
        cache.commit(step)
    };
    let first = cache.start(&prompt, Namespace(1))?.seq;
    pass(cache, step, &[Work { seq: first, tokens: &prompt }])?;
    let second = cache.fork(first)?;
    let work = [Work { seq: first, tokens: &[1, 2] }, Work { seq: second, tokens: &[3] }];
    pass(cache, step, &work)?;
    let third = cache.start(&prompt, Namespace(1))?;
    assert!(third.cached_tokens == 0 || third.cached_tokens as usize >= 32);
    let rest = &prompt[third.cached_tokens as usize..];
    pass(cache, step, &[Work { seq: third.seq, tokens: rest }])?;
    cache.release(first)
}

static PROMPT: [TokenId; 40] = [7; 40];
static KEYS: [f32; 8 * 64] = [0.25; 8 * 64];

#[test]
fn every_refusal_in_the_cache_is_survived() {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 8, KvFormat::F32));
    let options = CacheOptions { blocks: 16, max_seqs: 4, threads: 1, ..CacheOptions::default() };
    for n in 0.. {
        let mut cache = KvCache::new(&spec, &options).unwrap();
        let mut step = Step::new();
        let mut result = Ok(());
        // The prompt's own vector is the first allocation, and the test's.
        let refused = with_refusal(n + 1, || result = cache_life(&mut cache, &mut step));
        if let Err(error) = result {
            assert!(matches!(error, Error::OutOfMemory { .. }), "{n}: {error}");
        }
        if step.is_open() {
            cache.cancel(&mut step).unwrap();
        }
        cache.audit().unwrap();
        if !refused {
            assert!(n > 10 && result.is_ok());
            break;
        }
    }
}
