//! Formats stored token by token: scales of heads, rows that cannot be stored, and what names a block.

use kvcache::Error;
use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::dtype::{FormatClass, KvFormat};
use kvcache::ids::Namespace;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::prefix::Digest;

/// One layer of FP8, one head.
fn fp8_cache(format: KvFormat) -> (KvCache, Step) {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(2, 1, 16, format));
    let options = CacheOptions { blocks: 8, threads: 1, ..CacheOptions::default() };
    (KvCache::new(&spec, &options).unwrap(), Step::new())
}

#[test]
fn heads_of_fp8_have_scales_of_their_own() {
    let (mut cache, mut step) = fp8_cache(KvFormat::Fp8E4m3);
    let (first, second) = (LayerId::uniform(0), LayerId::uniform(1));
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(cache.set_scales(first, &[bad], &[1.0]).is_err(), "{bad}");
        assert!(cache.set_scales(first, &[1.0], &[bad]).is_err(), "{bad}");
    }
    assert!(cache.set_scales(LayerId::uniform(2), &[1.0], &[1.0]).is_err());
    assert!(cache.set_scales(LayerId { group: 1, layer: 0 }, &[1.0], &[1.0]).is_err());
    assert!(cache.set_scales(first, &[1.0, 1.0], &[1.0]).is_err());
    assert!(cache.set_scales(first, &[1.0], &[]).is_err());
    cache.set_scales(second, &[8.0], &[4.0]).unwrap();
    let seq = cache.start(&[1], Namespace(0)).unwrap().seq;
    let held = cache.set_scales(second, &[8.0], &[4.0]);
    assert!(matches!(held, Err(Error::InvalidState { .. })), "a sequence lives");
    cache.begin(&mut step, &[Work { seq, tokens: &[1] }]).unwrap();
    // Past what e4m3 has without a scale: 448.
    let (k, v) = ([0.0f32; 16], [1536.0f32; 16]);
    let mut read = |layer| {
        let mut out = [f32::NAN; 16];
        cache.append(&step, layer, k[..].into(), v[..].into(), None).unwrap();
        let scoring = Scoring::causal(16);
        cache.attend(&step, layer, k[..].into(), (&mut out[..]).into(), &scoring, None).unwrap();
        out
    };
    assert_eq!((read(first), read(second)), ([448.0; 16], [1536.0; 16]));
    let (mut int8, _) = fp8_cache(KvFormat::Int8T);
    assert!(int8.set_scales(first, &[1.0], &[1.0]).is_err(), "int8_t has none");
}

#[test]
fn rows_that_are_not_finite_are_answered_and_lose_nothing() {
    for format in [KvFormat::Fp8E4m3, KvFormat::Int8T, KvFormat::Int4T, KvFormat::Nvfp4] {
        let (mut cache, mut step) = fp8_cache(format);
        let layer = LayerId::uniform(0);
        let seq = cache.start(&[1], Namespace(0)).unwrap().seq;
        cache.begin(&mut step, &[Work { seq, tokens: &[1, 2] }]).unwrap();
        let good = [0.5f32; 32];
        let mut bad = good;
        bad[20] = f32::NAN;
        let mut append =
            |k: &[f32], v: &[f32]| cache.append(&step, layer, k.into(), v.into(), None);
        assert!(matches!(append(&bad, &good), Err(Error::InvalidArgument { .. })));
        assert!(matches!(append(&good, &bad), Err(Error::InvalidArgument { .. })));
        append(&good, &good).unwrap();
        cache.commit(&mut step).unwrap();
        cache.audit().unwrap();
    }
}

/// The digest of a full block of one token, stored in some format.
fn digest(format: KvFormat, scale: Option<f32>) -> Digest {
    let (mut cache, mut step) = fp8_cache(format);
    cache.enable_digests().unwrap();
    if let Some(scale) = scale {
        cache.set_scales(LayerId::uniform(0), &[scale], &[1.0]).unwrap();
    }
    let tokens = [7; 16];
    let seq = cache.start(&tokens, Namespace(0)).unwrap().seq;
    cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
    let rows = [0.0f32; 16 * 16];
    for layer in 0..2 {
        let layer = LayerId::uniform(layer);
        cache.append(&step, layer, rows[..].into(), rows[..].into(), None).unwrap();
    }
    cache.commit(&mut step).unwrap();
    let block = cache.blocks(seq, 0).unwrap()[0];
    cache.digest(0, block).unwrap()
}

/// Formats and scales are part of what names a block outside; floats have the names others know.
#[test]
fn a_digest_names_the_format_too() {
    let plain = Digest::of_block(None, &[7; 16]);
    assert_eq!(digest(KvFormat::Bf16, None), plain);
    assert_eq!(digest(KvFormat::F32, None), plain);
    let mut all = vec![plain, digest(KvFormat::Fp8E4m3, Some(2.0))];
    let formats = KvFormat::ALL.iter().filter(|format| format.class() == FormatClass::Token);
    all.extend(formats.map(|&format| digest(format, None)));
    let count = all.len();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), count);
}
