//! The mirrored prefix index in the emulator: lookups on the device against those of the index,
//! incremental uploads against full ones, and images that somebody has spoilt.
#![cfg(feature = "emulate")]

mod device;

use device::Rng;
use kvcache::emu::{Buffer, Options, Schedule, launch};
use kvcache::ids::{BlockId, Namespace};
use kvcache::kernels::params::{In, Out};
use kvcache::kernels::{Launch, LookupBatch, LookupImage, LookupUpload};
use kvcache::prefix::{Hit, Part, PinId, Position, PrefixIndex};

/// Raised by an image that is not whole.
const IMAGE_FLAG: u32 = 16;

fn run<P: Copy>(plan: Launch, params: &P, schedule: Schedule) {
    let options = Options { schedule, ..Options::default() };
    // SAFETY: the callers' addresses are those of buffers that outlive the call.
    unsafe { launch(plan.kernel.name, plan.grid, plan.kernel.threads, 0, params, options) }
        .unwrap();
}

/// Writes an upload to an image with the kernel.
fn apply(image: &LookupImage, upload: &LookupUpload, to: &Buffer, schedule: Schedule) {
    let runs: Vec<u32> = upload
        .patches
        .iter()
        .flat_map(|p| [p.to as u32, (p.to >> 32) as u32, p.from, p.words])
        .collect();
    let (patches, words) = (Buffer::of(&runs).unwrap(), Buffer::of(&upload.words).unwrap());
    let flag = Buffer::of(&[0u32]).unwrap();
    let (patches_at, words_at) = (In::at(patches.address()), In::at(words.address()));
    let flag_at = Out::at(flag.address());
    let plan = image.patch_launch(to.address(), upload, patches_at, words_at, flag_at).unwrap();
    let (plan, params) = plan.unwrap();
    run(plan, &params, schedule);
    assert_eq!(flag.read::<u32>()[0], 0);
}

/// What the device found for a request.
#[derive(Debug, PartialEq)]
struct Found {
    tokens: usize,
    blocks: Vec<BlockId>,
    tail_tokens: usize,
    tail_blocks: Vec<BlockId>,
}

struct Batch {
    requests: Vec<(u64, Vec<u32>)>,
    leave: usize,
    max_blocks: usize,
}

/// Looks the batch up in an image; results and the error flag.
fn look_up(
    index: &PrefixIndex,
    image: &LookupImage,
    at: u64,
    batch: &Batch,
    schedule: Schedule,
) -> (Vec<Found>, u32) {
    let (n, groups) = (batch.requests.len(), index.groups());
    let stride = batch.max_blocks * groups + 3;
    let (mut flat, mut indptr) = (vec![0u32; 5], vec![5i32]);
    for (_, tokens) in &batch.requests {
        flat.extend_from_slice(tokens);
        indptr.push(flat.len() as i32);
    }
    let spaces: Vec<u64> = batch.requests.iter().map(|r| r.0).collect();
    let (tokens, indptr) = (Buffer::of(&flat).unwrap(), Buffer::of(&indptr).unwrap());
    let (spaces, flag) = (Buffer::of(&spaces).unwrap(), Buffer::of(&[0u32]).unwrap());
    let untouched = 0xdead_beefu32;
    let blocks = Buffer::of(&vec![untouched; n * stride]).unwrap();
    let (matched, tails) = (Buffer::new(n * 4).unwrap(), Buffer::new(n * 4).unwrap());
    let tail_blocks = Buffer::new(n * groups * 4).unwrap();
    let call = LookupBatch {
        requests: n as u32,
        tokens: In::at(tokens.address()),
        indptr: In::at(indptr.address()),
        namespaces: In::at(spaces.address()),
        leave: batch.leave as u32,
        max_blocks: batch.max_blocks as u32,
        matched: Out::at(matched.address()),
        blocks: Out::at(blocks.address()),
        block_stride: stride as i64,
        tail_tokens: Out::at(tails.address()),
        tail_blocks: Out::at(tail_blocks.address()),
        error_flag: Out::at(flag.address()),
    };
    let (plan, params) = image.lookup_launch(at, &call).unwrap().unwrap();
    run(plan, &params, schedule);
    let (matched, tails) = (matched.read::<u32>(), tails.read::<u32>());
    let (blocks, tail_blocks) = (blocks.read::<u32>(), tail_blocks.read::<u32>());
    let ids = |words: &[u32]| words.iter().map(|&id| BlockId(id)).collect::<Vec<_>>();
    let found = (0..n).map(|i| {
        let row = &blocks[i * stride..(i + 1) * stride];
        let count = matched[i] as usize / index.block_tokens() * groups;
        assert!(row[count..].iter().all(|&word| word == untouched));
        let tail_ids = &tail_blocks[i * groups..(i + 1) * groups];
        if tails[i] == 0 {
            assert!(tail_ids.iter().all(|&id| id == u32::MAX));
        }
        Found {
            tokens: matched[i] as usize,
            blocks: ids(&row[..count]),
            tail_tokens: tails[i] as usize,
            tail_blocks: if tails[i] == 0 { Vec::new() } else { ids(tail_ids) },
        }
    });
    (found.collect(), flag.read::<u32>()[0])
}

