//! The prefix index as a program that a fuzzer writes, against a map of all cached prefixes: every
//! lookup finds what the map has and nothing else, only leaves without pins are evicted, and the
//! audit holds after every call. Blocks have one to four tokens, so that edges are cut everywhere.
#![no_main]

mod input;

use std::collections::BTreeMap;

use input::Input;
use kvcache::Error;
use kvcache::ids::{BlockId, Namespace, TokenId};
use kvcache::prefix::{Eviction, Hint, Hit, PinId, Position, PrefixIndex, Retention};
use libfuzzer_sys::fuzz_target;

type Prefix = (u64, Vec<TokenId>);

struct Program<'a> {
    input: Input<'a>,
    index: PrefixIndex,
    block: usize,
    groups: usize,
    /// Prefixes of whole blocks to the ids of their last one.
    cached: BTreeMap<Prefix, Vec<BlockId>>,
    pins: Vec<(PinId, Prefix)>,
    places: [(Position, Prefix); 4],
    now: u64,
    next: u32,
}

impl Program<'_> {
    fn tokens(&mut self, whole: bool) -> Vec<TokenId> {
        let mut tokens = self.input.tokens(40);
        if whole {
            tokens.truncate(tokens.len() / self.block * self.block);
        }
        tokens
    }

    fn depth(&self, space: u64, tokens: &[TokenId]) -> usize {
        let blocks = 1..=tokens.len() / self.block;
        blocks
            .take_while(|n| self.cached.contains_key(&(space, tokens[..n * self.block].to_vec())))
            .count()
    }

    fn insert(&mut self, at: Position, (space, before): Prefix) {
        let tokens = self.tokens(true);
        let count = tokens.len() / self.block;
        let fresh = |n: usize| BlockId(self.next + n as u32);
        let ids: Vec<_> = (0..count * self.groups).map(fresh).collect();
        self.next += ids.len() as u32;
        let (above, whole) = (before.len() / self.block, [before, tokens.clone()].concat());
        let (known, free) = (self.depth(space, &whole), self.index.free_blocks());
        let mut same = Vec::new();
        match self.index.insert_below(Namespace(space), at, &tokens, &ids, &mut same) {
            Ok(done) => {
                assert_eq!(above + done.present, known);
                assert_eq!(done.stored, (count - done.present).min(free));
                for n in known..known + done.stored {
                    let prefix = (space, whole[..(n + 1) * self.block].to_vec());
                    let entry = ids[(n - above) * self.groups..][..self.groups].to_vec();
                    self.cached.insert(prefix, entry);
                }
                let end = (known + done.stored) * self.block;
                let slot = self.input.below(4);
                self.places[slot] = (done.at, (space, whole[..end].to_vec()));
            }
            Err(error) => assert!(matches!(error, Error::StaleHandle { .. }), "{error}"),
        }
    }

    fn lookup(&mut self) {
        let (space, tokens) = (self.input.number() % 3, self.tokens(false));
        let most = self.input.number().min(1 << 20) as usize;
        let mut hit = Hit::default();
        self.index.lookup(Namespace(space), &tokens, most, &mut hit);
        let asked = &tokens[..tokens.len().min(most)];
        let depth = self.depth(space, asked);
        assert_eq!((hit.tokens, hit.at.blocks()), (depth * self.block, depth));
        let ids = (1..=depth).flat_map(|n| {
            self.cached[&(space, asked[..n * self.block].to_vec())].iter().copied()
        });
        assert!(hit.blocks.iter().copied().eq(ids));
        // The block that agrees longest with what follows.
        let rest = &asked[hit.tokens..];
        let below = self.cached.keys().filter(|(s, prefix)| {
            *s == space
                && prefix.len() == hit.tokens + self.block
                && prefix[..hit.tokens] == asked[..hit.tokens]
        });
        let agree = |(_, prefix): &Prefix| {
            prefix[hit.tokens..].iter().zip(rest).take_while(|(a, b)| a == b).count()
        };
        assert_eq!(hit.tail_tokens, below.map(agree).max().unwrap_or(0));
        let slot = self.input.below(4);
        self.places[slot] = (hit.at, (space, tokens[..hit.tokens].to_vec()));
    }

    fn gone(&mut self, gone: &[Vec<BlockId>]) {
        for ids in gone {
            let found = self.cached.iter().find(|(_, entry)| *entry == ids);
            let prefix = found.expect("an entry that was cached").0.clone();
            self.cached.remove(&prefix);
            let (space, tokens) = &prefix;
            let below = |(s, longer): &Prefix| s == space && longer.starts_with(tokens);
            assert!(!self.cached.keys().any(below), "evicted, and something hangs below");
            assert!(!self.pins.iter().any(|(_, pinned)| below(pinned)), "evicted, and pinned");
        }
    }

    /// Whether a call on a position did what it was asked: it may be stale, and is not if cached.
    fn answered(&self, result: Result<(), Error>, at: Position) {
        match result {
            Ok(()) => assert!(self.index.is_cached(at)),
            Err(Error::StaleHandle { .. }) => assert!(!self.index.is_cached(at)),
            Err(error) => assert!(matches!(error, Error::InvalidArgument { .. }), "{error}"),
        }
    }

    fn call(&mut self) {
        let (at, prefix) = self.places[self.input.below(4)].clone();
        match self.input.below(13) {
            0..=2 => {
                let space = self.input.number() % 3;
                self.insert(Position::default(), (space, Vec::new()));
            }
            3 => self.insert(at, prefix),
            4 | 5 => self.lookup(),
            6 => match self.index.lock(at) {
                Ok(pin) => self.pins.push((pin, prefix)),
                Err(error) => assert!(matches!(error, Error::StaleHandle { .. })),
            },
            7 => {
                let Some(which) = self.input.below(256).checked_rem(self.pins.len()) else { return };
                let (pin, _) = self.pins.swap_remove(which);
                if self.input.seldom() {
                    self.index.unlock(pin).unwrap();
                } else {
                    self.index.release(pin).unwrap();
                }
                assert!(self.index.unlock(pin).is_err());
            }
            8 => {
                let (want, veto) = (self.input.below(20), self.input.byte());
                let mut gone = Vec::new();
                self.index.evict(want, &mut |ids| ids[0].0 % 16 != u32::from(veto), &mut |ids| {
                    gone.push(ids.to_vec())
                });
                assert!(gone.len() <= want);
                self.gone(&gone);
            }
            9 => {
                let (space, mut gone) = (self.input.number() % 3, Vec::new());
                let mut see = |ids: &[BlockId]| gone.push(ids.to_vec());
                if self.input.seldom() {
                    self.index.clear(Namespace(space), &mut see);
                } else {
                    let tokens = self.tokens(true);
                    self.index.remove(Namespace(space), &tokens, &mut see).unwrap();
                }
                self.gone(&gone);
            }
            10 => {
                let result = self.index.touch(at);
                self.answered(result, at);
            }
            11 => {
                let (start, priority) = (self.input.below(50), self.input.byte());
                let end = self.input.seldom().then(|| self.input.below(50));
                let duration_ms = self.input.seldom().then(|| self.input.number32());
                let ranges = [Retention { start, end, priority, duration_ms }];
                let result = self.index.prioritize(at, &ranges);
                self.answered(result, at);
            }
            _ => {
                let step = self.input.number();
                let later = self.now.saturating_add(step);
                if self.index.advance(later).is_ok() {
                    self.now = later;
                }
                let hint = [
                    Hint::None,
                    Hint::SessionEnded,
                    Hint::Waited,
                    Hint::ExpectedAt { ms: self.now.saturating_add(self.input.number()) },
                ][self.input.below(4)];
                let from = self.input.below(10);
                let result = self.index.hint(at, from, hint);
                self.answered(result, at);
            }
        }
        self.index.audit().unwrap();
        assert_eq!(self.index.len_blocks(), self.cached.len());
        assert_eq!(self.index.stats().pins, self.pins.len());
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (block, groups) = (1 + input.below(4), 1 + input.below(2));
    let policies =
        [Eviction::Lru, Eviction::Lfu, Eviction::Fifo, Eviction::Slru, Eviction::S3Fifo];
    let eviction = policies[input.below(5)];
    let capacity = 1 + input.below(64) as u32;
    let nowhere = || (Position::default(), (0, Vec::new()));
    let mut program = Program {
        input,
        index: PrefixIndex::with_eviction(block, groups, capacity, eviction).unwrap(),
        block,
        groups,
        cached: BTreeMap::new(),
        pins: Vec::new(),
        places: [nowhere(), nowhere(), nowhere(), nowhere()],
        now: 0,
        next: 1,
    };
    while !program.input.is_empty() {
        program.call();
    }
});
