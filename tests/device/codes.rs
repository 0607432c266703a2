//! The keys and values of a call as rows of codes, and what they decode to.

use kvcache::dtype::KvFormat;
use kvcache::emu::Buffer;
use kvcache::kernels::params::{
    DecodeParams, DecodeTokenParams, In, MlaParams, MlaTokenParams, PrefillParams,
    PrefillTokenParams,
};
use kvcache::quant::{RowCodec, Stored};

/// How they are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Codes {
    pub format: KvFormat,
    /// Whether keys of INT8_T are rotated.
    pub rotated: bool,
    /// Whether the heads of FP8 and NVFP4 have scales other than 1.
    pub heads: bool,
}

/// One side in device memory: rows in the order of the floats that they were.
struct Side {
    codes: Buffer,
    scales: Buffer,
    heads: Buffer,
    row_bytes: usize,
    scale_bytes: usize,
}

pub struct Coded {
    how: Codes,
    dim: usize,
    k: Side,
    v: Side,
}

/// Fills in where codes and scales lie, in `$params` and the `$call` that it is made from.
macro_rules! over_codes {
    ($self:ident, $call:ident, $params:ident) => {{
        let all = $self.scales(
            [$call.k_block, $call.k_head, $call.k_token],
            [$call.v_block, $call.v_head, $call.v_token],
        );
        $params.k_scales = In::at($self.k.scales.address());
        $params.v_scales = In::at($self.v.scales.address());
        $params.k_heads = $self.heads(&$self.k);
        $params.v_heads = $self.heads(&$self.v);
        let ([k, v], [k_scales, v_scales]) =
            ([all.rows.0, all.rows.1], [all.scales.0, all.scales.1]);
        [$params.k_scale_block, $params.k_scale_head, $params.k_scale_token] = k_scales;
        [$params.v_scale_block, $params.v_scale_head, $params.v_scale_token] = v_scales;
        ($params.k_rotated, $params.v_rotated) = (all.k_rotated, all.v_rotated);
        $params.call = $call;
        $params.call.k = In::at($self.k.codes.address());
        $params.call.v = In::at($self.v.codes.address());
        [$params.call.k_block, $params.call.k_head, $params.call.k_token] = k;
        [$params.call.v_block, $params.call.v_head, $params.call.v_token] = v;
        $params
    }};
}

impl Coded {
    /// Encodes rows of `dim` floats and replaces them by what the codes say. Rows of NaN stay, and
    /// have codes that no result must depend on. `head_of` is the KV head of a row.
    pub fn new(
        how: Codes,
        dim: usize,
        kv_heads: usize,
        head_of: impl Fn(usize) -> usize,
        k: &mut [f32],
        v: &mut [f32],
    ) -> Self {
        let keys = RowCodec::key(how.format, dim as u32).unwrap();
        let keys = match how.format {
            KvFormat::Int8T => keys.with_rotation(how.rotated).unwrap(),
            _ => keys,
        };
        let values = RowCodec::value(how.format, dim as u32).unwrap();
        let side = |codec: RowCodec, rows: &mut [f32], factor: f32| {
            let scale_of = |head: usize| if how.heads { factor * (1 + head) as f32 } else { 1.0 };
            let (row_bytes, scale_bytes) = (codec.code_bytes(), codec.scale_bytes());
            let count = rows.len() / dim;
            let mut codes = vec![0x7e; count * row_bytes];
            let mut scales = vec![0x7e; (count * scale_bytes).max(8)];
            for (r, row) in rows.chunks_exact_mut(dim).enumerate() {
                if row[0].is_nan() {
                    continue;
                }
                let codec =
                    if how.heads { codec.with_scale(scale_of(head_of(r))).unwrap() } else { codec };
                let codes = &mut codes[r * row_bytes..(r + 1) * row_bytes];
                let scales = &mut scales[r * scale_bytes..(r + 1) * scale_bytes];
                assert_eq!(codec.encode(row, codes, scales).unwrap(), Stored::Encoded);
                codec.decode(codes, scales, row).unwrap();
            }
            let heads: Vec<f32> = (0..kv_heads).map(scale_of).collect();
            Side {
                codes: Buffer::of(&codes).unwrap(),
                scales: Buffer::of(&scales).unwrap(),
                heads: Buffer::of(&heads).unwrap(),
                row_bytes,
                scale_bytes,
            }
        };
        Coded { how, dim, k: side(keys, k, 0.25), v: side(values, v, 3.0) }
    }

