//! The tokenizer and the model against what the training script's own say (`model/golden.json`).

use std::fs;
use std::path::PathBuf;

use kvcache::cache::{CacheOptions, KvCache};
use kvcache::dtype::KvFormat;
use kvcache::layout::{CacheSpec, GroupSpec};
use serde_json::Value;

use crate::check;
use crate::layers::Layers;
use crate::model::Model;
use crate::sample::Sampler;
use crate::serve::{self, Limits};
use crate::tier::{self, TierArg};
use crate::tokenizer::Tokenizer;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/generate/model")
}

fn golden() -> Value {
    serde_json::from_str(&fs::read_to_string(folder().join("golden.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn text_becomes_the_same_tokens_and_comes_back() {
    let merges = fs::read_to_string(folder().join("tokenizer.txt")).unwrap();
    let tokenizer = Tokenizer::parse(&merges).unwrap();
    let golden = golden();
    for pair in golden["tokenizer"].as_array().unwrap() {
        let text = pair[0].as_str().unwrap();
        assert_eq!(tokenizer.encode(text), ids(&pair[1]), "{text:?}");
        assert_eq!(tokenizer.decode(&tokenizer.encode(text)), text);
    }
    assert!(Tokenizer::parse("1 257").is_err() && Tokenizer::parse("1").is_err());
}

/// How the cache under test stores K and V.
fn f32s(model: &Model) -> Layers {
    Layers::uniform(KvFormat::F32, 16, model.config.layers)
}

#[test]
fn the_cached_model_writes_what_pytorch_writes() {
    let (model, golden) = (Model::load(&folder()).unwrap(), golden());
    let c = &model.config;
    let group =
        GroupSpec::uniform(c.layers as u32, c.kv_heads as u32, c.head_dim as u32, KvFormat::F32);
    let options = CacheOptions { blocks: 64, max_seqs: 1, threads: 1, ..CacheOptions::default() };
    let mut cache = KvCache::new(&CacheSpec::uniform(16, group), &options).unwrap();
    let prompts = [ids(&golden["prompt"])];
    let layers = f32s(&model);
    let limits = Limits { batch: 1, max_tokens: 48, keep_logits: true, layers };
    let mut sampler = Sampler::new(0.0, 0);
    let (outputs, _) =
        serve::serve(&model, &mut cache, &prompts, &limits, &mut sampler, &mut |_| {}).unwrap();
    assert_eq!(outputs[0].tokens, ids(&golden["greedy"]));
    for (logit, want) in outputs[0].logits[0].iter().zip(golden["first_logits"].as_array().unwrap())
    {
        let error = (f64::from(*logit) - want.as_f64().unwrap()).abs();
        assert!(error <= 1e-3, "{logit} for {want}");
    }
    let report = check::check(&model, layers, &prompts, &outputs, true).unwrap();
    assert!(report.passed() && report.ties == 0, "{}", report.max_relative_error);
    // The check can fail.
    let mut wrong = outputs.clone();
    wrong[0].logits[7][5] += 0.01;
    let checked = check::check(&model, layers, &prompts, &wrong, true);
    assert!(!checked.unwrap().passed());
}

#[test]
fn a_second_run_finds_the_prompt_on_disk_and_writes_the_same() {
    let dir = std::env::temp_dir().join(format!("kvcache-generate-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    let arg = TierArg::parse(&format!("disk:{}", dir.display())).unwrap();
    let (model, golden) = (Model::load(&folder()).unwrap(), golden());
    let prompts = [ids(&golden["prompt"])];
    let c = &model.config;
    let group =
        GroupSpec::uniform(c.layers as u32, c.kv_heads as u32, c.head_dim as u32, KvFormat::F32);
    let run = |arg: Option<&TierArg>| {
        let options = CacheOptions { blocks: 64, max_seqs: 1, threads: 1, ..Default::default() };
        let spec = CacheSpec::uniform(16, group.clone());
        let mut cache = KvCache::new(&spec, &options).unwrap();
        let found = arg.map(|arg| tier::attach(&mut cache, arg, "m").unwrap().unwrap().objects);
        let layers = f32s(&model);
        let limits = Limits { batch: 1, max_tokens: 48, keep_logits: false, layers };
        let mut sampler = Sampler::new(0.0, 0);
        let (outputs, figures) =
            serve::serve(&model, &mut cache, &prompts, &limits, &mut sampler, &mut |_| {}).unwrap();
        tier::flush(&mut cache);
        (outputs[0].tokens.clone(), figures.prefill_tokens, found)
    };
    let plain = run(None);
    let first = run(Some(&arg));
    let second = run(Some(&arg));
    let _ = fs::remove_dir_all(&dir);
    assert_eq!((&first.0, first.1, first.2), (&plain.0, plain.1, Some(0)));
    let whole = (prompts[0].len() - 1) / 16 * 16;
    assert!(whole > 0 && second.2 >= Some(whole as u64 / 16));
    assert_eq!((&second.0, second.1), (&plain.0, prompts[0].len() - whole));
    for bad in ["disk:", "host:x", "remote:", "redis://localhost"] {
        assert!(TierArg::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn edges_and_sinks_are_stored_as_they_are_asked_for() {
    let (model, golden) = (Model::load(&folder()).unwrap(), golden());
    let prompts = [ids(&golden["prompt"])];
    let c = &model.config;
    let inner = Layers::uniform(KvFormat::Kt2v2, 32, c.layers);
    let run = |layers: Layers| {
        let options = CacheOptions { blocks: 64, max_seqs: 1, threads: 1, ..Default::default() };
        let mut cache = KvCache::new(&layers.spec(c), &options).unwrap();
        let limits = Limits { batch: 1, max_tokens: 40, keep_logits: true, layers };
        let mut sampler = Sampler::new(0.0, 0);
        let (outputs, _) =
            serve::serve(&model, &mut cache, &prompts, &limits, &mut sampler, &mut |_| {}).unwrap();
        let checked = check::check(&model, layers, &prompts, &outputs, true).unwrap();
        assert!(checked.passed(), "{}", checked.max_relative_error);
        outputs[0].logits.last().unwrap().clone()
    };
    let plain = run(inner);
    let edges = Layers { edges: Some(KvFormat::F16), ..inner };
    let spec = edges.spec(c);
    assert_eq!(spec.groups.iter().map(|group| group.layers).sum::<u32>() as usize, c.layers);
    assert_eq!((spec.groups[1].format, spec.groups[1].layers), (KvFormat::F16, 2));
    assert_ne!(run(edges), plain);
    let sinks = Layers { sink_tokens: 32, ..inner };
    assert_eq!(sinks.spec(c).groups[0].sink_tokens, 32);
    assert_ne!(run(sinks), plain);
    assert_ne!(run(Layers { sink_tokens: 32, ..edges }), plain);
}
