//! The conformance table of the formats that are stored token by token: append gives the bytes of
//! the scalar reference, and attention over codes is the reference over what they decode to, at
//! every CPU level.

mod attention_case;

use attention_case::{Case, Layout, Rng, TOKEN_FORMATS, Tables, levels};
use kvcache::attention::{HeadShape, Scoring};
use kvcache::cpu::{
    AppendArgs, AttendArgs, AttendMaxima, BlockTables, CpuLevel, Executor, KvView, Rope, RopeStyle,
    RowsView, Serial, Threads, append_at, attend, attend_workspace_bytes,
};
use kvcache::dtype::{DType, KvFormat, bf16, f16};
use kvcache::error::Error;
use kvcache::layout::{GroupLayout, GroupSpec, Strides};
use kvcache::quant::{RowCodec, Stored};

fn shape(q_heads: u32, kv_heads: u32, k_dim: u32, v_dim: u32) -> HeadShape {
    HeadShape { q_heads, kv_heads, k_dim, v_dim, v_in_k: false }
}

fn small() -> bool {
    std::env::var_os("KVCACHE_CONFORMANCE").is_some_and(|value| value == "small")
}

fn check(case: &Case) {
    let instance = case.build();
    for level in levels() {
        instance.check(level);
    }
}

#[test]
fn every_format_and_query_type() {
    for format in TOKEN_FORMATS {
        for (q_dtype, out_dtype) in [
            (DType::F32, DType::F32),
            (DType::F16, DType::F16),
            (DType::Bf16, DType::Bf16),
            (DType::Bf16, DType::F32),
        ] {
            for plain in [false, true] {
                let (k_rotated, head_scales) = (!plain, !plain);
                let base = Case { k_rotated, head_scales, ..Case::default() };
                check(&Case { format, q_dtype, out_dtype, ..base });
            }
        }
    }
}

#[test]
fn every_layout_and_block_size() {
    for format in TOKEN_FORMATS {
        for layout in [Layout::Native, Layout::Nhd, Layout::Hnd] {
            for block_tokens in [1, 5, 16, 32, 64, 256] {
                if small() && block_tokens % 16 != 0 {
                    continue;
                }
                let tables = if block_tokens == 16 { Tables::Csr } else { Tables::Dense };
                check(&Case { layout, tables, block_tokens, format, ..Case::default() });
            }
        }
    }
}

#[test]
fn every_group_and_head_dim() {
    let shapes = [
        shape(2, 2, 64, 64),
        shape(3, 3, 128, 128),
        shape(4, 2, 128, 128),
        shape(8, 2, 128, 128),
        shape(8, 1, 64, 64),
        shape(32, 8, 128, 128),
        shape(14, 2, 64, 64),
        shape(12, 4, 96, 96),
        shape(5, 1, 80, 80),
        shape(4, 1, 192, 128),
        shape(4, 4, 192, 192),
        shape(2, 2, 256, 256),
        shape(8, 2, 256, 256),
        shape(3, 1, 16, 256),
        shape(40, 1, 48, 16),
    ];
    for shape in shapes {
        for format in TOKEN_FORMATS {
            check(&Case { shape, format, ..Case::default() });
        }
    }
}

/// Whole tiles that lie side by side in their blocks, several to a sequence: straight code, where a
/// kernel has it.
#[test]
fn blocks_of_whole_tiles() {
    let shapes = [
        shape(8, 2, 128, 128),
        shape(2, 2, 64, 64),
        shape(8, 1, 128, 128),
        shape(3, 3, 192, 192),
        shape(4, 2, 256, 256),
    ];
    for shape in shapes {
        for format in TOKEN_FORMATS {
            for block_tokens in [64, 128] {
                let lengths = vec![(1, 384), (2, 257), (1, 128)];
                check(&Case { shape, lengths, format, block_tokens, ..Case::default() });
            }
        }
    }
}

