//! Cascade attention in the emulator: split, the shared half by prefill or decode, the own half by
//! decode, merge; against the reference over the whole context in f64.
#![cfg(feature = "emulate")]

mod device;

use device::{Rng, Values};
use kvcache::attention::{HeadShape, PagedKv, Scoring, reference_attention};
use kvcache::dtype::{DType, KvFormat, Rows};
use kvcache::emu::{Buffer, Options, Schedule, launch};
use kvcache::kernels::params::{CascadeSegment, DecodeParams, In, Out, PrefillParams};
use kvcache::kernels::{
    CascadeBounds, CascadeInput, CascadeOutput, CascadePlan, DecodeBounds, DecodePlan, Half,
    Launch, Pieces, PrefillBounds, SM90_SHARED_BYTES, prefill_launch,
};
use kvcache::layout::Strides;

const BT: usize = 16;
const DIM: usize = 64;
const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2;

#[derive(Debug, Clone)]
struct Case {
    /// Sequences and the blocks that they truly share, in order.
    groups: Vec<(usize, usize)>,
    /// What the list claims, where it is not the truth.
    claimed: Option<Vec<(usize, usize)>>,
    /// Rows and tokens of each sequence.
    lengths: Vec<(usize, usize)>,
    ragged: bool,
    csr: bool,
    sinks: bool,
    /// The shared half by prefill, which takes any number of rows; else by decode, up to eight.
    prefill: bool,
    /// Entries beyond those that cover the batch.
    fillers: usize,
    schedule: Schedule,
}

impl Default for Case {
    fn default() -> Self {
        Case {
            groups: vec![(1, 0), (3, 4), (2, 0), (2, 20)],
            claimed: None,
            lengths: [90, 70, 64 + 1, 300, 0, 33, 600, 333].map(|tokens| (1, tokens)).to_vec(),
            ragged: false,
            csr: false,
            sinks: false,
            prefill: true,
            fillers: 2,
            schedule: Schedule::Forward,
        }
    }
}

/// Runs a launch with its parameters.
fn run<P: Copy>(plan: Launch, params: &P, schedule: Schedule) {
    let options = Options { schedule, ..Options::default() };
    let (kernel, shared) = (plan.kernel, plan.shared_bytes);
    // SAFETY: the callers' addresses are those of buffers that live to the end of `check`.
    unsafe { launch(kernel.name, plan.grid, kernel.threads, shared, params, options) }.unwrap();
}

