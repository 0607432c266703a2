//! The emulator's products of a warpgroup: every operand layout against the definition, and every
//! detector on a bug planted for it (cuda/emu/probes_wgmma.cu).
#![cfg(feature = "emulate")]

#[path = "device/probe.rs"]
mod probe;

use half::{bf16, f16};
use kvcache::emu::{FaultKind, Options, Schedule};
use probe::{options, run};

/// Steps of 16 that a product is made of.
const STEPS: usize = 3;
const DEPTH: usize = 16 * STEPS;

/// How an operand lies in shared memory.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Layout {
    /// Whether k runs along the rows of shared memory.
    k_major: bool,
    /// Bytes of a swizzled row; 16 for none.
    width: usize,
}

/// Where an operand's elements are, and what its descriptors say.
struct Placed {
    bytes: usize,
    leading: usize,
    stride: usize,
    starts: [usize; STEPS],
}

impl Layout {
    fn all() -> impl Iterator<Item = Layout> {
        [true, false].into_iter().flat_map(|k_major| {
            [16, 32, 64, 128].into_iter().map(move |width| Layout { k_major, width })
        })
    }

    fn swizzle_id(self) -> u32 {
        [(16, 0), (128, 1), (64, 2), (32, 3)].iter().find(|x| x.0 == self.width).unwrap().1
    }

    /// An operand of `rows` (columns, for B) from a multiple of 1024 bytes.
    fn place(self, rows: usize) -> Placed {
        let w = self.width;
        let (leading, stride, step_bytes, bytes) = match (self.k_major, w) {
            // Chunks of 8 rows, all of a group of rows together.
            (true, 16) => (128, 128 * DEPTH / 8, 256, rows * DEPTH * 2),
            (false, 16) => (128 * rows / 8, 128, 256 * rows / 8, rows * DEPTH * 2),
            // Strips of `w` bytes of k, each with all rows.
            (true, _) => (0, 8 * w, 0, rows * w * (DEPTH * 2).div_ceil(w)),
            // Strips of `w` bytes of rows, each with all of k.
            (false, _) => (DEPTH * w, 8 * w, 16 * w, DEPTH * w * (rows * 2).div_ceil(w)),
        };
        let start = |step: usize| {
            if self.k_major && w > 16 {
                let byte = step * 32;
                byte / w * rows * w + byte % w
            } else {
                step * step_bytes
            }
        };
        Placed { bytes, leading, stride, starts: [start(0), start(1), start(2)] }
    }

    /// The byte of an element: chunks of a row are xored with the row's number, counted in units of
    /// 128 bytes.
    fn at(self, row: usize, k: usize, rows: usize) -> usize {
        let w = self.width;
        let (along, across) = if self.k_major { (k, row) } else { (row, k) };
        if w == 16 {
            let (groups, chunk) =
                if self.k_major { (DEPTH / 8, k / 8) } else { (rows / 8, row / 8) };
            let group = across / 8 * groups + chunk;
            return group * 128 + across % 8 * 16 + along % 8 * 2;
        }
        let strip = along * 2 / w * (if self.k_major { rows } else { DEPTH }) * w;
        let chunk = (along * 2 % w / 16) ^ (across * w / 128 % (w / 16));
        strip + across * w + chunk * 16 + along % 8 * 2
    }
}

fn value(i: usize) -> f32 {
    ((i * 37 + 11) % 29) as f32 / 4.0 - 3.0
}

/// The words of little-endian bytes.
fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Runs a product of `columns` and compares it with the definition. Multiples of 1/4 up to 4 are
/// exact in both formats, and so are all sums.
fn check(brain: bool, columns: usize, a: Option<Layout>, b: Layout, options: Options) {
    let what = format!("bf16 {brain}, {columns} columns, A {a:?}, B {b:?}, {options:?}");
    let bits = |x: f32| {
        if brain { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() }.to_le_bytes()
    };
    let in_a = |row: usize, k: usize| value(row * DEPTH + k);
    let in_b = |k: usize, column: usize| value(7 * (k * columns + column) + 3);
    let a_shape = a.unwrap_or(Layout { k_major: true, width: 16 });
    let (a_at, b_at) = (a_shape.place(64), b.place(columns));
    let b_from = a_at.bytes.next_multiple_of(1024);
    // What no element lies in is NaN.
    let mut image = vec![0xff; (b_from + b_at.bytes).next_multiple_of(16)];
    let mut rows = Vec::new();
    for k in 0..DEPTH {
        for row in 0..64 {
            let at = a_shape.at(row, k, 64);
            image[at..at + 2].copy_from_slice(&bits(in_a(row, k)));
        }
        for column in 0..columns {
            let at = b_from + b.at(column, k, columns);
            image[at..at + 2].copy_from_slice(&bits(in_b(k, column)));
        }
    }
    for row in 0..64 {
        rows.extend((0..DEPTH).flat_map(|k| bits(in_a(row, k))));
    }
    let mut input = vec![(image.len() / 4) as u32, STEPS as u32];
    input.extend([a_at.leading, a_at.stride, b_at.leading, b_at.stride].map(|x| x as u32));
    input.extend([a_shape.swizzle_id(), b.swizzle_id()]);
    for step in 0..STEPS {
        input.extend([a_at.starts[step] as u32, (b_from + b_at.starts[step]) as u32]);
    }
    input.resize(32, 0);
    input.extend(words(&image));
    input.extend(words(&rows));
    let start: Vec<f32> = (0..64 * columns).map(|i| value(5 * i + 1)).collect();
    let output: Vec<u32> = start.iter().map(|x| x.to_bits()).collect();
    let mode = u32::from(brain)
        | u32::from(!a_shape.k_major) << 1
        | u32::from(!b.k_major) << 2
        | u32::from(a.is_none()) << 3;
    let (bytes, n) = (image.len() as u32, columns as u32);
    let out =
        run("kvc_probe_wgmma", 1, 128, bytes, &input, &output, (mode, n), options).expect(&what);
    for row in 0..64 {
        for column in 0..columns {
            let product = (0..DEPTH).map(|k| in_a(row, k) * in_b(k, column)).sum::<f32>();
            let got = f32::from_bits(out[row * columns + column]);
            assert_eq!(got, start[row * columns + column] + product, "{what} [{row}][{column}]");
        }
    }
}