#[test]
fn latents() {
    let latent = HeadShape { q_heads: 16, kv_heads: 1, k_dim: 576, v_dim: 512, v_in_k: true };
    for format in TOKEN_FORMATS {
        let lengths = vec![(1, 130), (3, 70), (1, 1)];
        check(&Case { shape: latent, lengths, format, block_tokens: 64, ..Case::default() });
        // Few heads, for the decode kernel; and rows whose values are the whole of them.
        for (q_heads, k_dim, v_dim) in [(4, 80, 48), (2, 64, 64), (1, 576, 512)] {
            let shape = HeadShape { q_heads, k_dim, v_dim, ..latent };
            check(&Case { shape, format, ..Case::default() });
        }
    }
}

#[test]
fn every_scoring_rule() {
    for format in TOKEN_FORMATS {
        let base = Case { format, ..Case::default() };
        check(&Case { causal: false, lengths: vec![(7, 3), (40, 2), (3, 0)], ..base.clone() });
        for window in [1, 16, 100] {
            check(&Case { window: Some(window), ..base.clone() });
        }
        check(&Case { softcap: Some(5.0), ..base.clone() });
        check(&Case { sinks: true, ..base.clone() });
        check(&Case { alibi: true, ..base.clone() });
        check(&Case {
            window: Some(33),
            softcap: Some(2.0),
            sinks: true,
            alibi: true,
            scale: Some(0.5),
            ..base
        });
    }
}

#[test]
fn long_contexts_are_split() {
    if small() {
        return;
    }
    for format in TOKEN_FORMATS {
        let lengths = vec![(1, 2049), (2, 5000), (40, 4500), (1, 20_000)];
        let base = Case { shape: shape(4, 1, 32, 32), lengths, format, ..Case::default() };
        check(&base);
        check(&Case { window: Some(2050), sinks: true, ..base.clone() });
    }
}

#[test]
fn random_cases() {
    let mut rng = Rng::new(0xc0de);
    for round in 0..if small() { 10 } else { 150 } {
        check(&Case::random_coded(&mut rng, round));
    }
}

#[test]
fn bad_table_entries_are_masked_and_reported() {
    let mut rng = Rng::new(78);
    for format in TOKEN_FORMATS {
        for (bad, block_tokens) in [(-1, 16), (i32::MAX, 1), (10_000, 64)] {
            let case = Case { block_tokens, format, ..Case::default() };
            let mut instance = case.build();
            for level in levels() {
                assert!(!instance.check(level), "no entry is bad yet");
            }
            instance.spoil(&mut rng, bad);
            for level in levels() {
                assert!(instance.check(level), "a bad entry must raise the flag");
            }
        }
    }
}

#[test]
fn bits_depend_on_neither_threads_nor_neighbours() {
    let lengths = vec![(1, 3000), (1, 17), (33, 600), (2, 1100), (1, 0)];
    for format in TOKEN_FORMATS {
        let shape = shape(8, 2, 64, 64);
        let case = Case { shape, lengths: lengths.clone(), format, ..Case::default() };
        let instance = case.build();
        for level in levels() {
            let (want, want_lse) = instance.run(level, 1);
            for threads in [2, 7] {
                let (got, lse) = instance.run(level, threads);
                assert!(got == want && lse == want_lse, "{threads} threads");
            }
            for s in 0..lengths.len() {
                let (got, lse) = instance.run_alone(level, s);
                let (rows, row) = instance.rows_of(s);
                assert!(got == want[rows] && lse == want_lse[row], "sequence {s} alone");
            }
        }
    }
}

/// Rows of many kinds: all of which can be stored.
fn rows(rng: &mut Rng, count: usize, dim: usize) -> Vec<f32> {
    let kind = |n: usize, c: usize, rng: &mut Rng| match n % 9 {
        0 => rng.normal(),
        1 => 0.0,
        2 => -0.0,
        3 => 3.0 - n as f32,
        4 => rng.normal() + if c.is_multiple_of(9) { 30.0 } else { 0.0 },
        5 => rng.normal() * if c % 11 == 3 { 40.0 } else { 1.0 },
        6 => rng.normal() * 1e-40,
        7 => rng.normal() * 1e4,
        _ => [0.0, -0.0, 1.0, -1.0, 448.0, 0.5][(n + c) % 6],
    };
    (0..count * dim).map(|at| kind(at / dim, at % dim, rng)).collect()
}