/// What the index itself finds.
fn expected(index: &PrefixIndex, batch: &Batch) -> Vec<Found> {
    let mut hit = Hit::default();
    let look = |(space, tokens): &(u64, Vec<u32>)| {
        let most = batch.max_blocks * index.block_tokens();
        let most = most.min(tokens.len().saturating_sub(batch.leave));
        index.lookup(Namespace(*space), tokens, most, &mut hit);
        Found {
            tokens: hit.tokens,
            blocks: hit.blocks.clone(),
            tail_tokens: hit.tail_tokens,
            tail_blocks: hit.tail_blocks.clone(),
        }
    };
    batch.requests.iter().map(look).collect()
}

/// Where two images of the index differ, but for slots that no edge has.
fn must_agree(index: &PrefixIndex, a: &Buffer, b: &Buffer) {
    let (a, b) = (a.read::<u32>(), b.read::<u32>());
    // The parts lie as `LookupImage` says: each from a multiple of 64 words.
    let mut at = 16usize;
    assert_eq!(a[..at], b[..at], "heads");
    let mut live = vec![false; index.records(Part::Tokens)];
    for part in Part::ALL {
        at = at.next_multiple_of(64);
        let words = index.record_words(part);
        for record in 0..index.records(part) {
            let range = at + record * words..at + (record + 1) * words;
            if part == Part::Nodes && a[range.start] == 2 {
                let (start, len) = (a[range.start + 2] as usize, a[range.start + 3] as usize);
                live[start..start + len].fill(true);
            }
            let slot = matches!(part, Part::Tokens | Part::Ids);
            if !slot || live[record] {
                assert_eq!(a[range.clone()], b[range], "{part:?} {record}");
            }
        }
        at += index.most_records(part) as usize * words;
    }
}

/// An index that is changed at random, and its image.
struct World {
    index: PrefixIndex,
    image: LookupImage,
    memory: Buffer,
    upload: LookupUpload,
    rng: Rng,
    next_id: u32,
    pins: Vec<PinId>,
    places: Vec<Position>,
}

impl World {
    fn new(block_tokens: usize, groups: usize, capacity: u32, seed: u64) -> Self {
        let mut index = PrefixIndex::new(block_tokens, groups, capacity).unwrap();
        index.start_mirror().unwrap();
        let image = LookupImage::new(&index).unwrap();
        let memory = Buffer::new(image.bytes() as usize).unwrap();
        let (upload, rng) = (LookupUpload::default(), Rng::new(seed));
        World { index, image, memory, upload, rng, next_id: 0, pins: vec![], places: vec![] }
    }

    /// Mostly zeros, so that long prefixes are shared and blocks differ late.
    fn tokens(&mut self, most: usize) -> Vec<u32> {
        let count = self.rng.below(most + 1);
        (0..count).map(|_| self.rng.pick(&[0, 0, 0, 0, 0, 0, 1, 2, u32::MAX])).collect()
    }

