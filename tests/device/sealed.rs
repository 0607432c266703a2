//! Sequences of sealed tiles and raw ones in emulated device memory, and what attention over them must
//! give: the reference in f64 over what each query is to read, its own tile raw, those before it sealed.

use kvcache::attention::{HeadShape, KvSource, Scoring, reference_attention};
use kvcache::dtype::{DType, KvFormat, Rows, bf16};
use kvcache::emu::{Buffer, Schedule};
use kvcache::kernels::params::{DecodeTileParams, In};
use kvcache::kernels::{AttendArgs, Pieces, ScaleArgs, decode_tile_params};
use kvcache::layout::Strides;
use kvcache::layout::tile::{TileLayout, TileShape};
use kvcache::quant::{Stored, Tile, seal};

use super::{Rng, Values};

pub const FORMATS: [KvFormat; 5] =
    [KvFormat::Kt8v8, KvFormat::Kt4v4, KvFormat::Kt3v3, KvFormat::Kt4v2, KvFormat::Kt2v2];

#[derive(Debug, Clone)]
pub struct Case {
    pub format: KvFormat,
    pub dim: usize,
    pub tokens: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    /// Query rows and cached tokens of each sequence.
    pub lengths: Vec<(usize, usize)>,
    pub rows: DType,
    /// Sequence and tile that could not be sealed; whether its raw rows are still there.
    pub unsealed: Option<(usize, usize, bool)>,
    /// Sequence and tile whose table entry is no block.
    pub lost: Option<(usize, usize)>,
    /// Raw slots beyond these are in scratch.
    pub staging: usize,
    pub csr: bool,
    pub bulk: bool,
    pub window: Option<u32>,
    pub softcap: Option<f32>,
    /// Scores have the sign of products turned round.
    pub negative: bool,
    pub sinks: bool,
    pub alibi: bool,
    pub pieces: Pieces,
    pub multiprocessors: u32,
    pub shared_kib: u32,
    /// Keys have channels far from 0, values of very different size.
    pub outliers: bool,
    pub schedule: Schedule,
    pub seed: u64,
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
            negative: false,
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

/// A batch in device memory, and its results by the reference.
pub struct Sealed {
    pub case: Case,
    pub want: Vec<f64>,
    pub want_lse: Vec<f64>,
    /// Row offsets and lengths of the sequences.
    pub q_indptr: Vec<i32>,
    pub lens: Vec<i32>,
    q: Values,
    layout: TileLayout,
    /// The largest raw value.
    largest: f64,
    scale: f32,
    blocks: usize,
    widest: usize,
    staged: usize,
    slots: usize,
    staging: Values,
    scratch: Values,
    records: Buffer,
    table: Buffer,
    table_indptr: Buffer,
    raw_table: Buffer,
    raw_offsets: Buffer,
    sinks: Buffer,
    slopes: Buffer,
}

/// What a call gave.
pub struct Got {
    pub out: Values,
    pub lse: Buffer,
    pub flag: Buffer,
}

impl Sealed {
    pub fn new(case: Case) -> Self {
        let (d, t, heads) = (case.dim, case.tokens, case.kv_heads);
        let shape = TileShape { k_dim: d as u32, v_dim: d as u32, v_in_k: false, tokens: t as u32 };
        let layout = TileLayout::new(case.format, shape).unwrap();
        let mut rng = Rng::new(case.seed);
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
                let offsets: Vec<f32> =
                    (0..d).map(|c| if c % 17 == 5 { 20.0 } else { 0.0 }).collect();
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
                let round = |x: Vec<f32>| {
                    x.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect::<Vec<_>>()
                };
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
                            raw.extend_from_slice(
                                &head.raw[side][tile * t * d..(tile + 1) * t * d],
                            );
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
        let mut scoring = Scoring {
            window: case.window,
            softcap: case.softcap,
            sinks: case.sinks.then_some(&sinks[..]),
            alibi: case.alibi.then_some(&slopes[..]),
            ..Scoring::causal(d as u32)
        };
        if case.negative {
            scoring.scale = -scoring.scale;
        }
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
        let largest = all
            .iter()
            .flatten()
            .flat_map(|h| &h.raw[1])
            .fold(1.0f64, |a, &x| a.max(f64::from(x.abs())));
        Sealed {
            want,
            want_lse,
            q_indptr,
            lens: case.lengths.iter().map(|l| l.1 as i32).collect(),
            q,
            layout,
            largest,
            scale: scoring.scale,
            blocks,
            widest,
            staged,
            slots,
            staging,
            scratch,
            records: Buffer::of(&records).unwrap(),
            table: Buffer::of(&flat).unwrap(),
            table_indptr: Buffer::of(&indptr).unwrap(),
            raw_table: Buffer::of(&raw_flat).unwrap(),
            raw_offsets: Buffer::of(&raw_indptr).unwrap(),
            sinks: Buffer::of(&sinks).unwrap(),
            slopes: Buffer::of(&slopes).unwrap(),
            case,
        }
    }

