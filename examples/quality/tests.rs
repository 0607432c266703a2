//! The harness itself: that it reads what decode would read, that the modes change nothing but what
//! is stored, and that a threshold can fail.

use std::path::{Path, PathBuf};

use kvcache::dtype::{DType, KvFormat};

use crate::measure::{self, Reference};
use crate::model::Model;
use crate::modes::Mode;
use crate::recall::{self, Text};
use crate::schemes::{self, Scheme, Store};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/generate/model")
}

fn references(model: &Model, tokens: usize, count: usize) -> Vec<Reference> {
    let (text, _) = crate::held_out(&folder()).unwrap();
    let sequences = measure::sequences(&text, tokens, count).unwrap();
    sequences.into_iter().map(|tokens| Reference::new(model, tokens).unwrap()).collect()
}

/// A scheme over rows that read as stored.
fn scheme(name: &str, staging: DType) -> Scheme {
    Scheme { cached: None, ..cached(name, staging) }
}

/// A scheme as it is measured: the library's through a cache.
fn cached(name: &str, staging: DType) -> Scheme {
    schemes::chosen(&[name.to_string()], 64, staging).unwrap().remove(0)
}

#[test]
fn every_scheme_has_a_name_of_its_own_and_the_bits_of_its_layout() {
    let all = schemes::chosen(&[], 64, DType::Bf16).unwrap();
    for (at, scheme) in all.iter().enumerate() {
        assert!(all[..at].iter().all(|other| other.name != scheme.name), "{}", scheme.name);
    }
    for format in KvFormat::ALL.iter().filter(|&&format| format != KvFormat::F32) {
        assert!(all.iter().any(|scheme| scheme.own && scheme.name == format.name()));
    }
    // 64 channels: 4368 bytes for 64 keys and values.
    assert_eq!(scheme("kt4v4", DType::Bf16).bits, 4368.0 * 8.0 / (2.0 * 64.0 * 64.0));
    assert!(schemes::chosen(&["kt5v5".to_string()], 64, DType::Bf16).is_err());
}

#[test]
fn a_query_reads_its_own_tile_raw_and_the_tiles_before_as_stored() {
    let model = Model::load(&folder()).unwrap();
    let references = references(&model, 192, 1);
    let mut scheme = scheme("kt2v2/128", DType::F32);
    let kl = |scheme: &Scheme| {
        measure::figure(&model, &references, scheme, Mode::Natural, 1.0).unwrap().kl.0
    };
    // Rows from 48 to 127 see raw rows alone; those from 128 a sealed tile.
    let sealed = kl(&scheme);
    assert!(sealed > 1e-4, "{sealed:e}");
    // A tile that nobody can have ended before: all raw, so nothing changes but the order of sums.
    let Store::Tiles { tokens, .. } = &mut scheme.store else { panic!("a scheme of tiles") };
    *tokens = 256;
    let raw = kl(&scheme);
    assert!(!(raw.abs() > 1e-8), "{raw:e}");
    // With the first tile raw too the last 63 rows' queries see one sealed tile less.
    let sunk = kl(&self::scheme("kt2v2+sink", DType::F32));
    let plain = kl(&self::scheme("kt2v2", DType::F32));
    assert!(sunk > 0.0 && sunk < 0.9 * plain, "{sunk:e} of {plain:e}");
    // The same tiles under a coarser store cost more.
    let finer = kl(&self::scheme("kt8v8", DType::F32));
    assert!(finer < sealed / 100.0, "{finer:e}");
}

#[test]
fn a_cache_reads_what_its_codecs_say() {
    let model = Model::load(&folder()).unwrap();
    let references = references(&model, 192, 1);
    let kl = |scheme: &Scheme, mode| {
        measure::figure(&model, &references, scheme, mode, 1.0).unwrap().kl.0
    };
    for name in ["bf16", "int8_t", "nvfp4", "kt8v8", "kt4v4/32", "kt4v4", "kt2v2", "kt2v2+sink"] {
        for mode in [Mode::Natural, Mode::Outliers] {
            let stored = kl(&scheme(name, DType::Bf16), mode);
            let read = kl(&cached(name, DType::Bf16), mode);
            // Kernels round queries and probabilities to whole numbers, for good or ill.
            let ratio = read / stored;
            assert!(ratio > 0.7 && ratio < 1.5, "{name}, {}: {read:e} for {stored:e}", mode.name());
            assert_ne!(read, stored, "{name}: the same sums in the same order");
        }
    }
    // Published schemes have no cache to go through.
    assert!(cached("q4_0", DType::Bf16).cached.is_none());
}