/// The bytes that append leaves in a native block of a layer, at every level and on several threads.
#[test]
fn append_writes_what_the_reference_encodes() {
    let mut rng = Rng::new(91);
    let latent = |format| GroupSpec::latent(1, 512, 64, format);
    for format in TOKEN_FORMATS {
        let mut specs: Vec<_> = [16, 64, 80, 96, 128, 192, 256]
            .into_iter()
            .map(|dim| GroupSpec::uniform(1, 2, dim, format))
            .collect();
        specs.push(latent(format));
        for spec in specs {
            let layout = GroupLayout::new(spec.clone(), 16).unwrap();
            let (heads, k_dim) = (spec.kv_heads as usize, spec.k_dim as usize);
            let v_dim = if spec.v_in_k { 0 } else { spec.v_dim as usize };
            // Two blocks, every slot but one, in an order of their own.
            let slots: Vec<i64> = (0..31).map(|row| (row * 7 + 3) % 32).chain([-1]).collect();
            let k = rows(&mut rng, slots.len() * heads, k_dim);
            let v = rows(&mut rng, slots.len() * heads, v_dim);
            let key = match spec.v_in_k {
                true => RowCodec::latent(format, 512, 64).unwrap(),
                false => RowCodec::key(format, spec.k_dim).unwrap(),
            };
            let mut want = vec![0xa5u8; 2 * layout.block_bytes() as usize];
            let mut put = |codec: &RowCodec, row: &[f32], codes: usize, scales: usize| {
                let (mut c, mut s) = (vec![0; codec.code_bytes()], vec![0; codec.scale_bytes()]);
                assert_eq!(codec.encode(row, &mut c, &mut s).unwrap(), Stored::Encoded);
                want[codes..][..c.len()].copy_from_slice(&c);
                want[scales..][..s.len()].copy_from_slice(&s);
            };
            let at = |base: u64, strides: &Strides, slot: i64, head: usize| {
                let (block, token) = (slot / 16, slot % 16);
                let offset = block * strides.block + head as i64 * strides.head;
                base as usize + (offset + token * strides.token) as usize
            };
            for (row, &slot) in slots.iter().enumerate().filter(|&(_, &slot)| slot >= 0) {
                for head in 0..heads {
                    let nth = row * heads + head;
                    let codes = at(layout.k_offset(0), &layout.k_strides(), slot, head);
                    let scales =
                        at(layout.k_scale_offset(0), &layout.k_scale_strides(), slot, head);
                    put(&key, &k[nth * k_dim..][..k_dim], codes, scales);
                    if v_dim != 0 {
                        let codec = RowCodec::value(format, spec.v_dim).unwrap();
                        let codes = at(layout.v_offset(0), &layout.v_strides(), slot, head);
                        let scales =
                            at(layout.v_scale_offset(0), &layout.v_scale_strides(), slot, head);
                        put(&codec, &v[nth * v_dim..][..v_dim], codes, scales);
                    }
                }
            }
            for level in levels() {
                for threads in [1, 3] {
                    let mut got = vec![0xa5u8; want.len()];
                    let pool = Threads::new(threads).unwrap();
                    append(&layout, &mut got, level, &slots, (&k, &v), &pool).unwrap();
                    assert!(got == want, "{format:?} {k_dim} at {}", level.name());
                }
            }
        }
    }
}

/// Appends rows of f32 to a layer of `layout`, which all of `memory` is.
fn append(
    layout: &GroupLayout,
    memory: &mut [u8],
    level: CpuLevel,
    slots: &[i64],
    (k, v): (&[f32], &[f32]),
    executor: &dyn Executor,
) -> kvcache::Result<()> {
    let spec = layout.spec();
    let blocks = memory.len() as u64 / layout.block_bytes();
    let shape = HeadShape {
        q_heads: spec.kv_heads,
        kv_heads: spec.kv_heads,
        k_dim: spec.k_dim,
        v_dim: spec.v_dim,
        v_in_k: spec.v_in_k,
    };
    let view = |rows: &[f32], dim: u32| {
        RowsView::contiguous(rows.as_ptr().cast_mut().cast(), DType::F32, spec.kv_heads, dim)
    };
    let args = AppendArgs {
        shape,
        kv: KvView::native(layout, memory.as_mut_ptr(), blocks as u32, 0).unwrap(),
        slots: slots.as_ptr(),
        rows: slots.len() as u32,
        k: view(k, spec.k_dim),
        v: view(v, spec.v_dim),
        rope: None,
    };
    // SAFETY: the lists are as long as said, slots are distinct and the memory is the blocks'.
    unsafe { append_at(&args, level, executor) }
}

