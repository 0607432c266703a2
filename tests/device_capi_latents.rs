//! Latents in codes through the C ABI, on device memory of the caller's own: the bytes that the codec has,
//! and attention over them as stored, on every device of this build and machine.
#![cfg(any(feature = "emulate", feature = "cuda"))]

use std::ptr;

use kvcache::attention::{HeadShape, KvSource, Scoring, reference_attention};
use kvcache::capi::*;
use kvcache::dtype::{KvFormat, Rows, f16};
use kvcache::quant::{RowCodec, Stored};

mod device_memory;
#[path = "random/mod.rs"]
mod random;
use device_memory::{Memory, kinds, made, ok, open};
use random::Rng;

const DIM: usize = 576;
const VALUES: usize = 512;
const Q_HEADS: usize = 24;
const BLOCK: usize = 32;
const BLOCKS: usize = 8;
const LENS: [i32; 3] = [40, 0, 70];
const TABLE: [[i32; 3]; 3] = [[3, 7, -1], [-1; 3], [5, 2, 1]];

/// What the codes of each sequence say.
struct Decoded([Vec<Vec<f32>>; 3]);

impl KvSource for Decoded {
    fn key(&self, seq: usize, _: usize, position: usize, channel: usize) -> Option<f64> {
        Some(f64::from(self.0[seq][position][channel]))
    }
    fn value(&self, seq: usize, _: usize, position: usize, channel: usize) -> f64 {
        f64::from(self.0[seq][position][channel])
    }
}

#[test]
fn latents_are_appended_and_attended_as_stored() {
    for kind in kinds() {
        for (format, scale) in [
            (KvFormat::Fp8E4m3, Some(0.375)),
            (KvFormat::Fp8E5m2, None),
            (KvFormat::Int8T, None),
            (KvFormat::Int4T, None),
        ] {
            append_and_attend(kind, format, scale);
        }
    }
}