#[test]
fn modes_change_what_is_stored_and_nothing_else() {
    let model = Model::load(&folder()).unwrap();
    let references = references(&model, 160, 2);
    let plain = scheme("int8 per token", DType::Bf16);
    let cost = |mode| measure::figure(&model, &references, &plain, mode, 1.0).unwrap().kl.0;
    let natural = cost(Mode::Natural);
    for mode in Mode::ALL {
        measure::assert_unchanged(&model, &references, mode).unwrap();
        assert!(mode == Mode::Natural || cost(mode) > 5.0 * natural, "{}", mode.name());
        assert_eq!(Mode::from_name(mode.name()).unwrap(), mode);
        // Channels are distinct, so that the number of changes is what the mode says.
        for (layer, head) in [(0, 0), (3, 1)] {
            let change = mode.change(layer, head, 64);
            let changed = change.k_scale.iter().filter(|&&s| s != 1.0).count()
                + change.v_scale.iter().filter(|&&s| s != 1.0).count()
                + change.k_offset.iter().filter(|&&o| o != 0.0).count();
            assert_eq!(changed, [0, 14, 6][mode as usize], "{} {layer} {head}", mode.name());
        }
    }
}

#[test]
fn thresholds_can_fail() {
    let model = Model::load(&folder()).unwrap();
    let references = references(&model, 128, 1);
    let kt4 = scheme("kt4v4", DType::Bf16);
    let mut figure = measure::figure(&model, &references, &kt4, Mode::Offsets, 2.75).unwrap();
    (figure.kl.0, figure.perplexity_change) = (1e-3, (1e-3, 1e-4));
    assert!(measure::broken_thresholds(std::slice::from_ref(&figure)).is_empty());
    let unknown = f64::NAN;
    for (kl, change, error) in [
        (3e-3, 1e-3, 1e-4),
        (1e-3, 4e-3, 1e-4),
        (1e-3, -4e-3, 1e-4),
        (unknown, 0.0, 1e-4),
        (0.0, unknown, 1e-4),
        (0.0, 0.0, unknown),
    ] {
        (figure.kl.0, figure.perplexity_change) = (kl, (change, error));
        assert_eq!(measure::broken_thresholds(std::slice::from_ref(&figure)).len(), 1);
    }
}

#[test]
fn recall_tells_formats_apart_and_depends_on_the_seed_alone() {
    let text = Text::new(4096, 1).unwrap();
    let ask = |format, gap| recall::ask(&text, format, Mode::Natural, gap).unwrap();
    // What finds every key at one gap finds few at another.
    for (format, wide, narrow) in [
        (KvFormat::Bf16, 1.0 / 64.0, 1.0 / 4096.0),
        (KvFormat::Kt8v8, 1.0 / 64.0, 1.0 / 2048.0),
        (KvFormat::Kt4v4, 1.0 / 8.0, 1.0 / 128.0),
        (KvFormat::Kt2v2, 1.0 / 3.0, 1.0 / 32.0),
    ] {
        let (wide, narrow) = (ask(format, wide), ask(format, narrow));
        assert!(wide.passed(), "{format:?} {}", wide.recall);
        assert!(narrow.recall < 0.7, "{format:?} {}", narrow.recall);
        assert!(ask(KvFormat::F32, narrow.gap as f32).passed());
        assert_eq!(ask(format, narrow.gap as f32).recall, narrow.recall);
    }
    let other = Text::new(4096, 2).unwrap();
    let other = recall::ask(&other, KvFormat::Kt4v4, Mode::Natural, 1.0 / 64.0).unwrap();
    assert_ne!(other.recall, ask(KvFormat::Kt4v4, 1.0 / 64.0).recall);
    assert!(Text::new(4095, 1).is_err() && Text::new(0, 1).is_err());
    // A sweep that stops short breaks its limit.
    let sweep = vec![ask(KvFormat::Kt4v4, 0.5), ask(KvFormat::Kt4v4, 1.0 / 128.0)];
    assert_eq!(recall::finest(&sweep), Some(0.5));
    assert_eq!(recall::finest(&sweep[1..]), None);
    assert_eq!(recall::broken_thresholds(std::slice::from_ref(&sweep)).len(), 1);
    assert_eq!(recall::broken_thresholds(&[sweep[1..].to_vec()]).len(), 1);
    assert!(recall::broken_thresholds(&[vec![ask(KvFormat::Kt4v4, 0.088)]]).is_empty());
}