/// Rows of 16 bits and rotary embeddings come before the codes, as they do before floats.
#[test]
fn rows_are_widened_and_turned_before_they_are_encoded() {
    let mut rng = Rng::new(17);
    let rope = Rope::new(RopeStyle::Halves, 64, 1e4).unwrap();
    let spec = GroupSpec::uniform(1, 2, 64, KvFormat::Int8T);
    let layout = GroupLayout::new(spec, 16).unwrap();
    let wide: Vec<f32> = (0..2 * 2 * 64).map(|_| rng.normal()).collect();
    let halves: Vec<f16> = wide.iter().map(|&x| f16::from_f32(x)).collect();
    let brains: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
    let shape = shape(2, 2, 64, 64);
    let positions = [5u32, 1_000];
    let slots = [3i64, 20];
    let run = |rows: *const u8, dtype: DType, values: &[f32]| {
        let view = RowsView::contiguous(rows.cast_mut(), dtype, 2, 64);
        let mut got = vec![0u8; 2 * layout.block_bytes() as usize];
        let args = AppendArgs {
            shape,
            kv: KvView::native(&layout, got.as_mut_ptr(), 2, 0).unwrap(),
            slots: slots.as_ptr(),
            rows: 2,
            k: view,
            v: view,
            rope: Some((&rope, positions.as_ptr())),
        };
        // SAFETY: the buffers have these sizes.
        unsafe { append_at(&args, CpuLevel::detected(), &Serial) }.unwrap();
        let mut turned = values.to_vec();
        rope.rotate(&mut turned, 64, &positions).unwrap();
        let mut want = vec![0u8; got.len()];
        append(&layout, &mut want, CpuLevel::Scalar, &slots, (&turned, values), &Serial).unwrap();
        assert!(got == want, "{dtype:?}");
    };
    run(wide.as_ptr().cast(), DType::F32, &wide);
    let values: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
    run(halves.as_ptr().cast(), DType::F16, &values);
    let values: Vec<f32> = brains.iter().map(|x| x.to_f32()).collect();
    run(brains.as_ptr().cast(), DType::Bf16, &values);
}

#[test]
fn rows_that_cannot_be_stored_are_left_out_and_told_of() {
    for format in TOKEN_FORMATS {
        let layout = GroupLayout::new(GroupSpec::uniform(1, 1, 64, format), 16).unwrap();
        for level in levels() {
            let mut bad = vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
            if matches!(format, KvFormat::Int8T | KvFormat::Int4T) {
                bad.push(3e38);
            }
            for bad in bad {
                for at in [0, 63] {
                    let mut k = vec![1.0f32; 3 * 64];
                    let v = k.clone();
                    k[64 + at] = bad;
                    let mut memory = vec![0xa5u8; layout.block_bytes() as usize];
                    let slots = [0, 1, 2];
                    let error = append(&layout, &mut memory, level, &slots, (&k, &v), &Serial);
                    assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{bad}");
                    let row = layout.k_strides().token as usize;
                    assert!(memory[row..2 * row].iter().all(|&byte| byte == 0xa5));
                    assert!(
                        memory[..row].iter().chain(&memory[2 * row..3 * row]).any(|&b| b != 0xa5)
                    );
                }
            }
        }
    }
}

