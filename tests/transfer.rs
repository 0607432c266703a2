//! Blocks exported from one cache and imported by another: of another block size, of other heads,
//! from several; and streams that are damaged, cut or foreign.

use std::io::Read;

use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::dtype::KvFormat;
use kvcache::ids::Namespace;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};

const LAYERS: u32 = 2;
const HEADS: u32 = 4;
const DIM: u32 = 16;
const SPACE: Namespace = Namespace(0);

fn spec(block_tokens: u32) -> CacheSpec {
    CacheSpec::uniform(block_tokens, GroupSpec::uniform(LAYERS, HEADS, DIM, KvFormat::F16))
}

fn cache(spec: &CacheSpec) -> KvCache {
    let options = CacheOptions { blocks: 24, max_seqs: 4, threads: 1, ..CacheOptions::default() };
    KvCache::new(spec, &options).unwrap()
}

fn rows(
    kind: u32,
    layer: u32,
    first: usize,
    count: usize,
    heads: std::ops::Range<u32>,
) -> Vec<f32> {
    let mut rows = Vec::new();
    for at in first as u32..(first + count) as u32 {
        for head in heads.clone() {
            for channel in 0..DIM {
                let parts = [kind, layer, at, head, channel];
                let hash = parts.iter().fold(7u32, |hash, part| {
                    (hash ^ part).wrapping_mul(0x85eb_ca6b).rotate_left(13)
                });
                rows.push((hash >> 8) as f32 / (1 << 23) as f32 - 1.0);
            }
        }
    }
    rows
}

/// Feeds what is not cached and attends from the last token alone; how much was cached, the
/// attention, and the sequence.
fn serve(
    cache: &mut KvCache,
    prompt: &[u32],
    slice: &Slice,
) -> (usize, Vec<f32>, kvcache::ids::SeqId) {
    let part = slice.groups[0];
    let heads = part.first_head..part.first_head + part.heads;
    let started = cache.start(prompt, SPACE).unwrap();
    let (cached, last) = (started.cached_tokens as usize, prompt.len() - 1);
    let (mut step, mut out) = (Step::new(), Vec::new());
    for range in [cached..last, last..prompt.len()] {
        if range.is_empty() {
            continue;
        }
        let work = Work { seq: started.seq, tokens: &prompt[range.clone()] };
        cache.begin(&mut step, &[work]).unwrap();
        for layer in 0..part.layers {
            let row = |kind| {
                rows(kind, part.first_layer + layer, range.start, range.len(), heads.clone())
            };
            let (q, k, v) = (row(0), row(1), row(2));
            let at = LayerId::uniform(layer);
            cache.append(&step, at, k[..].into(), v[..].into(), None).unwrap();
            let mut attended = vec![0f32; q.len()];
            let scoring = Scoring::causal(DIM);
            cache
                .attend(&step, at, q[..].into(), (&mut attended[..]).into(), &scoring, None)
                .unwrap();
            if range.start == last {
                out.extend(attended);
            }
        }
        cache.commit(&mut step).unwrap();
    }
    (cached, out, started.seq)
}

fn prompt() -> Vec<u32> {
    (100..100 + 131).collect()
}

fn export(cache: &mut KvCache, slice: &Slice) -> (Vec<u8>, Vec<f32>) {
    let (_, out, seq) = serve(cache, &prompt(), slice);
    let mut stream = Vec::new();
    let tokens = cache.export_blocks(seq, "m", Some(slice), &mut stream).unwrap();
    assert_eq!(
        tokens,
        131 / cache.spec().block_tokens as usize * cache.spec().block_tokens as usize
    );
    (stream, out)
}