    /// The call over the codes, from the one over floats.
    pub fn decode(&self, call: DecodeParams) -> DecodeTokenParams {
        let mut params = DecodeTokenParams::default();
        over_codes!(self, call, params)
    }

    /// The same of chunked prefill.
    pub fn prefill(&self, call: PrefillParams) -> PrefillTokenParams {
        let mut params = PrefillTokenParams::default();
        over_codes!(self, call, params)
    }

    fn heads(&self, side: &Side) -> In<f32> {
        In::at(if self.how.heads { side.heads.address() } else { 0 })
    }

    /// Strides of codes and of scales in bytes, from those of floats.
    fn scales(&self, k: [i64; 3], v: [i64; 3]) -> Lie {
        let to =
            |strides: [i64; 3], bytes: usize| strides.map(|s| s / self.dim as i64 * bytes as i64);
        let int4 = self.how.format == KvFormat::Int4T;
        let int8 = self.how.format == KvFormat::Int8T && self.how.rotated;
        Lie {
            rows: (to(k, self.k.row_bytes), to(v, self.v.row_bytes)),
            scales: (to(k, self.k.scale_bytes), to(v, self.v.scale_bytes)),
            k_rotated: u32::from(int4 || int8),
            v_rotated: u32::from(int4),
        }
    }
}

/// How codes and scales lie: of keys, then of values.
struct Lie {
    rows: ([i64; 3], [i64; 3]),
    scales: ([i64; 3], [i64; 3]),
    k_rotated: u32,
    v_rotated: u32,
}

/// Latents in device memory as rows of codes, with gaps between them as the floats have.
pub struct Latents {
    how: Codes,
    codes: Buffer,
    scales: Buffer,
    scale: Buffer,
    /// Elements from a row of floats to the next, bytes from a row of codes and of scales to the next.
    row: usize,
    row_bytes: usize,
    scale_bytes: usize,
}

impl Latents {
    /// Encodes rows of `dims` channels (all, and those that are values), `gap` more apart, and replaces
    /// them by what the codes say. Rows of NaN stay, and have codes that no result must depend on.
    pub fn new(how: Codes, dims: (usize, usize), gap: usize, rows: &mut [f32]) -> Self {
        let codec = RowCodec::latent(how.format, dims.1 as u32, (dims.0 - dims.1) as u32).unwrap();
        let codec = match how.format {
            KvFormat::Int8T => codec.with_rotation(how.rotated).unwrap(),
            _ => codec,
        };
        let scale = 1.75;
        let codec = if how.heads { codec.with_scale(scale).unwrap() } else { codec };
        let (row, row_bytes) = (dims.0 + gap, codec.code_bytes() + 2 * gap);
        // Scales in a tensor of their own have gaps too.
        let scale_bytes = codec.scale_bytes() + gap / 4;
        let count = rows.len() / row;
        let mut codes = vec![0x7e; count * row_bytes];
        let mut scales = vec![0x7e; (count * scale_bytes).max(8)];
        for (r, row) in rows.chunks_exact_mut(row).enumerate().filter(|(_, row)| !row[0].is_nan()) {
            let codes = &mut codes[r * row_bytes..][..codec.code_bytes()];
            let scales = &mut scales[r * scale_bytes..][..codec.scale_bytes()];
            let row = &mut row[..dims.0];
            assert_eq!(codec.encode(row, codes, scales).unwrap(), Stored::Encoded);
            codec.decode(codes, scales, row).unwrap();
        }
        let [codes, scales] = [codes, scales].map(|bytes: Vec<u8>| Buffer::of(&bytes).unwrap());
        let scale = Buffer::of(&[scale]).unwrap();
        Self { how, codes, scales, scale, row, row_bytes, scale_bytes }
    }

    /// The call over the codes, from the one over floats.
    pub fn params(&self, call: MlaParams) -> MlaTokenParams {
        let to = |stride: i64, bytes: usize| stride / self.row as i64 * bytes as i64;
        let rotated = match self.how.format {
            KvFormat::Int4T => true,
            KvFormat::Int8T => self.how.rotated,
            _ => false,
        };
        MlaTokenParams {
            k_scales: In::at(self.scales.address()),
            k_heads: In::at(if self.how.heads { self.scale.address() } else { 0 }),
            k_scale_block: to(call.k_block, self.scale_bytes),
            k_scale_token: to(call.k_token, self.scale_bytes),
            k_rotated: u32::from(rotated),
            call: MlaParams {
                k: In::at(self.codes.address()),
                k_block: to(call.k_block, self.row_bytes),
                k_token: to(call.k_token, self.row_bytes),
                ..call
            },
            ..MlaTokenParams::default()
        }
    }
}
