//! The copy and zero kernels in the emulator, against a loop over bytes.
#![cfg(feature = "emulate")]

mod device;

use device::Rng;
use kvcache::emu::{Buffer, Options, Schedule, launch};
use kvcache::kernels::params::{CopyParams, In, Out};
use kvcache::kernels::{copy_launch, zero_launch};

/// A pool of the host: planes of blocks of runs, with gaps between.
#[derive(Debug, Clone, Copy)]
struct Pool {
    blocks: usize,
    /// One allocation a plane, found through an array of addresses; else one allocation.
    apart: bool,
    /// Bytes between blocks, and between runs.
    gap: usize,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    planes: usize,
    runs: usize,
    run_bytes: usize,
    from: Pool,
    to: Pool,
    wide_ids: bool,
    entries: usize,
    /// Tokens of an entry, each of so many bytes.
    token_bytes: Option<usize>,
    multiprocessors: u32,
    schedule: Schedule,
}

const POOL: Pool = Pool { blocks: 9, apart: false, gap: 0 };
const BASE: Case = Case {
    planes: 1,
    runs: 1,
    run_bytes: 10_000,
    from: POOL,
    to: POOL,
    wide_ids: false,
    entries: 6,
    token_bytes: None,
    multiprocessors: 1,
    schedule: Schedule::Forward,
};

struct Memory {
    pool: Pool,
    run: usize,
    block: usize,
    plane: usize,
    /// What the host thinks is in each allocation, and the allocations.
    bytes: Vec<Vec<u8>>,
    buffers: Vec<Buffer>,
    planes: Buffer,
}

impl Memory {
    fn new(case: &Case, pool: Pool, rng: &mut Rng) -> Self {
        let run = case.run_bytes + pool.gap;
        let block = case.runs * run + pool.gap;
        let plane = pool.blocks * block;
        let mut random = |n: usize| (0..n).map(|_| rng.next() as u8).collect::<Vec<u8>>();
        let bytes: Vec<Vec<u8>> = match pool.apart {
            true => (0..case.planes).map(|_| random(plane)).collect(),
            false => vec![random(case.planes * plane)],
        };
        let buffers: Vec<Buffer> = bytes.iter().map(|b| Buffer::of(b).unwrap()).collect();
        let addresses: Vec<u64> = buffers.iter().map(Buffer::address).collect();
        let planes = Buffer::of(&addresses).unwrap();
        Memory { pool, run, block, plane, bytes, buffers, planes }
    }

    /// The allocation of a run, and where it begins there.
    fn place(&self, plane: usize, block: usize, run: usize) -> (usize, usize) {
        let at = block * self.block + run * self.run;
        if self.pool.apart { (plane, at) } else { (0, plane * self.plane + at) }
    }

    /// Base, planes, strides of planes, blocks and runs.
    fn params(&self) -> (u64, u64, i64, i64, i64) {
        let (base, planes) = if self.pool.apart {
            (0, self.planes.address())
        } else {
            (self.buffers[0].address(), 0)
        };
        (base, planes, self.plane as i64, self.block as i64, self.run as i64)
    }
}

