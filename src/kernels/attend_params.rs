//! The parameters of whichever kernel attends, from the one form that all calls have.

use super::attend::{AttendArgs, ScaleArgs};
use super::params::{
    DecodeParams, DecodeTokenParams, In, MlaParams, MlaTokenParams, Out, PrefillParams,
};
use crate::dtype::KvFormat;

/// What a call over rows of codes has beside the call itself.
pub(super) fn token_scales(format: KvFormat, scales: &ScaleArgs) -> DecodeTokenParams {
    let (s, int4) = (scales, format == KvFormat::Int4T);
    DecodeTokenParams {
        k_scales: In::at(s.k),
        v_scales: In::at(s.v),
        k_heads: In::at(s.k_heads),
        v_heads: In::at(s.v_heads),
        k_scale_block: s.k_strides.block,
        k_scale_head: s.k_strides.head,
        k_scale_token: s.k_strides.token,
        v_scale_block: s.v_strides.block,
        v_scale_head: s.v_strides.head,
        v_scale_token: s.v_strides.token,
        k_rotated: u32::from(int4 || (format == KvFormat::Int8T && s.k_rotated)),
        v_rotated: u32::from(int4),
        ..DecodeTokenParams::default()
    }
}

/// Parameters of one of the kernels: what all of them have, from the call's arguments, and its own.
macro_rules! paged {
    ($params:ident, $a:ident, $($own:ident: $value:expr),* $(,)?) => {
        $params {
            q: In::at($a.q),
            k: In::at($a.k),
            out: Out::at($a.out),
            lse: Out::at($a.lse),
            q_indptr: In::at($a.q_indptr),
            table: In::at($a.table),
            table_indptr: In::at($a.table_indptr),
            seq_lens: In::at($a.kv_lens),
            error_flag: Out::at($a.error_flag),
            q_row: $a.q_strides[0],
            q_head: $a.q_strides[1],
            out_row: $a.out_strides[0],
            out_head: $a.out_strides[1],
            k_block: $a.k_strides.block,
            k_token: $a.k_strides.token,
            table_stride: $a.table_stride,
            causal: u32::from($a.causal),
            block_tokens: $a.block_tokens,
            num_blocks: $a.num_blocks,
            window: $a.window.unwrap_or(0),
            q_dtype: $a.q_dtype.id(),
            out_dtype: $a.out_dtype.id(),
            scale: $a.scale,
            $($own: $value,)*
            ..$params::default()
        }
    };
}

/// The same for the kernels of many heads with values of their own, which know every scoring.
macro_rules! many_heads {
    ($params:ident, $a:ident $(, $own:ident: $value:expr)*) => {
        paged!(
            $params, $a,
            v: In::at($a.v),
            k_head: $a.k_strides.head,
            v_block: $a.v_strides.block,
            v_head: $a.v_strides.head,
            v_token: $a.v_strides.token,
            sinks: In::at($a.sinks),
            slopes: In::at($a.slopes),
            softcap: $a.softcap.unwrap_or(0.0),
            $($own: $value,)*
        )
    };
}

pub(super) fn decode_params(args: &AttendArgs) -> DecodeParams {
    many_heads!(DecodeParams, args, tail_mask: In::at(args.tail_mask))
}

pub(super) fn prefill_params(args: &AttendArgs) -> PrefillParams {
    many_heads!(PrefillParams, args)
}

pub(super) fn mla_params(args: &AttendArgs) -> MlaParams {
    paged!(MlaParams, args,)
}

pub(super) fn mla_token_params(format: KvFormat, args: &AttendArgs) -> MlaTokenParams {
    let scales = token_scales(format, &args.scales);
    MlaTokenParams {
        call: mla_params(args),
        k_scales: scales.k_scales,
        k_heads: scales.k_heads,
        k_scale_block: scales.k_scale_block,
        k_scale_token: scales.k_scale_token,
        k_rotated: scales.k_rotated,
        ..MlaTokenParams::default()
    }
}
