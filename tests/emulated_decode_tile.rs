//! Paged decode over sealed tiles and raw ones in the emulator, against the reference in f64 over what
//! each query is to read: its own tile raw, those before it sealed.
#![cfg(feature = "emulate")]

mod device;

use device::{Rng, Values};
use kvcache::attention::{HeadShape, KvSource, Scoring, reference_attention};
use kvcache::dtype::{DType, KvFormat, Rows, bf16};
use kvcache::emu::{Buffer, Options, Schedule, launch};
use kvcache::kernels::params::{DecodeParams, DecodeTileParams, In, Out};
use kvcache::kernels::{DecodeBounds, DecodePlan, Pieces};
use kvcache::layout::tile::{TileLayout, TileShape};
use kvcache::quant::{Stored, Tile, seal};

const FORMATS: [KvFormat; 5] =
    [KvFormat::Kt8v8, KvFormat::Kt4v4, KvFormat::Kt3v3, KvFormat::Kt4v2, KvFormat::Kt2v2];

#[derive(Debug, Clone)]
struct Case {
    format: KvFormat,
    dim: usize,
    tokens: usize,
    q_heads: usize,
    kv_heads: usize,
    /// Query rows and cached tokens of each sequence.
    lengths: Vec<(usize, usize)>,
    rows: DType,
    /// Sequence and tile that could not be sealed; whether its raw rows are still there.
    unsealed: Option<(usize, usize, bool)>,
    /// Sequence and tile whose table entry is no block.
    lost: Option<(usize, usize)>,
    /// Raw slots beyond these are in scratch.
    staging: usize,
    csr: bool,
    bulk: bool,
    window: Option<u32>,
    softcap: Option<f32>,
    sinks: bool,
    alibi: bool,
    pieces: Pieces,
    multiprocessors: u32,
    shared_kib: u32,
    /// Keys have channels far from 0, values of very different size.
    outliers: bool,
    schedule: Schedule,
    seed: u64,
}

impl Default for Case {
    fn default() -> Self {
        Case {
            format: KvFormat::Kt4v4,
            dim: 64,
            tokens: 64,
            q_heads: 4,
            kv_heads: 2,
            lengths: vec![(1, 300), (1, 64), (1, 65), (1, 1), (1, 0), (1, 448)],
            rows: DType::F16,
            unsealed: None,
            lost: None,
            staging: 100,
            csr: false,
            bulk: true,
            window: None,
            softcap: None,
            sinks: false,
            alibi: false,
            pieces: Pieces::Balanced,
            multiprocessors: 4,
            shared_kib: 228,
            outliers: false,
            schedule: Schedule::Forward,
            seed: 1,
        }
    }
}

/// Rows `[token][dim]` of one sequence and head, raw and as their records say.
struct Head {
    raw: [Vec<f32>; 2],
    sealed: [Vec<f32>; 2],
}

/// What one query sees of a sequence.
struct Seen<'a> {
    case: &'a Case,
    heads: &'a [Head],
    seq: usize,
    own: usize,
}

impl Seen<'_> {
    fn element(&self, side: usize, head: usize, position: usize, channel: usize) -> Option<f64> {
        let tile = position / self.case.tokens;
        let unsealed = self.case.unsealed.is_some_and(|(seq, at, _)| (seq, at) == (self.seq, tile));
        let kept = self.case.unsealed.is_some_and(|(_, _, kept)| kept);
        if tile < self.own && ((unsealed && !kept) || self.case.lost == Some((self.seq, tile))) {
            return None;
        }
        let head = &self.heads[head];
        let rows = if tile == self.own || unsealed { &head.raw } else { &head.sealed };
        Some(f64::from(rows[side][position * self.case.dim + channel]))
    }
}

impl KvSource for Seen<'_> {
    fn key(&self, _: usize, head: usize, position: usize, channel: usize) -> Option<f64> {
        self.element(0, head, position, channel)
    }
    fn value(&self, _: usize, head: usize, position: usize, channel: usize) -> f64 {
        self.element(1, head, position, channel).unwrap()
    }
}