/// Runs the case with zeros where `zero`; `spoil` may change the list. Returns the error flag.
fn check(case: Case, zero: bool, spoil: fn(&mut [[i64; 2]])) -> u32 {
    let mut rng = Rng::new((case.run_bytes + case.planes) as u64);
    let from = Memory::new(&case, case.from, &mut rng);
    let mut to = Memory::new(&case, case.to, &mut rng);
    // Every target once, in a scattered order.
    let mut targets: Vec<i64> = (0..case.to.blocks as i64).collect();
    for i in (1..targets.len()).rev() {
        targets.swap(i, rng.below(i + 1));
    }
    let mut list: Vec<[i64; 2]> = (0..case.entries)
        .map(|i| [rng.below(case.from.blocks) as i64, targets[i % targets.len()]])
        .collect();
    spoil(&mut list);
    let flat: Vec<i64> =
        list.iter().flat_map(|&[a, b]| if zero { vec![b] } else { vec![a, b] }).collect();
    let narrow: Vec<i32> = flat.iter().map(|&id| id as i32).collect();
    let list_at =
        if case.wide_ids { Buffer::of(&flat).unwrap() } else { Buffer::of(&narrow).unwrap() };
    let tokens: Vec<u32> =
        (0..case.entries as u32).map(|i| [0, 1, 5, 1000][i as usize % 4]).collect();
    let tokens_at = Buffer::of(&tokens).unwrap();
    let flag = Buffer::of(&[0u32]).unwrap();

    let (f, t) = (from.params(), to.params());
    let mut params = CopyParams {
        from: In::at(f.0),
        to: Out::at(t.0),
        from_planes: In::at(f.1),
        to_planes: In::at(t.1),
        list: In::at(list_at.address()),
        tokens: case.token_bytes.map_or(In::NULL, |_| In::at(tokens_at.address())),
        error_flag: Out::at(flag.address()),
        from_plane: f.2,
        from_block: f.3,
        from_run: f.4,
        to_plane: t.2,
        to_block: t.3,
        to_run: t.4,
        count: case.entries as u32,
        wide_ids: u32::from(case.wide_ids),
        planes: case.planes as u32,
        runs: case.runs as u32,
        run_bytes: case.run_bytes as u32,
        token_bytes: case.token_bytes.unwrap_or(0) as u32,
        from_blocks: case.from.blocks as u32,
        to_blocks: case.to.blocks as u32,
        ..CopyParams::default()
    };
    let plan = if zero { zero_launch } else { copy_launch }(&mut params, case.multiprocessors);
    let plan = plan.unwrap().unwrap();
    let options = Options { schedule: case.schedule, ..Options::default() };
    // SAFETY: every address is that of a buffer that lives to the end of this function.
    unsafe { launch(plan.kernel.name, plan.grid, plan.kernel.threads, 0, &params, options) }
        .unwrap();

    for (i, &[a, b]) in list.iter().enumerate() {
        let known = |id: i64, pool: Pool| (0..pool.blocks as i64).contains(&id);
        if !known(b, case.to) || (!zero && !known(a, case.from)) {
            continue;
        }
        let bytes = case.token_bytes.map_or(case.run_bytes, |token| {
            (tokens[i] as usize * token).next_multiple_of(16).min(case.run_bytes)
        });
        for plane in 0..case.planes {
            for run in 0..case.runs {
                let (part, at) = to.place(plane, b as usize, run);
                if zero {
                    to.bytes[part][at..at + bytes].fill(0);
                } else {
                    let (other, start) = from.place(plane, a as usize, run);
                    let source = &from.bytes[other][start..start + bytes];
                    to.bytes[part][at..at + bytes].copy_from_slice(source);
                }
            }
        }
    }
    for (memory, name) in [(&from, "from"), (&to, "to")] {
        for (buffer, want) in memory.buffers.iter().zip(&memory.bytes) {
            assert!(buffer.read::<u8>() == *want, "{case:?} zero {zero}: {name} differs");
        }
    }
    flag.read::<u32>()[0]
}

fn nothing(_: &mut [[i64; 2]]) {}

#[test]
fn any_size_under_every_schedule() {
    for run_bytes in [16, 512, 4080, 4096, 4112, 70_000] {
        for multiprocessors in [1, 40] {
            for schedule in Schedule::ALL {
                let case = Case { run_bytes, multiprocessors, schedule, ..BASE };
                assert_eq!(check(case, false, nothing), 0);
                assert_eq!(check(case, true, nothing), 0);
            }
        }
    }
}

#[test]
fn any_layout_of_either_pool() {
    let pools = [
        POOL,
        Pool { blocks: 30, apart: true, gap: 0 },
        Pool { blocks: 7, apart: false, gap: 48 },
        Pool { blocks: 6, apart: true, gap: 16 },
    ];
    for from in pools {
        for to in pools {
            for (planes, runs, run_bytes) in [(1, 1, 4096), (3, 1, 2048), (2, 5, 272), (1, 8, 6000)]
            {
                for wide_ids in [false, true] {
                    let case = Case { from, to, planes, runs, run_bytes, wide_ids, ..BASE };
                    assert_eq!(check(case, false, nothing), 0);
                    assert_eq!(check(case, true, nothing), 0);
                }
            }
        }
    }
}

#[test]
fn the_first_tokens_of_every_run() {
    for (run_bytes, token_bytes) in [(2048, 128), (96, 6), (8192, 512), (64, 4), (16_384, 1024)] {
        let case = Case { runs: 3, planes: 2, run_bytes, token_bytes: Some(token_bytes), ..BASE };
        assert_eq!(check(case, false, nothing), 0);
        assert_eq!(check(case, true, nothing), 0);
    }
}

#[test]
fn bad_ids_are_masked_and_flagged_and_padding_is_not() {
    let padding = |list: &mut [[i64; 2]]| {
        list[1] = [-1, -1];
        list[5] = [-1, -1];
    };
    for wide_ids in [false, true] {
        let case = Case { wide_ids, planes: 2, ..BASE };
        assert_eq!(check(case, false, padding), 0);
        assert_eq!(check(case, true, padding), 0);
        assert_eq!(check(case, false, |list| list[2][0] = 9), 1);
        assert_eq!(check(case, false, |list| list[2][0] = -1), 1);
        assert_eq!(check(case, false, |list| list[0][1] = -1), 1);
        assert_eq!(check(case, false, |list| list[3][1] = i64::from(i32::MIN)), 1);
        assert_eq!(check(case, true, |list| list[3][1] = 9), 1);
        assert_eq!(check(case, true, |list| list[0][1] = -2), 1);
    }
    // Ids whose low half alone would be good.
    let case = Case { wide_ids: true, ..BASE };
    assert_eq!(check(case, false, |list| list[2][0] = 1 << 32), 1);
    assert_eq!(check(case, true, |list| list[2][1] = i64::MIN), 1);
}