#[test]
fn any_block_size_takes_the_blocks_of_any() {
    for (from, to) in [(16, 16), (16, 64), (64, 16), (32, 128)] {
        let whole = Slice::whole(&spec(from));
        let (stream, _) = export(&mut cache(&spec(from)), &whole);
        // Attention goes over blocks, so its bits are those of a cache with the same ones.
        let expected = serve(&mut cache(&spec(to)), &prompt(), &whole).1;
        let mut other = cache(&spec(to));
        let mut reader = &stream[..];
        let tokens = other.import_blocks(&mut [&mut reader], "m", None, SPACE).unwrap();
        assert!(reader.is_empty());
        assert_eq!(tokens, 128);
        other.audit().unwrap();
        let (cached, out, _) = serve(&mut other, &prompt(), &whole);
        assert_eq!((cached, out), (128, expected), "{from} to {to}");
    }
}

#[test]
fn ranks_take_their_heads_of_a_whole_and_a_whole_is_put_together_from_ranks() {
    let whole = Slice::whole(&spec(16));
    let (stream, expected) = export(&mut cache(&spec(16)), &whole);
    let wide = serve(&mut cache(&spec(32)), &prompt(), &whole).1;
    let width = (DIM * HEADS) as usize;
    let mut streams = Vec::new();
    for rank in 0..2 {
        let slice = Slice::tensor_parallel(&spec(32), rank, 2).unwrap();
        let mut part = cache(&spec(32).slice(&slice).unwrap());
        let mut reader = &stream[..];
        part.import_blocks(&mut [&mut reader], "m", Some(&slice), SPACE).unwrap();
        let (cached, out, seq) = serve(&mut part, &prompt(), &slice);
        assert_eq!(cached, 128);
        for (layer, out) in out.chunks_exact(width / 2).enumerate() {
            let at = layer * width + rank as usize * width / 2;
            assert_eq!(out, &wide[at..at + width / 2]);
        }
        let mut stream = Vec::new();
        part.export_blocks(seq, "m", Some(&slice), &mut stream).unwrap();
        streams.push(stream);
    }
    let mut again = cache(&spec(16));
    let (mut a, mut b) = (&streams[0][..], &streams[1][..]);
    let one: &mut [&mut dyn Read] = &mut [&mut a];
    let refused = again.import_blocks(one, "m", None, SPACE).unwrap_err();
    assert!(refused.to_string().contains("all layers and heads"), "{refused}");
    a = &streams[0][..];
    again.import_blocks(&mut [&mut a, &mut b], "m", None, SPACE).unwrap();
    let (cached, out, _) = serve(&mut again, &prompt(), &whole);
    assert_eq!((cached, out), (128, expected));
}

#[test]
fn what_is_damaged_cut_or_foreign_is_refused_and_nothing_is_cached() {
    let whole = Slice::whole(&spec(16));
    let (stream, _) = export(&mut cache(&spec(16)), &whole);
    let mut other = cache(&spec(16));
    let mut refused = |bytes: &[u8], model: &str, space: u64| {
        let mut reader = bytes;
        let result = other.import_blocks(&mut [&mut reader], model, None, Namespace(space));
        assert!(result.is_err());
        other.audit().unwrap();
        let stats = other.stats();
        assert_eq!((stats.free_blocks, stats.sequences), (24, 0));
    };
    refused(&stream, "n", 0);
    refused(&stream, "m", 9);
    for at in (0..stream.len()).filter(|at| *at < 800 || at % 997 == 0) {
        let mut damaged = stream.clone();
        damaged[at] ^= 0x10;
        refused(&damaged, "m", 0);
    }
    for length in [0, 7, 12, 100, 700, 5000, stream.len() - 1] {
        refused(&stream[..length], "m", 0);
    }
    // A head that claims to be very long.
    let mut long = stream[..8].to_vec();
    long.extend(u32::MAX.to_le_bytes());
    refused(&long, "m", 0);
    let mut other = cache(&CacheSpec::uniform(16, GroupSpec::uniform(2, 4, 16, KvFormat::Bf16)));
    let mut reader = &stream[..];
    assert!(other.import_blocks(&mut [&mut reader], "m", None, SPACE).is_err());
    assert!(other.import_blocks(&mut [], "m", None, SPACE).is_err());
}