/// Runs the case and compares; returns the error flag and the shared tokens of each segment.
fn check(case: &Case) -> (u32, Vec<i32>) {
    let what = format!("{case:?}");
    let mut rng = Rng::new(case.lengths.len() as u64);
    let batch = case.lengths.len();
    // The members of a group begin with the same blocks; all other blocks are their own.
    let mut tables: Vec<Vec<i32>> = Vec::new();
    let mut next = 0i32;
    let mut fresh = |n: usize| {
        next += n as i32;
        (next - n as i32..next).collect::<Vec<i32>>()
    };
    for &(seqs, shared) in &case.groups {
        let prefix = fresh(shared);
        for _ in 0..seqs {
            let blocks = case.lengths[tables.len()].1.div_ceil(BT);
            let mut table = prefix[..shared.min(blocks)].to_vec();
            table.extend(fresh(blocks - table.len()));
            tables.push(table);
        }
    }
    let num_blocks = next as usize + 1;
    let elements = num_blocks * KV_HEADS * BT * DIM;
    let mut normal = |n: usize| (0..n).map(|_| rng.normal()).collect::<Vec<f32>>();
    let k = Values::new(DType::F16, &normal(elements));
    let v = Values::new(DType::F16, &normal(elements));
    let mut q_indptr = vec![0i32];
    for l in &case.lengths {
        q_indptr.push(q_indptr[q_indptr.len() - 1] + l.0 as i32);
    }
    let rows = q_indptr[batch] as usize;
    let q = Values::new(DType::F16, &normal(rows * Q_HEADS * DIM));
    let sinks: Vec<f32> = normal(Q_HEADS);

    let narrow = |values: &Values| values.values.iter().map(|&x| x as f32).collect::<Vec<_>>();
    let (k32, v32, q32) = (narrow(&k), narrow(&v), narrow(&q));
    let (d, bt) = (DIM as i64, BT as i64);
    let strides = Strides { block: KV_HEADS as i64 * bt * d, head: bt * d, token: d };
    let kv = PagedKv {
        k: Rows::F32(&k32),
        v: Rows::F32(&v32),
        k_offset: 0,
        v_offset: 0,
        k_strides: strides,
        v_strides: strides,
        block_tokens: BT,
        num_blocks,
        tables: tables.iter().map(|t| &t[..]).collect(),
    };
    let shape = HeadShape {
        q_heads: Q_HEADS as u32,
        kv_heads: KV_HEADS as u32,
        k_dim: DIM as u32,
        v_dim: DIM as u32,
        v_in_k: false,
    };
    let scoring =
        Scoring { sinks: case.sinks.then_some(&sinks[..]), ..Scoring::causal(DIM as u32) };
    let indptr: Vec<usize> = q_indptr.iter().map(|&i| i as usize).collect();
    let lens: Vec<usize> = case.lengths.iter().map(|l| l.1).collect();
    let want = reference_attention(&shape, &scoring, &kv, Rows::F32(&q32), &indptr, &lens).unwrap();

    // The batch on the device.
    let seq_lens: Vec<i32> = lens.iter().map(|&n| n as i32).collect();
    let widest = tables.iter().map(Vec::len).max().unwrap() + 1;
    let (mut flat, mut table_indptr) = (Vec::new(), vec![0]);
    for (i, table) in tables.iter().enumerate() {
        flat.extend_from_slice(table);
        if !case.csr {
            flat.resize((i + 1) * widest, i32::MIN);
        }
        table_indptr.push(flat.len() as i32);
    }
    let (seq_lens, q_indptr) = (Buffer::of(&seq_lens).unwrap(), Buffer::of(&q_indptr).unwrap());
    let (table, table_indptr) = (Buffer::of(&flat).unwrap(), Buffer::of(&table_indptr).unwrap());
    let (flag, sinks_at) = (Buffer::of(&[0u32]).unwrap(), Buffer::of(&sinks).unwrap());
    let mut segments: Vec<CascadeSegment> = Vec::new();
    let mut first_seq = 0;
    for &(seqs, shared) in case.claimed.as_ref().unwrap_or(&case.groups) {
        let (seqs, shared_blocks) = (seqs as u32, shared as u32);
        segments.push(CascadeSegment { first_seq, seqs, shared_blocks, reserved: 0 });
        first_seq += seqs;
    }
    for _ in 0..case.fillers {
        segments.push(CascadeSegment { first_seq, ..CascadeSegment::default() });
    }

    // The split.
    let plan = CascadePlan::new(CascadeBounds {
        q_heads: Q_HEADS as u32,
        head_dim: DIM as u32,
        batch: batch as u32,
        rows: rows as u32,
        segments: segments.len() as u32,
        block_tokens: BT as u32,
        chunks: 1,
    })
    .unwrap();
    let words: Vec<u32> =
        segments.iter().flat_map(|s| [s.first_seq, s.seqs, s.shared_blocks, s.reserved]).collect();
    let segments_at = Buffer::of(&words).unwrap();
    let workspace = Buffer::new(plan.workspace_bytes() as usize).unwrap();
    let base = workspace.address();
    let q_len = case.lengths.iter().map(|l| l.0).max().unwrap() as u32;
    let input = CascadeInput {
        segments: In::at(segments_at.address()),
        batch: batch as u32,
        seq_lens: In::at(seq_lens.address()),
        q_indptr: if case.ragged { In::at(q_indptr.address()) } else { In::NULL },
        q_len,
        table: In::at(table.address()),
        table_indptr: if case.csr { In::at(table_indptr.address()) } else { In::NULL },
        table_stride: widest as i64,
        error_flag: Out::at(flag.address()),
    };
    let (split, params) = plan.split_launch(base, &input).unwrap();
    run(split, &params, case.schedule);

    let decode_half = |half: Half, q_indptr: In<i32>, q_len: u32, causal: bool| {
        let decode = DecodePlan::new(DecodeBounds {
            format: KvFormat::F16,
            head_dim: DIM as u32,
            tile_tokens: 0,
            q_heads: Q_HEADS as u32,
            kv_heads: KV_HEADS as u32,
            q_len,
            batch: half.batch,
            max_tokens: 1 << 12,
            pieces: Pieces::Balanced,
            multiprocessors: 4,
            multiprocessor_shared_bytes: SM90_SHARED_BYTES,
        })
        .unwrap();
        let scratch = Buffer::new(decode.workspace_bytes() as usize).unwrap();
        let row = (Q_HEADS * DIM) as i64;
        let mut params = DecodeParams {
            q: In::at(q.address()),
            k: In::at(k.address()),
            v: In::at(v.address()),
            out: Out::at(half.out.0),
            lse: half.lse,
            q_indptr,
            table: input.table,
            table_indptr: half.table_indptr,
            seq_lens: half.seq_lens,
            error_flag: Out::at(flag.address()),
            q_row: row,
            q_head: d,
            out_row: row,
            out_head: d,
            k_block: strides.block,
            k_head: strides.head,
            k_token: strides.token,
            v_block: strides.block,
            v_head: strides.head,
            v_token: strides.token,
            causal: u32::from(causal),
            block_tokens: BT as u32,
            num_blocks: num_blocks as u32,
            q_dtype: DType::F16.id(),
            out_dtype: DType::F32.id(),
            scale: scoring.scale,
            ..DecodeParams::default()
        };
        let at = scratch.address();
        let (first, plan_params) =
            decode.plan_launch(at, half.seq_lens, half.batch, None, params.error_flag).unwrap();
        run(first, &plan_params, case.schedule);
        run(decode.decode_launch(at, &mut params).unwrap(), &params, case.schedule);
    };
    let shared = plan.shared(base);
    if case.prefill {
        let row = (Q_HEADS * DIM) as i64;
        let mut params = PrefillParams {
            q: In::at(q.address()),
            k: In::at(k.address()),
            v: In::at(v.address()),
            out: Out::at(shared.out.0),
            lse: shared.lse,
            q_indptr: shared.q_indptr,
            table: input.table,
            table_indptr: shared.table_indptr,
            seq_lens: shared.seq_lens,
            error_flag: Out::at(flag.address()),
            q_row: row,
            q_head: d,
            out_row: row,
            out_head: d,
            k_block: strides.block,
            k_head: strides.head,
            k_token: strides.token,
            v_block: strides.block,
            v_head: strides.head,
            v_token: strides.token,
            block_tokens: BT as u32,
            num_blocks: num_blocks as u32,
            q_dtype: DType::F16.id(),
            out_dtype: DType::F32.id(),
            scale: scoring.scale,
            ..PrefillParams::default()
        };
        let bounds = PrefillBounds {
            format: KvFormat::F16,
            head_dim: DIM as u32,
            q_heads: Q_HEADS as u32,
            kv_heads: KV_HEADS as u32,
            batch: shared.batch,
            q_tokens: rows as u32,
        };
        run(prefill_launch(&bounds, &mut params).unwrap(), &params, case.schedule);
    } else {
        decode_half(shared, shared.q_indptr, 8, false);
    }
    decode_half(plan.own(base, batch as u32), input.q_indptr, q_len, true);

    // The merge.
    let out = Values::new(DType::F16, &vec![f32::NAN; rows * Q_HEADS * DIM]);
    let lse = Buffer::new(rows * Q_HEADS * 4).unwrap();
    let to = CascadeOutput {
        out: Out::<u32>::at(out.address()),
        dtype: DType::F16,
        row: (Q_HEADS * DIM) as i64,
        head: d,
        lse: Out::at(lse.address()),
        sinks: if case.sinks { In::at(sinks_at.address()) } else { In::NULL },
    };
    let (merge, params) = plan.merge_launch(base, rows as u32, &to, 4).unwrap().unwrap();
    run(merge, &params, case.schedule);

    out.must_be(&want.out, 2.0 * device::epsilon(DType::F16), &what);
    for (i, (&got, &want)) in lse.read::<f32>().iter().zip(&want.lse).enumerate() {
        let got = f64::from(got);
        let good = got == want || (got - want).abs() <= 2e-5 * want.abs().max(1.0);
        assert!(good, "{what} LSE [{i}]: {got}, not {want}");
    }
    let used: Vec<i32> = {
        let words = workspace.read::<i32>();
        let at = ((shared.seq_lens.0 - base) / 4) as usize;
        words[at..at + segments.len()].to_vec()
    };
    (flag.read::<u32>()[0], used)
}