fn check(case: Case) -> u32 {
    let (d, t, heads) = (case.dim, case.tokens, case.kv_heads);
    let shape = TileShape { k_dim: d as u32, v_dim: d as u32, v_in_k: false, tokens: t as u32 };
    let layout = TileLayout::new(case.format, shape).unwrap();
    let mut rng = Rng::new(case.seed);
    let what = format!("{case:?}");

    // Contents, records and raw rows.
    let tiles: Vec<usize> = case.lengths.iter().map(|l| l.1.div_ceil(t)).collect();
    let blocks: usize = tiles.iter().sum::<usize>() + 2;
    let mut order: Vec<i32> = (0..blocks as i32).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, rng.below(i + 1));
    }
    // Poison, but for a header that no sealed record has.
    let mut records = vec![0x7eu8; blocks * heads * layout.bytes()];
    let (mut tables, mut raw_lists) = (Vec::new(), Vec::new());
    let mut raw = Vec::new(); // [slot][K, V][head][token][dim]
    let mut all: Vec<Vec<Head>> = Vec::new();
    for (seq, &(rows, len)) in case.lengths.iter().enumerate() {
        let mut table = order.split_off(order.len() - tiles[seq]);
        let own_first = len.saturating_sub(rows.max(1)) / t;
        let own_last = len.saturating_sub(1) / t;
        let mut list: Vec<(i32, i32)> = Vec::new();
        let mut of_seq = Vec::new();
        for _ in 0..heads {
            let offsets: Vec<f32> = (0..d).map(|c| if c % 17 == 5 { 20.0 } else { 0.0 }).collect();
            let mut side = |outliers: bool| -> Vec<f32> {
                (0..tiles[seq] * t)
                    .flat_map(|token| {
                        let size = if outliers { [1.0, 1e-3, 30.0][token % 3] } else { 1.0 };
                        (0..d).map(|_| rng.normal() * size).collect::<Vec<_>>()
                    })
                    .collect()
            };
            let mut k = side(false);
            let v = side(case.outliers);
            if case.outliers {
                k.iter_mut().enumerate().for_each(|(i, x)| *x += offsets[i % d]);
            }
            let round =
                |x: Vec<f32>| x.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect::<Vec<_>>();
            let (k, v) = (round(k), round(v));
            of_seq.push(Head { sealed: [k.clone(), v.clone()], raw: [k, v] });
        }
        for tile in 0..tiles[seq] {
            let unsealed = case.unsealed.filter(|u| (u.0, u.1) == (seq, tile));
            for (h, head) in of_seq.iter_mut().enumerate() {
                let part = tile * t * d..(tile + 1) * t * d;
                let at = (table[tile] as usize * heads + h) * layout.bytes();
                let record = &mut records[at..at + layout.bytes()];
                if unsealed.is_some() || tile >= own_last {
                    continue;
                }
                let [k, v] = &head.raw;
                let sealed = seal(&layout, &k[part.clone()], &v[part.clone()], record).unwrap();
                assert_eq!(sealed, Stored::Encoded);
                let read = Tile::open(&layout, record).unwrap();
                read.keys(&mut head.sealed[0][part.clone()]).unwrap();
                read.values(&mut head.sealed[1][part]).unwrap();
            }
            if tile >= own_first || unsealed.is_some_and(|u| u.2) {
                list.push((tile as i32, (raw.len() / (2 * heads * t * d)) as i32));
                for side in 0..2 {
                    for head in &of_seq {
                        raw.extend_from_slice(&head.raw[side][tile * t * d..(tile + 1) * t * d]);
                    }
                }
            }
        }
        if let Some((_, tile)) = case.lost.filter(|l| l.0 == seq) {
            table[tile] = -7;
        }
        // Tiles that hold queries of the last row have no record yet.
        table.iter_mut().skip(own_last).for_each(|entry| *entry = i32::MAX);
        tables.push(table);
        raw_lists.push(list);
        all.push(of_seq);
    }

    // The reference, a row at a time.
    let sinks: Vec<f32> = (0..case.q_heads).map(|_| 2.0 * rng.normal()).collect();
    let slopes: Vec<f32> = (0..case.q_heads).map(|_| 0.1 * rng.normal().abs()).collect();
    let scoring = Scoring {
        window: case.window,
        softcap: case.softcap,
        sinks: case.sinks.then_some(&sinks[..]),
        alibi: case.alibi.then_some(&slopes[..]),
        ..Scoring::causal(d as u32)
    };
    let row_len = case.q_heads * d;
    let rows: usize = case.lengths.iter().map(|l| l.0).sum();
    let q: Vec<f32> = (0..rows * row_len).map(|_| rng.normal()).collect();
    let q = Values::new(case.rows, &q);
    let heads_shape = HeadShape {
        q_heads: case.q_heads as u32,
        kv_heads: heads as u32,
        k_dim: d as u32,
        v_dim: d as u32,
        v_in_k: false,
    };
    let (mut want, mut want_lse, mut q_indptr) = (Vec::new(), Vec::new(), vec![0i32]);
    let mut at = 0;
    for (seq, &(rows, len)) in case.lengths.iter().enumerate() {
        q_indptr.push(q_indptr[seq] + rows as i32);
        for row in 0..rows {
            let visible = (len + row + 1).saturating_sub(rows);
            let own = visible.saturating_sub(1) / t;
            let source = Seen { case: &case, heads: &all[seq], seq, own };
            let q: Vec<f32> =
                q.values[at * row_len..(at + 1) * row_len].iter().map(|&x| x as f32).collect();
            let one = reference_attention(
                &heads_shape,
                &scoring,
                &source,
                Rows::F32(&q),
                &[0, 1],
                &[visible],
            );
            let one = one.unwrap();
            want.extend(one.out);
            want_lse.extend(one.lse);
            at += 1;
        }
    }

    // The call.
    let plan = DecodePlan::new(DecodeBounds {
        format: case.format,
        head_dim: d as u32,
        tile_tokens: t as u32,
        q_heads: case.q_heads as u32,
        kv_heads: heads as u32,
        q_len: case.lengths.iter().map(|l| l.0).max().unwrap() as u32,
        batch: case.lengths.len() as u32,
        max_tokens: case.lengths.iter().map(|l| l.1).max().unwrap() as u32,
        pieces: case.pieces,
        multiprocessors: case.multiprocessors,
        multiprocessor_shared_bytes: case.shared_kib * 1024,
    })
    .unwrap();
    let widest = tables.iter().map(Vec::len).max().unwrap() + 1;
    let (mut flat, mut indptr) = (Vec::new(), vec![0i32]);
    let (mut raw_flat, mut raw_indptr) = (Vec::new(), vec![0i32]);
    for (i, (table, list)) in tables.iter().zip(&raw_lists).enumerate() {
        flat.extend_from_slice(table);
        if !case.csr {
            flat.resize((i + 1) * widest, i32::MIN);
        }
        indptr.push(flat.len() as i32);
        raw_flat.extend(list.iter().flat_map(|&(tile, slot)| [tile, slot]));
        raw_indptr.push(raw_flat.len() as i32 / 2);
    }
    raw_flat.extend([0, 0]);
    flat.push(0);
    raw.resize(raw.len().max(1), 0.0);
    let slot_len = 2 * heads * t * d;
    let slots = raw.len() / slot_len;
    let staged = case.staging.min(slots);
    let staging = Values::new(DType::Bf16, &raw[..(staged * slot_len).max(8)]);
    let scratch = Values::new(
        DType::Bf16,
        if slots > staged { &raw[staged * slot_len..] } else { &raw[..1] },
    );
    let (records, table) = (Buffer::of(&records).unwrap(), Buffer::of(&flat).unwrap());
    let (table_indptr, q_rows) = (Buffer::of(&indptr).unwrap(), Buffer::of(&q_indptr).unwrap());
    let (raw_table, raw_offsets) =
        (Buffer::of(&raw_flat).unwrap(), Buffer::of(&raw_indptr).unwrap());
    let lens: Vec<i32> = case.lengths.iter().map(|l| l.1 as i32).collect();
    let (lens, flag) = (Buffer::of(&lens).unwrap(), Buffer::of(&[0u32]).unwrap());
    let (sinks_at, slopes_at) = (Buffer::of(&sinks).unwrap(), Buffer::of(&slopes).unwrap());
    let workspace = Buffer::new(plan.workspace_bytes() as usize).unwrap();
    let out = Values::new(case.rows, &vec![f32::NAN; rows * row_len]);
    let lse = Buffer::new(rows * case.q_heads * 4).unwrap();
    fn given<T>(on: bool, buffer: &Buffer) -> In<T> {
        In::at(if on { buffer.address() } else { 0 })
    }
    let v_at = |values: &Values| In::at(values.address() + (heads * t * d * 2) as u64);
    let (block, head, token) = (slot_len as i64, (t * d) as i64, d as i64);
    let mut params = DecodeTileParams {
        call: DecodeParams {
            q: In::at(q.address()),
            k: In::at(staging.address()),
            v: v_at(&staging),
            out: Out::at(out.address()),
            lse: Out::at(lse.address()),
            q_indptr: In::at(q_rows.address()),
            table: In::at(table.address()),
            table_indptr: given(case.csr, &table_indptr),
            seq_lens: In::at(lens.address()),
            sinks: given(case.sinks, &sinks_at),
            slopes: given(case.alibi, &slopes_at),
            error_flag: Out::at(flag.address()),
            q_row: row_len as i64,
            q_head: d as i64,
            out_row: row_len as i64,
            out_head: d as i64,
            k_block: block,
            k_head: head,
            k_token: token,
            v_block: block,
            v_head: head,
            v_token: token,
            table_stride: widest as i64,
            causal: 1,
            block_tokens: t as u32,
            num_blocks: blocks as u32,
            window: case.window.unwrap_or(0),
            q_dtype: case.rows.id(),
            out_dtype: case.rows.id(),
            scale: scoring.scale,
            softcap: case.softcap.unwrap_or(0.0),
            ..DecodeParams::default()
        },
        records: In::at(records.address()),
        raw_indptr: In::at(raw_offsets.address()),
        raw_blocks: In::at(raw_table.address()),
        scratch_k: given(slots > staged, &scratch.buffer),
        scratch_v: if slots > staged { v_at(&scratch) } else { In::NULL },
        record_block: (heads * layout.bytes()) as i64,
        record_head: layout.bytes() as i64,
        scratch_k_block: block,
        scratch_k_head: head,
        scratch_k_token: token,
        scratch_v_block: block,
        scratch_v_head: head,
        scratch_v_token: token,
        staging_blocks: staged as u32,
        scratch_blocks: (slots - staged) as u32,
        ..DecodeTileParams::default()
    };
    let (first, plan_params) = plan
        .plan_launch(
            workspace.address(),
            In::at(lens.address()),
            case.lengths.len() as u32,
            case.window,
            Out::at(flag.address()),
        )
        .unwrap();
    let second = plan.decode_tile_launch(workspace.address(), &mut params).unwrap();
    params.call.bulk = u32::from(case.bulk);
    let options = Options { schedule: case.schedule, ..Options::default() };
    // SAFETY: every address is that of a buffer that lives to the end of this function.
    unsafe {
        let (kernel, shared) = (first.kernel, first.shared_bytes);
        launch(kernel.name, first.grid, kernel.threads, shared, &plan_params, options).unwrap();
        let (kernel, shared) = (second.kernel, second.shared_bytes);
        launch(kernel.name, second.grid, kernel.threads, shared, &params, options).unwrap();
    }
    // Raw keys and weights of raw values are rounded to bf16 with the queries; sealed ones to f16.
    let largest = all
        .iter()
        .flatten()
        .flat_map(|h| &h.raw[1])
        .fold(1.0f64, |a, &x| a.max(f64::from(x.abs())));
    out.must_be(&want, largest * 4e-3, &what);
    for (i, (&got, &want)) in lse.read::<f32>().iter().zip(&want_lse).enumerate() {
        let got = f64::from(got);
        let good = got == want || (got - want).abs() <= 8e-3 * want.abs().max(1.0);
        assert!(good, "{what} LSE [{i}]: {got}, not {want}");
    }
    flag.read::<u32>()[0]
}