/// FP8's codes of NaN, which are never written here but may come from elsewhere, are no numbers: at
/// every level, in both kernels, for every type of query.
#[test]
fn codes_of_nan_are_nan() {
    const TOKENS: usize = 40;
    let layout = |format| GroupLayout::new(GroupSpec::uniform(1, 1, 80, format), 64).unwrap();
    let codes = [(KvFormat::Fp8E4m3, [0x7f, 0xff]), (KvFormat::Fp8E5m2, [0x7d, 0xff])];
    let ones = vec![1.0f32; TOKENS * 80];
    let slots: Vec<i64> = (0..TOKENS as i64).collect();
    for ((format, nans), level) in
        codes.into_iter().flat_map(|codes| levels().map(move |level| (codes, level)))
    {
        let layout = layout(format);
        let mut memory = vec![0u8; layout.block_bytes() as usize];
        append(&layout, &mut memory, level, &slots, (&ones, &ones), &Serial).unwrap();
        let row =
            |token: usize| layout.v_offset(0) as usize + token * layout.v_strides().token as usize;
        // In the whole part of a row and in its end, of an even key and of an odd one.
        (memory[row(6) + 3], memory[row(37) + 77]) = (nans[0], nans[1]);
        for (dtype, q_tokens) in [DType::F32, DType::F16, DType::Bf16]
            .into_iter()
            .flat_map(|dtype| [(dtype, 1usize), (dtype, 20)])
        {
            let q = vec![0u32; q_tokens * 80];
            let mut out = vec![0.0f32; q_tokens * 80];
            let (q_indptr, kv_len, table) = ([0, q_tokens as i32], TOKENS as i32, 0i32);
            let args = AttendArgs {
                shape: shape(1, 1, 80, 80),
                scoring: Scoring::causal(80),
                kv: KvView::native(&layout, memory.as_mut_ptr(), 1, 0).unwrap(),
                tables: BlockTables::Dense { table: &table, stride: 1 },
                seqs: 1,
                q_indptr: q_indptr.as_ptr(),
                kv_lens: &kv_len,
                q: RowsView::contiguous(q.as_ptr().cast_mut().cast(), dtype, 1, 80),
                out: RowsView::contiguous(out.as_mut_ptr().cast(), DType::F32, 1, 80),
                lse: std::ptr::null_mut(),
                bad_block: None,
            };
            let maxima = AttendMaxima {
                seqs: 1,
                q_tokens: q_tokens as u32,
                kv_len: TOKENS as u32,
                workers: 1,
            };
            let bytes = attend_workspace_bytes(&args.shape, &maxima).unwrap();
            // SAFETY: the buffers have these sizes.
            unsafe { attend(&args, level, &Serial, &mut vec![0; bytes as usize]) }.unwrap();
            // The last query sees all.
            for (c, &x) in out[(q_tokens - 1) * 80..].iter().enumerate() {
                let what = format!("{format:?} {} {dtype:?} {q_tokens} {c}: {x}", level.name());
                assert!(
                    if c == 3 || c == 77 { x.is_nan() } else { (x - 1.0).abs() < 0.01 },
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn impossible_scales_and_dimensions_are_refused() {
    let good = Case { format: KvFormat::Fp8E4m3, ..Case::default() }.build();
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        good.refuses(|kv, scales| {
            scales.fill(bad);
            (kv.scales.k_heads, kv.scales.v_heads) = (std::ptr::null(), scales.as_ptr());
        });
        good.refuses(|kv, scales| {
            scales.fill(bad);
            kv.scales.k_heads = scales.as_ptr();
        });
    }
    good.refuses(|kv, scales| {
        kv.scales.k_heads = scales.as_ptr().cast::<u8>().wrapping_add(1).cast()
    });
    let int8 = Case { format: KvFormat::Int8T, ..Case::default() }.build();
    int8.refuses(|kv, scales| {
        scales.fill(1.0);
        kv.scales.k_heads = scales.as_ptr();
    });
    int8.refuses(|kv, _| kv.scales.k = std::ptr::null_mut());
    int8.refuses(|kv, _| kv.scales.v = kv.scales.v.wrapping_add(1));
    int8.refuses(|kv, _| kv.scales.k_strides.token = 3);
    int8.refuses(|kv, _| kv.scales.k_strides.block = i64::MAX - 1);
    int8.refuses(|kv, _| kv.format = KvFormat::Kt4v4);
    // Rows of 8 or 24 channels have no quantised form.
    let float = Case { shape: shape(2, 1, 24, 24), ..Case::default() }.build();
    for format in TOKEN_FORMATS {
        float.refuses(|kv, _| kv.format = format);
    }
}