#[test]
fn shared_and_own_parts_make_the_whole() {
    let combinations = [(false, false), (true, false), (false, true), (true, true)];
    for (schedule, (csr, sinks)) in Schedule::ALL.into_iter().zip(combinations) {
        for prefill in [false, true] {
            let case = Case { csr, sinks, schedule, prefill, ..Case::default() };
            assert_eq!(check(&case), (0, vec![0, 64, 0, 320, 0, 0]));
        }
    }
}

#[test]
fn several_rows_and_ragged_ones() {
    let lengths: Vec<_> = [90, 70, 66, 300, 34, 600].map(|tokens| (2, tokens)).to_vec();
    let groups = vec![(1, 0), (3, 4), (2, 2)];
    let case = Case { lengths, groups, ..Case::default() };
    assert_eq!(check(&case), (0, vec![0, 64, 32, 0, 0]));
    let lengths = vec![(1, 90), (4, 70), (0, 64), (3, 67), (2, 40), (5, 5), (1, 7)];
    let groups = vec![(1, 0), (3, 4), (1, 2), (2, 0)];
    for csr in [false, true] {
        let (lengths, groups) = (lengths.clone(), groups.clone());
        let case = Case { lengths, groups, ragged: true, csr, ..Case::default() };
        assert_eq!(check(&case), (0, vec![0, 64, 32, 0, 0, 0]));
    }
}