#[test]
fn every_instance_under_every_schedule() {
    for format in FORMATS {
        for dim in [64, 128] {
            for (i, schedule) in Schedule::ALL.into_iter().enumerate() {
                let case = Case { format, dim, schedule, bulk: i % 2 == 0, ..Case::default() };
                assert_eq!(check(case), 0);
            }
        }
    }
}

/// bf16 rounds queries; with those that it holds exactly, sealed tiles must be met closely.
#[test]
fn tiles_of_128_tokens_and_outliers() {
    for format in FORMATS {
        let lengths = vec![(1, 700), (1, 129), (2, 257)];
        let case = Case { format, tokens: 128, lengths, outliers: true, ..Case::default() };
        assert_eq!(check(Case { dim: 128, ..case.clone() }), 0);
        assert_eq!(check(Case { shared_kib: 100, bulk: false, ..case }), 0);
    }
}

#[test]
fn rows_on_both_sides_of_a_tile() {
    for rows in [2, 5, 8] {
        let lengths = (0..=rows + 1).map(|past| (rows, 192 + past)).collect();
        let case = Case { lengths, q_heads: 6, staging: 3, csr: true, ..Case::default() };
        assert_eq!(check(case), 0);
    }
}

#[test]
fn unsealed_tiles_are_read_raw_or_reported() {
    let lengths = vec![(1, 300), (2, 130)];
    for bulk in [false, true] {
        let case = Case { lengths: lengths.clone(), bulk, ..Case::default() };
        assert_eq!(check(Case { unsealed: Some((0, 2, true)), ..case.clone() }), 0);
        assert_eq!(check(Case { unsealed: Some((0, 1, false)), ..case.clone() }), 1);
        assert_eq!(check(Case { lost: Some((0, 3)), ..case }), 1);
    }
}

#[test]
fn every_scoring_rule_and_any_pieces() {
    let lengths = vec![(2, 1000), (2, 65), (2, 2), (2, 300)];
    for (i, format) in FORMATS.into_iter().enumerate() {
        let case =
            Case { format, lengths: lengths.clone(), multiprocessors: 16, ..Case::default() };
        for window in [5, 70, 400] {
            assert_eq!(check(Case { window: Some(window), ..case.clone() }), 0);
        }
        let all = Case { softcap: Some(9.0), sinks: true, alibi: true, q_heads: 10, ..case };
        let pieces = [Pieces::Balanced, Pieces::Fixed(64), Pieces::Fixed(256)][i % 3];
        assert_eq!(check(Case { window: Some(333), pieces, rows: DType::F32, ..all }), 0);
    }
}