    fn change(&mut self) {
        let (bt, groups) = (self.index.block_tokens(), self.index.groups());
        let space = Namespace(self.rng.pick(&[0, 0, 0, 1, u64::MAX]));
        match self.rng.below(12) {
            0..=5 => {
                let mut tokens = self.tokens(bt * 9);
                tokens.truncate(tokens.len() / bt * bt);
                let ids: Vec<BlockId> = (0..tokens.len() / bt * groups)
                    .map(|i| BlockId(self.next_id + i as u32))
                    .collect();
                self.next_id += ids.len() as u32;
                let done = self.index.insert(space, &tokens, &ids, &mut Vec::new()).unwrap();
                self.places.push(done.at);
            }
            6 | 7 => {
                let want = self.rng.below(8);
                self.index.evict(want, &mut |_| true, &mut |_| ());
            }
            8 => {
                let mut tokens = self.tokens(bt * 9);
                tokens.truncate(tokens.len() / bt * bt);
                self.index.remove(space, &tokens, &mut |_| ()).unwrap();
            }
            9 if self.rng.below(8) == 0 => {
                self.index.clear(space, &mut |_| ());
            }
            9 | 10 if !self.places.is_empty() => {
                let at = self.places.swap_remove(self.rng.below(self.places.len()));
                let at = at.first(1 + self.rng.below(9));
                if let Ok(pin) = self.index.lock(at) {
                    self.pins.push(pin);
                }
            }
            _ if !self.pins.is_empty() => {
                let pin = self.pins.swap_remove(self.rng.below(self.pins.len()));
                self.index.unlock(pin).unwrap();
            }
            _ => {}
        }
    }

    fn sync(&mut self, schedule: Schedule) {
        self.image.sync(&mut self.index, &mut self.upload).unwrap();
        apply(&self.image, &self.upload, &self.memory, schedule);
    }

    fn batch(&mut self, requests: usize) -> Batch {
        let bt = self.index.block_tokens();
        let mut list = Vec::new();
        for _ in 0..requests {
            let space = self.rng.pick(&[0, 0, 0, 1, 2, u64::MAX]);
            list.push((space, self.tokens(bt * 10)));
        }
        let (leave, max_blocks) = (self.rng.below(3), self.rng.pick(&[1, 4, 10, 1000]));
        Batch { requests: list, leave, max_blocks }
    }

    fn check(&mut self, schedule: Schedule) {
        let batch = self.batch(11);
        let at = self.memory.address();
        let (found, flag) = look_up(&self.index, &self.image, at, &batch, schedule);
        assert_eq!(flag, 0);
        assert_eq!(found, expected(&self.index, &batch));
    }
}

#[test]
fn lookups_and_incremental_uploads_agree_with_the_index() {
    for (seed, (block_tokens, groups, capacity)) in
        [(1, 1, 40), (4, 1, 60), (4, 3, 200), (16, 2, 90), (40, 1, 64)].into_iter().enumerate()
    {
        let mut world = World::new(block_tokens, groups, capacity, seed as u64);
        for round in 0..60u64 {
            for _ in 0..world.rng.below(12) {
                world.change();
            }
            let schedule = Schedule::ALL[round as usize % 4];
            world.sync(schedule);
            world.check(schedule);
            if round % 10 == 9 {
                world.index.audit().unwrap();
                let full = Buffer::new(world.image.bytes() as usize).unwrap();
                world.index.mark_all();
                world.image.sync(&mut world.index, &mut world.upload).unwrap();
                apply(&world.image, &world.upload, &full, schedule);
                must_agree(&world.index, &world.memory, &full);
            }
        }
        assert!(world.index.len_blocks() > 10, "{}", world.index.len_blocks());
    }
}