    fn row_len(&self) -> usize {
        self.case.q_heads * self.case.dim
    }

    /// Room for the results of `rows` rows.
    pub fn room(&self, rows: usize) -> Got {
        Got {
            out: Values::new(self.case.rows, &vec![f32::NAN; rows * self.row_len()]),
            lse: Buffer::new(rows * self.case.q_heads * 4).unwrap(),
            flag: Buffer::of(&[0u32]).unwrap(),
        }
    }

    /// A call over the sequences whose rows begin at `first_row`, and what it says of tiles.
    pub fn args(
        &self,
        got: &Got,
        first_row: usize,
        q_indptr: &Buffer,
        lens: &Buffer,
    ) -> (AttendArgs, DecodeTileParams) {
        let case = &self.case;
        let (d, t, heads) = (case.dim, case.tokens, case.kv_heads);
        let given = |on: bool, buffer: &Buffer| if on { buffer.address() } else { 0 };
        let v_at = |values: &Values| values.address() + (heads * t * d * 2) as u64;
        let strides =
            Strides { block: (2 * heads * t * d) as i64, head: (t * d) as i64, token: d as i64 };
        let row = [self.row_len() as i64, d as i64];
        let args = AttendArgs {
            q: self.q.address()
                + (first_row * self.row_len()) as u64 * u64::from(case.rows.bytes()),
            q_dtype: case.rows,
            q_strides: row,
            out: got.out.address(),
            out_dtype: case.rows,
            out_strides: row,
            lse: got.lse.address(),
            k: self.staging.address(),
            k_strides: strides,
            v: v_at(&self.staging),
            v_strides: strides,
            scales: ScaleArgs::NONE,
            block_tokens: t as u32,
            num_blocks: self.blocks as u32,
            table: self.table.address(),
            table_stride: self.widest as i64,
            table_indptr: given(case.csr, &self.table_indptr),
            seqs: case.lengths.len() as u32,
            q_indptr: q_indptr.address(),
            kv_lens: lens.address(),
            tail_mask: 0,
            scale: self.scale,
            causal: true,
            window: case.window,
            softcap: case.softcap,
            sinks: given(case.sinks, &self.sinks),
            slopes: given(case.alibi, &self.slopes),
            error_flag: got.flag.address(),
        };
        let in_scratch = self.slots > self.staged;
        let params = DecodeTileParams {
            records: In::at(self.records.address()),
            raw_indptr: In::at(self.raw_offsets.address()),
            raw_blocks: In::at(self.raw_table.address()),
            scratch_k: In::at(given(in_scratch, &self.scratch.buffer)),
            scratch_v: if in_scratch { In::at(v_at(&self.scratch)) } else { In::NULL },
            record_block: (heads * self.layout.bytes()) as i64,
            record_head: self.layout.bytes() as i64,
            scratch_k_block: strides.block,
            scratch_k_head: strides.head,
            scratch_k_token: strides.token,
            scratch_v_block: strides.block,
            scratch_v_head: strides.head,
            scratch_v_token: strides.token,
            staging_blocks: self.staged as u32,
            scratch_blocks: (self.slots - self.staged) as u32,
            ..decode_tile_params(&args).unwrap()
        };
        (args, params)
    }

    /// Holds the results of all rows against the reference; the error flag.
    pub fn compare(&self, got: &Got) -> u32 {
        let what = format!("{:?}", self.case);
        // Raw keys and weights of raw values are rounded to bf16 with the queries; sealed ones to f16.
        got.out.must_be(&self.want, self.largest * 4e-3, &what);
        for (i, (&got, &want)) in got.lse.read::<f32>().iter().zip(&self.want_lse).enumerate() {
            let got = f64::from(got);
            let good = got == want || (got - want).abs() <= 8e-3 * want.abs().max(1.0);
            assert!(good, "{what} LSE [{i}]: {got}, not {want}");
        }
        got.flag.read::<u32>()[0]
    }
}