fn append_and_attend(kind: u32, format: KvFormat, scale: Option<f32>) {
    let device = open(kind);
    let mut rng = Rng::new(8);
    let codec = RowCodec::latent(format, VALUES as u32, (DIM - VALUES) as u32).unwrap();
    let codec = scale.map_or(codec, |scale| codec.with_scale(scale).unwrap());
    let (row, beside) = (codec.code_bytes(), codec.scale_bytes());
    let mut want = vec![0x3cu8; BLOCKS * BLOCK * (row + beside)];
    let mut decoded = Decoded([const { Vec::new() }; 3]);
    let (mut rows, mut slots) = (Vec::new(), Vec::new());
    for s in 0..3 {
        for token in 0..LENS[s] as usize {
            let latent: Vec<f16> = (0..DIM).map(|_| f16::from_f32(rng.normal())).collect();
            let (block, place) = (TABLE[s][token / BLOCK] as usize, token % BLOCK);
            let run = &mut want[block * BLOCK * (row + beside)..][..BLOCK * (row + beside)];
            let (codes, scales) = run.split_at_mut(BLOCK * row);
            let codes = &mut codes[place * row..][..row];
            let scales = &mut scales[place * beside..][..beside];
            let mut said: Vec<f32> = latent.iter().map(|x| x.to_f32()).collect();
            assert_eq!(codec.encode(&said, codes, scales), Ok(Stored::Encoded));
            codec.decode(codes, scales, &mut said).unwrap();
            decoded.0[s].push(said);
            slots.push((block * BLOCK + place) as i64);
            rows.extend(latent);
        }
    }
    let cache = Memory::of(device, &vec![0x3cu8; want.len()]);
    let (new, slots_at) = (Memory::of(device, &rows), Memory::of(device, &slots));
    let (flag, layer) = (Memory::of(device, &[0u32]), Memory::of(device, &[scale.unwrap_or(1.0)]));
    let mut scales = made(kvc_scales_init);
    scales.k_heads = if scale.is_some() { layer.at.cast() } else { ptr::null() };

    let mut append = made(kvc_append_desc_init);
    let mut more = made(kvc_device_append_options_init);
    (append.kv_heads, append.k_dim, append.v_dim) = (1, DIM as u32, VALUES as u32);
    (append.v_in_k, append.format, append.dtype) = (1, format.id(), KVC_DTYPE_F16);
    (append.block_tokens, append.num_blocks) = (BLOCK as u32, BLOCKS as u32);
    (append.rows, append.k, append.k_rows) = (slots.len() as u32, cache.at, new.at);
    (append.slots, append.scales) = (slots_at.at.cast(), &scales);
    more.error_flag = flag.at.cast();
    // SAFETY: the addresses are of live device memory of these sizes.
    ok(unsafe { kvc_device_append(device, &append, &more, ptr::null_mut()) });
    assert_eq!(flag.read::<u32>(), [0]);
    assert!(cache.read::<u8>() == want, "{format:?}");

    const Q_LEN: usize = 2;
    let q: Vec<f32> = (0..3 * Q_LEN * Q_HEADS * DIM).map(|_| 0.5 * rng.normal()).collect();
    let mut desc = made(kvc_attend_desc_init);
    (desc.q_heads, desc.kv_heads, desc.v_in_k) = (Q_HEADS as u32, 1, 1);
    (desc.k_dim, desc.v_dim) = (DIM as u32, VALUES as u32);
    (desc.format, desc.q_dtype, desc.out_dtype) = (format.id(), KVC_DTYPE_F32, KVC_DTYPE_F32);
    (desc.block_tokens, desc.num_blocks, desc.seqs) = (BLOCK as u32, BLOCKS as u32, 3);
    (desc.scale, desc.scales) = (0.07, &scales);
    let mut options = made(kvc_device_attend_options_init);
    options.max_q_tokens = Q_LEN as u32;
    let mut bytes = 0;
    // SAFETY: the structs and the pointer are live.
    ok(unsafe { kvc_device_attend_workspace_size(device, &desc, &options, &mut bytes) });
    let workspace = Memory::of(device, &vec![0xffu8; bytes as usize]);
    let (lens, table) = (Memory::of(device, &LENS), Memory::of(device, &TABLE.concat()));
    let out = Memory::of(device, &vec![f32::NAN; 3 * Q_LEN * Q_HEADS * VALUES]);
    let (q_at, lse) =
        (Memory::of(device, &q), Memory::of(device, &[f32::NAN; 3 * Q_LEN * Q_HEADS]));
    (desc.k, desc.q, desc.out, desc.lse) = (cache.at, q_at.at, out.at, lse.at.cast());
    (desc.table, desc.table_stride) = (table.at.cast(), 3);
    (desc.kv_lens, desc.bad_block) = (lens.at.cast(), flag.at.cast());
    (desc.workspace, desc.workspace_bytes) = (workspace.at, bytes);
    let attend = |desc: &kvc_attend_desc| {
        // SAFETY: the addresses are of live device memory, as long as the description says.
        unsafe { kvc_device_attend(device, desc, &options, ptr::null_mut()) }
    };
    // What there is no kernel for is answered before anything runs.
    for bad in [
        kvc_attend_desc { format: KVC_FORMAT_NVFP4, ..desc },
        kvc_attend_desc { format: KVC_FORMAT_KT4V4, ..desc },
        kvc_attend_desc { k_dim: 320, v_dim: 256, ..desc },
        kvc_attend_desc { softcap: 5.0, ..desc },
    ] {
        assert_eq!(attend(&bad), KVC_ERR_UNSUPPORTED);
    }
    assert_eq!(attend(&kvc_attend_desc { k: desc.k.wrapping_byte_add(8), ..desc }), {
        KVC_ERR_INVALID_ARGUMENT
    });
    assert!(out.read::<f32>().iter().all(|x| x.is_nan()), "nothing ran");
    ok(attend(&desc));
    let shape = HeadShape {
        q_heads: Q_HEADS as u32,
        kv_heads: 1,
        k_dim: DIM as u32,
        v_dim: VALUES as u32,
        v_in_k: true,
    };
    let scoring = Scoring { scale: 0.07, ..Scoring::causal(DIM as u32) };
    let lens_of = LENS.map(|n| n as usize);
    let want =
        reference_attention(&shape, &scoring, &decoded, Rows::F32(&q), &[0, 2, 4, 6], &lens_of)
            .unwrap();
    // Queries and weights are rounded to f16; values are below 5.
    for (got, want) in out.read::<f32>().iter().zip(&want.out) {
        assert!((f64::from(*got) - want).abs() <= 4e-3, "{format:?}: {got} for {want}");
    }
    for (got, want) in lse.read::<f32>().iter().zip(&want.lse) {
        let same = f64::from(*got) == *want;
        assert!(same || (f64::from(*got) - want).abs() <= 3e-3, "{format:?}: {got} for {want}");
    }
    assert_eq!(flag.read::<u32>(), [0]);
    let mut name = [0u8; 64];
    // SAFETY: the buffer has its length.
    ok(unsafe { kvc_device_attend_kernel(device, &desc, &options, name.as_mut_ptr().cast(), 64) });
    assert!(name.starts_with(format!("kvc_mla_{}_c32\0", format.name()).as_bytes()));

    drop((cache, new, slots_at, flag, layer, workspace, lens, table, q_at, out, lse));
    // SAFETY: open, and closed once.
    ok(unsafe { kvc_device_close(device) });
}
