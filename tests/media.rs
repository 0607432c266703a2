//! Media in prompts: equal tokens with other images are other prompts, from the image on, wherever
//! they are looked for: on the device, in tiers, in another cache's streams, in events.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use kvcache::Error;
use kvcache::cache::{CacheOptions, KvCache, Media, Step, TierOptions, Work};
use kvcache::dtype::KvFormat;
use kvcache::events::{Event, Message, Publisher};
use kvcache::ids::{Namespace, SeqId};
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::prefix::Digest;

mod random;
use random::Rng;

const BLOCK: usize = 16;
const SPACE: Namespace = Namespace(3);

fn cache(blocks: u32) -> KvCache {
    let spec = CacheSpec::uniform(BLOCK as u32, GroupSpec::uniform(1, 1, 8, KvFormat::F16));
    let options = CacheOptions { blocks, max_seqs: 8, threads: 1, ..CacheOptions::default() };
    KvCache::new(&spec, &options).unwrap()
}

fn image(position: u32, n: u8) -> Media {
    Media { position, digest: Digest([n; 32]) }
}

/// Starts a prompt and computes the rest of it; the sequence, and how much was cached.
fn open(cache: &mut KvCache, prompt: &[u32], media: &[Media]) -> (SeqId, usize) {
    let started = cache.start_with_media(prompt, media, SPACE).unwrap();
    let (seq, cached) = (started.seq, started.cached_tokens as usize);
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: &prompt[cached..] }]).unwrap();
    cache.commit(&mut step).unwrap();
    cache.audit().unwrap();
    (seq, cached)
}

fn serve(cache: &mut KvCache, prompt: &[u32], media: &[Media]) -> usize {
    let (seq, cached) = open(cache, prompt, media);
    assert_eq!(cache.tokens(seq).unwrap(), prompt);
    cache.release(seq).unwrap();
    cached
}

#[test]
fn what_is_before_an_image_is_shared_and_what_follows_is_its_own() {
    let mut cache = cache(64);
    let prompt: Vec<u32> = (100..180).collect();
    assert_eq!(serve(&mut cache, &prompt, &[image(40, 1)]), 0);
    assert_eq!(serve(&mut cache, &prompt, &[image(40, 1)]), 79);
    // Up to the image, and not a token more, whatever else is equal.
    assert_eq!(serve(&mut cache, &prompt, &[image(40, 2)]), 40);
    assert_eq!(serve(&mut cache, &prompt, &[image(39, 1)]), 39);
    assert_eq!(serve(&mut cache, &prompt, &[]), 40);
    assert_eq!(serve(&mut cache, &prompt, &[]), 79);
    // The same image again, and a second one behind it.
    assert_eq!(serve(&mut cache, &prompt, &[image(40, 1), image(70, 9)]), 70);
    assert_eq!(serve(&mut cache, &prompt, &[image(40, 2), image(60, 9)]), 60);
    // As the last token, which is never cached.
    assert_eq!(serve(&mut cache, &prompt[..41], &[image(40, 1)]), 40);
}

#[test]
fn forks_keep_their_images_and_no_cut_leaves_one_without_its_tokens() {
    let mut cache = cache(64);
    let prompt: Vec<u32> = (0..50).collect();
    let (seq, _) = open(&mut cache, &prompt, &[image(40, 1)]);
    let fork = cache.fork(seq).unwrap();
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq: fork, tokens: &[7; 20] }]).unwrap();
    cache.commit(&mut step).unwrap();
    cache.audit().unwrap();
    cache.truncate(fork, 45).unwrap();
    for tokens in [0, 39, 40] {
        let cut = cache.truncate(fork, tokens);
        assert!(matches!(cut, Err(Error::InvalidArgument { .. })), "{tokens}");
    }
    cache.truncate(fork, 41).unwrap();
    cache.audit().unwrap();
    let longer: Vec<u32> = prompt.iter().copied().chain([7; 20]).collect();
    assert_eq!(serve(&mut cache, &longer, &[image(40, 1)]), 64);
    assert_eq!(serve(&mut cache, &longer, &[image(40, 2)]), 40);
}