const LATE: Options = Options { schedule: Schedule::Forward, fibers: kvcache::emu::Fibers::Native };
const EARLY: Options = Options { schedule: Schedule::Reverse, ..LATE };

#[test]
fn products_of_operands_in_shared_memory() {
    for a in Layout::all() {
        for b in Layout::all() {
            for (columns, brain) in [(8, false), (64, true)] {
                check(brain, columns, Some(a), b, if a.width < b.width { LATE } else { EARLY });
            }
        }
    }
    let widest = Layout { k_major: true, width: 128 };
    check(true, 256, Some(widest), widest, LATE);
}

#[test]
fn products_of_registers() {
    for b in Layout::all() {
        for (columns, brain) in [(8, true), (64, false)] {
            check(brain, columns, None, b, LATE);
        }
    }
}

#[test]
fn products_under_every_schedule() {
    let (a, b) = (Layout { k_major: true, width: 64 }, Layout { k_major: false, width: 128 });
    for options in options() {
        check(true, 64, Some(a), b, options);
        check(false, 8, None, b, options);
    }
}

/// Runs the probe with a bug planted: A and B all ones, so that two products give 32.
fn plant(
    mode: u32,
    n: u32,
    threads: u32,
    options: Options,
) -> Result<Vec<u32>, kvcache::emu::Fault> {
    let ones = vec![0x3c00_3c00; 576];
    run("kvc_probe_wgmma_bug", 1, threads, 2304, &ones, &[0; 512], (mode, n), options)
}

fn must_fault(mode: u32, n: u32, threads: u32, kind: FaultKind) {
    for options in options() {
        let fault = plant(mode, n, threads, options).expect_err("the bug must be seen");
        assert_eq!(fault.kind, kind, "mode {mode}: {fault}");
    }
}

fn all(out: &[u32], is: impl Fn(f32) -> bool) -> bool {
    out.iter().all(|&bits| is(f32::from_bits(bits)))
}

#[test]
fn missing_waits_commits_and_fences_are_faults() {
    for options in options() {
        assert!(all(&plant(0, 0, 128, options).unwrap(), |x| x == 32.0));
    }
    for mode in [2, 3, 5] {
        must_fault(mode, 0, 128, FaultKind::Protocol);
    }
}

#[test]
fn writes_that_were_not_fenced_are_not_seen() {
    assert!(all(&plant(1, 0, 128, LATE).unwrap(), f32::is_nan));
    assert!(all(&plant(1, 0, 128, EARLY).unwrap(), |x| x == 32.0));
}

#[test]
fn operands_overwritten_and_sums_read_too_early_show() {
    // Overwritten with zeros before the wait: right only if the product happened at once.
    assert!(all(&plant(4, 0, 128, LATE).unwrap(), |x| x == 0.0));
    assert!(all(&plant(4, 0, 128, EARLY).unwrap(), |x| x == 32.0));
    assert!(all(&plant(10, 0, 128, LATE).unwrap(), f32::is_nan));
    assert!(all(&plant(10, 0, 128, EARLY).unwrap(), |x| x == 32.0));
}

#[test]
fn warps_and_lanes_must_agree() {
    must_fault(6, 0, 128, FaultKind::Diverged);
    must_fault(9, 0, 128, FaultKind::Diverged);
    must_fault(0, 0, 96, FaultKind::Diverged);
}

#[test]
fn impossible_descriptors_are_caught() {
    must_fault(7, 0, 128, FaultKind::Protocol);
    must_fault(8, 68, 128, FaultKind::Shared);
}