#[test]
fn many_sequences_over_one_prefix() {
    // 90 rows with two heads each: more than a tile of the shared half has.
    let lengths: Vec<_> = (0..90).map(|i| (1, 129 + i * 3)).collect();
    let case = Case { lengths, groups: vec![(90, 8)], fillers: 0, ..Case::default() };
    assert_eq!(check(&case), (0, vec![128]));
}

#[test]
fn a_claim_is_used_only_as_far_as_it_is_true() {
    // Sequence 2 has 65 tokens: a prefix of 5 blocks would hide its own query from the mask.
    let long = Case { claimed: Some(vec![(1, 3), (3, 5), (2, 1), (2, 1000)]), ..Case::default() };
    for csr in [false, true] {
        let case = Case { csr, ..long.clone() };
        // A single sequence may be split too; one of no tokens shares nothing.
        assert_eq!(check(&case), (8, vec![48, 64, 0, 320, 0, 0]));
        // Sequences that share nothing.
        let claimed = Some(vec![(4, 4), (4, 2)]);
        assert_eq!(check(&Case { claimed, ..case }), (8, vec![0, 0, 0, 0]));
    }
    // A prefix must end before the queries: the last token of a sequence is never in it.
    let mut last = Case::default();
    last.lengths[2].1 = 64;
    assert_eq!(check(&last), (8, vec![0, 48, 0, 320, 0, 0]));
    // Less than the truth is used as it is.
    let claimed = Some(vec![(1, 0), (3, 1), (2, 0), (2, 7)]);
    let case = Case { claimed, ..Case::default() };
    assert_eq!(check(&case), (0, vec![0, 16, 0, 112, 0, 0]));
}