#[test]
fn media_that_cannot_be_are_refused() {
    let mut cache = cache(8);
    let prompt = [1, 2, 3, 4];
    for media in
        [[image(1, 1), image(1, 2)], [image(2, 1), image(1, 1)], [image(0, 1), image(4, 1)]]
    {
        let started = cache.start_with_media(&prompt, &media, SPACE);
        assert!(matches!(started, Err(Error::InvalidArgument { .. })));
    }
    // What could be taken for a key is no token, in a prompt or in a step.
    for token in [1 << 31, u32::MAX] {
        assert!(matches!(cache.start(&[token], SPACE), Err(Error::InvalidArgument { .. })));
        let seq = cache.start(&[1], SPACE).unwrap().seq;
        let begun = cache.begin(&mut Step::new(), &[Work { seq, tokens: &[1, token] }]);
        assert!(matches!(begun, Err(Error::InvalidArgument { .. })));
        cache.release(seq).unwrap();
    }
    assert_eq!(cache.stats().sequences, 0);
    cache.audit().unwrap();
}

/// What a prompt is: its tokens with the images behind them.
type Content = Vec<(u32, Option<Digest>)>;

#[test]
fn hits_are_those_of_a_plain_model() {
    let mut cache = cache(4096);
    let mut random = Rng::new(5);
    let mut below = |n: usize| random.below(n) as u32;
    let mut stored: BTreeSet<Content> = BTreeSet::new();
    for round in 0..if cfg!(miri) { 20 } else { 600 } {
        let length = 1 + below(90);
        // Few tokens and images, so that prompts agree for long.
        let prompt: Vec<u32> = (0..length).map(|at| at / 7 + u32::from(below(40) == 0)).collect();
        let mut media = Vec::new();
        for position in 0..length {
            if below(12) == 0 {
                media.push(image(position, below(2) as u8));
            }
        }
        let mut content: Content = prompt.iter().map(|&token| (token, None)).collect();
        media.iter().for_each(|m| content[m.position as usize].1 = Some(m.digest));
        let most = &content[..content.len() - 1];
        let whole = (0..=most.len() / BLOCK).rev();
        let whole = whole.map(|n| n * BLOCK).find(|&n| n == 0 || stored.contains(&most[..n]));
        let whole = whole.unwrap();
        let next =
            stored.iter().filter(|s| s.len() == whole + BLOCK && s[..whole] == most[..whole]);
        let tail = next.map(|s| most.iter().zip(s).take_while(|(a, b)| a == b).count());
        let expected = tail.max().unwrap_or(whole);
        assert_eq!(serve(&mut cache, &prompt, &media), expected, "round {round}");
        for n in 1..=content.len() / BLOCK {
            stored.insert(content[..n * BLOCK].to_vec());
        }
    }
}

#[test]
fn keys_that_nothing_has_are_forgotten_and_never_mean_another_image() {
    let mut cache = cache(8);
    let prompt: Vec<u32> = (0..33).collect();
    let digest = |n: u32| {
        let mut digest = Digest::default();
        digest.0[..4].copy_from_slice(&n.to_le_bytes());
        Media { position: 5, digest }
    };
    // Far more images than the cache can hold.
    for n in 0..if cfg!(miri) { 50 } else { 5000 } {
        assert!(serve(&mut cache, &prompt, &[digest(n)]) <= 5, "{n}");
        assert_eq!(serve(&mut cache, &prompt, &[digest(n)]), 32);
    }
}