#[test]
fn long_prompts_over_long_edges() {
    let mut world = World::new(16, 1, 400, 9);
    let prompt: Vec<u32> = (0..16 * 120).map(|i| i * 7).collect();
    let ids: Vec<BlockId> = (0..120).map(BlockId).collect();
    world.index.insert(Namespace(0), &prompt, &ids, &mut Vec::new()).unwrap();
    let mut requests = vec![(0, prompt.clone()), (1, prompt.clone())];
    // A first difference at every kind of place: within a step of 32 lanes, of 256 tokens, a block.
    for at in [0, 1, 15, 16, 31, 32, 255, 256, 257, 1000, 1023, 1024, 1919] {
        let mut other = prompt.clone();
        other[at] ^= 1 << 31;
        world.index.insert(Namespace(0), &other, &ids, &mut Vec::new()).unwrap();
        other[at] ^= 1;
        requests.push((0, other.clone()));
        other.truncate(at + 1);
        requests.push((0, other));
    }
    let batch = Batch { requests, leave: 1, max_blocks: 120 };
    world.sync(Schedule::Forward);
    for schedule in Schedule::ALL {
        let at = world.memory.address();
        let (found, flag) = look_up(&world.index, &world.image, at, &batch, schedule);
        assert_eq!((flag, found), (0, expected(&world.index, &batch)));
    }
}

#[test]
fn an_empty_index_and_bad_offsets() {
    let mut world = World::new(8, 1, 16, 3);
    world.sync(Schedule::Forward);
    world.check(Schedule::Forward);
    world.index.insert(Namespace(0), &[5; 16], &[BlockId(1), BlockId(2)], &mut vec![]).unwrap();
    world.sync(Schedule::Forward);
    let (image, at) = (world.image, world.memory.address());
    let (tokens, flag) = (Buffer::of(&[5u32; 16]).unwrap(), Buffer::of(&[0u32]).unwrap());
    let indptr = Buffer::of(&[0i32, 16, 3, -9, 16]).unwrap();
    let (matched, blocks) = (Buffer::new(16).unwrap(), Buffer::new(32).unwrap());
    let call = LookupBatch {
        requests: 4,
        tokens: In::at(tokens.address()),
        indptr: In::at(indptr.address()),
        namespaces: In::NULL,
        leave: 0,
        max_blocks: 2,
        matched: Out::at(matched.address()),
        blocks: Out::at(blocks.address()),
        block_stride: 2,
        tail_tokens: Out::NULL,
        tail_blocks: Out::NULL,
        error_flag: Out::at(flag.address()),
    };
    let (plan, params) = image.lookup_launch(at, &call).unwrap().unwrap();
    run(plan, &params, Schedule::Forward);
    assert_eq!((matched.read::<u32>(), flag.read::<u32>()), (vec![16, 0, 0, 0], vec![2]));
}

#[test]
fn a_spoilt_image_is_never_left() {
    let mut world = World::new(4, 2, 60, 5);
    for _ in 0..150 {
        world.change();
    }
    world.sync(Schedule::Forward);
    let whole = world.memory.read::<u32>();
    let nodes = world.index.records(Part::Nodes);
    let tables = world.index.most_records(Part::Branches) as usize * 2;
    let first_table =
        (64 + world.index.most_records(Part::Nodes) as usize * 8).next_multiple_of(64);
    let mut raised = 0;
    for round in 0..300 {
        let mut words = whole.clone();
        for _ in 0..1 + world.rng.below(20) {
            // Nodes most of the time, tables, the head.
            let at = match world.rng.below(10) {
                0 => world.rng.below(12),
                1 | 2 => first_table + world.rng.below(tables),
                _ => 64 + world.rng.below(nodes * 8),
            };
            let small = world.rng.below(nodes + 4) as u32;
            words[at] = world.rng.pick(&[small, small, 1, 2, 3, u32::MAX, u32::MAX - 1, 1 << 31]);
        }
        let spoilt = Buffer::of(&words).unwrap();
        let batch = world.batch(8);
        let at = spoilt.address();
        let (found, flag) =
            look_up(&world.index, &world.image, at, &batch, Schedule::Seeded(round));
        assert!(flag == 0 || flag == IMAGE_FLAG);
        raised += u32::from(flag != 0);
        let bt = world.index.block_tokens();
        for (found, (_, tokens)) in found.iter().zip(&batch.requests) {
            assert!(found.tokens + found.tail_tokens <= tokens.len());
            assert!(found.tokens <= batch.max_blocks * bt);
        }
    }
    assert!((20..300).contains(&raised), "{raised}");
}