#[test]
fn tiers_tell_images_apart() {
    let mut cache = cache(8);
    cache.attach_tiers(TierOptions::host("m", 64)).unwrap();
    let prompt: Vec<u32> = (0..65).collect();
    let flush: Vec<u32> = (1000..1000 + 8 * BLOCK as u32).collect();
    assert_eq!(serve(&mut cache, &prompt, &[image(20, 1)]), 0);
    serve(&mut cache, &flush, &[]);
    // Only the block before the image's.
    let found = |cache: &mut KvCache, media: &[Media]| {
        let found = cache.prefetch_with_media(&prompt, media, SPACE).unwrap().host_tokens;
        let started = cache.start_with_media(&prompt, media, SPACE).unwrap();
        cache.release(started.seq).unwrap();
        (found, started.cached_tokens as usize)
    };
    assert_eq!(found(&mut cache, &[image(20, 2)]), (16, 16));
    serve(&mut cache, &flush, &[]);
    assert_eq!(found(&mut cache, &[]), (16, 16));
    serve(&mut cache, &flush, &[]);
    assert_eq!(found(&mut cache, &[image(20, 1)]), (64, 64));
}

#[test]
fn streams_carry_their_images() {
    let mut from = cache(16);
    // Another history, and so other keys.
    serve(&mut from, &[9; 20], &[image(3, 9)]);
    let prompt: Vec<u32> = (0..50).collect();
    let (seq, _) = open(&mut from, &prompt, &[image(20, 1), image(49, 2)]);
    let mut bytes = Vec::new();
    assert_eq!(from.export_blocks(seq, "m", None, &mut bytes).unwrap(), 48);
    let mut to = cache(64);
    let imported = to.import_blocks(&mut [&mut &bytes[..]], "m", None, SPACE);
    assert_eq!(imported.unwrap(), 48);
    assert_eq!(serve(&mut to, &prompt, &[image(20, 2)]), 20);
    assert_eq!(serve(&mut to, &prompt, &[image(20, 1)]), 48);
    // A digest that was changed on the way is found out.
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        assert!(to.import_blocks(&mut [&mut &damaged[..]], "m", None, SPACE).is_err(), "{at}");
    }
}

/// Tokens, media and digests of an event of stored blocks.
type Told = (Vec<u32>, Vec<(u32, Digest)>, Vec<Digest>);

#[test]
fn events_have_the_tokens_as_given_and_the_images_among_them() {
    let told = |history: bool, late: bool| {
        let mut cache = cache(64);
        if history {
            serve(&mut cache, &[9; 20], &[image(3, 9)]);
            cache.clear_prefix().unwrap();
        }
        let prompt: Vec<u32> = (0..50).collect();
        let media = [image(0, 4), image(20, 1), image(47, 2)];
        if late {
            serve(&mut cache, &prompt, &media);
        }
        let queue = cache.enable_events(0).unwrap();
        if !late {
            serve(&mut cache, &prompt, &media);
        }
        let all: Arc<Mutex<Vec<Told>>> = Arc::default();
        let seen = all.clone();
        let sink = move |message: &Message| {
            for event in message.events() {
                if let Event::Stored { tokens, media, digests, .. } = event {
                    seen.lock().unwrap().push((tokens.into(), media.into(), digests.into()));
                }
            }
        };
        drop(Publisher::start(queue, vec![Box::new(sink)]).unwrap());
        all.lock().unwrap().clone()
    };
    let expected = told(false, false);
    assert_eq!(expected.len(), 1);
    let (tokens, media, digests) = &expected[0];
    assert_eq!(tokens[..], (0..48).collect::<Vec<u32>>());
    assert_eq!(media[..], [(0, 4), (20, 1), (47, 2)].map(|(at, n)| (at, Digest([n; 32]))));
    let first = [(0, Digest([4; 32]))];
    let seed = Digest::of_namespace(SPACE);
    assert_eq!(digests[0], Digest::of_block_with_media(seed.as_ref(), &tokens[..16], &first));
    for (history, late) in [(true, false), (false, true), (true, true)] {
        assert_eq!(told(history, late), expected, "{history} {late}");
    }
}