#[test]
fn every_check_of_an_image() {
    // The root, an edge of one block, a fork at its next token, below it a fork one token on.
    let mut world = World::new(4, 1, 4, 1);
    let request = [0, 0, 0, 0, 1, 1, 1, 1];
    for (i, other) in [[1, 1, 1, 1], [1, 2, 1, 1], [3, 1, 1, 1]].into_iter().enumerate() {
        let tokens = [[0; 4], other].concat();
        let ids = [BlockId(0), BlockId(1 + i as u32)];
        world.index.insert(Namespace(0), &tokens, &ids, &mut Vec::new()).unwrap();
    }
    world.sync(Schedule::Forward);
    let whole = world.memory.read::<u32>();
    let nodes = |kind: u32, start: u32| {
        let of = |n: &usize| whole[64 + n * 8] == kind && whole[64 + n * 8 + 2] == start;
        (0..world.index.records(Part::Nodes)).find(of).unwrap()
    };
    let (root, above, leaf) = (nodes(1, 0), nodes(2, 0), nodes(2, 1));
    let (first, second) = (nodes(3, 0), nodes(3, 1));
    let field = |node: usize, at: usize| 64 + node * 8 + at;
    let table = |part: usize| {
        let before = Part::ALL[..part].iter().fold(16usize, |at, &p| {
            let words = world.index.most_records(p) as usize * world.index.record_words(p);
            at.next_multiple_of(64) + words
        });
        before.next_multiple_of(64)
    };
    let look = |changes: &[(usize, u32)]| {
        let mut words = whole.clone();
        for &(at, word) in changes {
            words[at] = word;
        }
        let spoilt = Buffer::of(&words).unwrap();
        let batch = Batch { requests: vec![(0, request.to_vec())], leave: 0, max_blocks: 9 };
        let (found, flag) =
            look_up(&world.index, &world.image, spoilt.address(), &batch, Schedule::Forward);
        (found[0].tokens, flag)
    };
    assert_eq!(look(&[]), (8, 0));
    // What must be noticed, and how far a lookup may have come before.
    let u = |n: usize| n as u32;
    for (tokens, at, word) in [
        (0, 0, u32::MAX),
        (0, 1, u32::MAX),
        (0, 1, whole[1] - 1),
        (0, 2, 3),
        (0, 3, 5),
        (0, 8, 5),
        (0, 9, 2),
        (0, field(root, 1), 1000),
        (0, field(above, 0), 0),
        (0, field(above, 3), 0),
        (0, field(above, 3), 5),
        (0, field(above, 2), 4),
        (0, field(above, 2), u32::MAX),
        (4, field(above, 1), u32::MAX - 1),
        (4, field(first, 2), 4),
        (4, field(second, 2), 0),
        (4, field(leaf, 0), 9),
        (4, field(leaf, 3), u32::MAX),
    ] {
        assert_eq!(look(&[(at, word)]), (tokens, IMAGE_FLAG), "word {at} is {word}");
    }
    // A fork that is its own child, when no branch leads on.
    let lost = (field(leaf, 5), 77);
    assert_eq!(look(&[lost, (field(second, 1), u(second))]), (4, IMAGE_FLAG));
    // An entry whose node is another's is not taken, nor one whose node is no node: the walk ends
    // at an edge that agrees less.
    assert_eq!(look(&[lost]), (4, 0));
    assert_eq!(look(&[(field(leaf, 4), u(root))]), (4, 0));
    assert_eq!(look(&[(field(root, 6), 1)]), (0, 0));
    assert_eq!(look(&[(field(root, 0), 2)]), (0, 0));
    let spaces = table(2);
    let entry = (0..world.index.records(Part::Spaces)).map(|n| spaces + n * 2 + 1);
    let entry = entry.into_iter().find(|&at| whole[at] == u(root)).unwrap();
    assert_eq!(look(&[(entry, 1 << 30)]), (0, 0));
    assert_eq!(look(&[(entry - 1, !whole[entry - 1])]), (0, 0));
}
