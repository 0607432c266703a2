//! Media in prompts: images, clips, embeddings, whose placeholder tokens do not say which they are.
//!
//! The index compares tokens alone, so where a medium begins, its token is looked up and stored as a
//! key: a number past every token id that stands for this digest and this token in this cache. So
//! what is before a medium is shared by all prompts, what begins with it by those with the same one,
//! and no hash decides which. Keys never leave the cache: digests, events, objects and streams are
//! made of the tokens and the media behind them.
//!
//! Keys are numbers that are used once. Those that neither the index nor a sequence has are
//! forgotten when their number has doubled; a medium that comes back then gets another.

use alloc::vec::Vec;

use super::sequence::Sequence;
use super::{KvCache, reserve};
use crate::error::{Error, Result};
use crate::ids::TokenId;
use crate::prefix::Digest;

/// The first number that is no token id.
const FIRST_KEY: TokenId = 1 << 31;
/// Keys that are not worth looking for unused ones among.
const FEW_KEYS: usize = 1024;

/// Something in a prompt that its tokens do not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Media {
    /// The position of the first token that stands for it.
    pub position: u32,
    /// The digest of its content, as the server computed it; and of how it is processed, where that
    /// may differ. Equal digests are taken for equal content.
    pub digest: Digest,
}

/// A key in a sequence, by the position of its token.
pub(super) type Placed = (u32, TokenId);

impl Media {
    pub(super) fn from_pair(&(position, digest): &(u32, Digest)) -> Self {
        Media { position, digest }
    }
}

/// What a key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Content {
    digest: Digest,
    token: TokenId,
}

/// The keys of a cache.
#[derive(Debug)]
pub(super) struct MediaKeys {
    /// Ascending by key.
    entries: Vec<(TokenId, Content)>,
    /// Places in `entries`, ascending by content.
    sorted: Vec<u32>,
    /// `None` once there are no more.
    next: Option<TokenId>,
    /// How many entries are looked through for unused ones.
    full_at: usize,
}

impl MediaKeys {
    pub(super) fn new() -> Self {
        let (entries, sorted) = (Vec::new(), Vec::new());
        MediaKeys { entries, sorted, next: Some(FIRST_KEY), full_at: FEW_KEYS }
    }

    fn find(&self, content: &Content) -> core::result::Result<usize, usize> {
        self.sorted.binary_search_by(|&place| self.entries[place as usize].1.cmp(content))
    }

    /// The key of a content, a new one if need be.
    fn key(&mut self, content: Content) -> Result<TokenId> {
        let at = match self.find(&content) {
            Ok(at) => return Ok(self.entries[self.sorted[at] as usize].0),
            Err(at) => at,
        };
        let key = self.next.ok_or(Error::Overflow { what: "media of a cache" })?;
        reserve(&mut self.entries, 1)?;
        reserve(&mut self.sorted, 1)?;
        self.sorted.insert(at, self.entries.len() as u32);
        self.entries.push((key, content));
        self.next = key.checked_add(1);
        Ok(key)
    }

    fn content(&self, key: TokenId) -> Option<&Content> {
        let at = self.entries.binary_search_by_key(&key, |entry| entry.0).ok()?;
        Some(&self.entries[at].1)
    }

    /// Forgets the keys that are not among `used`, which are ascending.
    fn retain(&mut self, used: &[TokenId]) {
        self.entries.retain(|entry| used.binary_search(&entry.0).is_ok());
        self.full_at = FEW_KEYS.max(2 * self.entries.len());
        let entries = &self.entries;
        self.sorted.clear();
        self.sorted.extend(0..entries.len() as u32);
        self.sorted.sort_unstable_by_key(|&place| entries[place as usize].1);
    }

    /// Shows some of the index's tokens as the engine gave them, and the media among them.
    pub(super) fn tell<R>(
        &self,
        tokens: &[TokenId],
        see: impl FnOnce(&[TokenId], &[(u32, Digest)]) -> R,
    ) -> R {
        if all_plain(tokens) {
            return see(tokens, &[]);
        }
        let (mut plain, mut media) = (tokens.to_vec(), Vec::new());
        for (at, token) in (0..).zip(&mut plain) {
            // Of tokens below there is none.
            if let Some(content) = self.content(*token) {
                *token = content.token;
                media.push((at, content.digest));
            }
        }
        see(&plain, &media)
    }

    /// Position and digest of a sequence's media among its first `tokens` tokens.
    pub(super) fn of_sequence(&self, placed: &[Placed], tokens: usize) -> Vec<(u32, Digest)> {
        let inside = placed.iter().filter(|placed| (placed.0 as usize) < tokens);
        inside.filter_map(|&(at, key)| Some((at, self.content(key)?.digest))).collect()
    }

    /// The digest of a block of the index's tokens.
    pub(super) fn digest(&self, parent: Option<&Digest>, tokens: &[TokenId]) -> Digest {
        self.tell(tokens, |tokens, media| Digest::of_block_with_media(parent, tokens, media))
    }
}

/// Whether no token is a key, or could be taken for one.
#[inline]
fn all_plain(tokens: &[TokenId]) -> bool {
    tokens.iter().fold(0, |all, token| all | token) < FIRST_KEY
}

/// Refuses tokens that could be taken for keys.
pub(super) fn check_tokens(tokens: &[TokenId]) -> Result<()> {
    if all_plain(tokens) { Ok(()) } else { Err(Error::invalid("tokens", "must be below 2^31")) }
}

/// Tokens as the index has them: borrowed where nothing in them is a medium.
#[derive(Debug)]
pub(super) enum Keyed<'a> {
    Plain(&'a [TokenId]),
    Keys(Vec<TokenId>),
}

impl core::ops::Deref for Keyed<'_> {
    type Target = [TokenId];

    fn deref(&self) -> &[TokenId] {
        match self {
            Keyed::Plain(tokens) => tokens,
            Keyed::Keys(tokens) => tokens,
        }
    }
}

/// The tokens as the index has them, where `placed` are the sequence's media.
pub(super) fn keyed<'a>(tokens: &'a [TokenId], placed: &[Placed]) -> Result<Keyed<'a>> {
    if placed.is_empty() {
        return Ok(Keyed::Plain(tokens));
    }
    let mut keys = Vec::new();
    reserve(&mut keys, tokens.len())?;
    keys.extend_from_slice(tokens);
    for &(position, key) in placed {
        keys.get_mut(position as usize).into_iter().for_each(|token| *token = key);
    }
    Ok(Keyed::Keys(keys))
}

impl Sequence {
    /// Refuses to cut a medium off: what came in its place would be taken for it.
    pub(super) fn check_media(&self, tokens: usize) -> Result<()> {
        let cut = tokens..self.tokens.len();
        if self.media.iter().any(|&(position, _)| cut.contains(&(position as usize))) {
            return Err(Error::invalid("tokens", "must leave the prompt's media"));
        }
        Ok(())
    }
}

impl KvCache {
    /// Checks a prompt and its media, and finds the keys of those.
    pub(super) fn place_media(
        &mut self,
        prompt: &[TokenId],
        media: &[Media],
    ) -> Result<Vec<Placed>> {
        check_tokens(prompt)?;
        let ordered = media.windows(2).all(|pair| pair[0].position < pair[1].position);
        let inside = media.last().is_none_or(|last| (last.position as usize) < prompt.len());
        if !ordered || !inside {
            let why = "must be in order, one a position, within the prompt";
            return Err(Error::invalid("media", why));
        }
        let mut placed = Vec::new();
        if media.is_empty() {
            return Ok(placed);
        }
        if self.media.entries.len() >= self.media.full_at {
            self.forget_media()?;
        }
        reserve(&mut placed, media.len())?;
        for &Media { position, digest } in media {
            let token = prompt[position as usize];
            placed.push((position, self.media.key(Content { digest, token })?));
        }
        Ok(placed)
    }

    /// Forgets the keys that nothing has any more.
    fn forget_media(&mut self) -> Result<()> {
        let mut used = Vec::new();
        let mut seen = Ok(());
        if let Some(prefix) = &self.prefix {
            prefix.for_each_chain(&mut |chain| {
                let keys = chain.tokens.iter().filter(|token| **token >= FIRST_KEY);
                for &key in keys {
                    let room = if seen.is_ok() { reserve(&mut used, 1) } else { Ok(()) };
                    match room {
                        Ok(()) => used.push(key),
                        Err(error) => seen = Err(error),
                    }
                }
            });
        }
        seen?;
        for sequence in self.sequences.iter() {
            reserve(&mut used, sequence.media.len())?;
            used.extend(sequence.media.iter().map(|placed| placed.1));
        }
        used.sort_unstable();
        self.media.retain(&used);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(n: u8, token: TokenId) -> Content {
        Content { digest: Digest([n; 32]), token }
    }

    #[test]
    fn a_key_is_of_one_content_and_is_used_once() {
        let mut keys = MediaKeys::new();
        let made = [(3, 7), (1, 7), (3, 8), (2, 7)];
        let made = made.map(|(n, token)| keys.key(content(n, token)).unwrap());
        assert_eq!(made, [0, 1, 2, 3].map(|n| FIRST_KEY + n));
        assert_eq!(keys.key(content(1, 7)).unwrap(), made[1]);
        keys.tell(&[made[2], 12], |tokens, _| assert_eq!(tokens, [8, 12]));
        keys.retain(&[made[0], made[3]]);
        assert_eq!(keys.key(content(2, 7)).unwrap(), made[3]);
        assert_eq!(keys.key(content(3, 7)).unwrap(), made[0]);
        // Forgotten, and so another.
        assert_eq!(keys.key(content(1, 7)).unwrap(), FIRST_KEY + 4);
        keys.next = None;
        assert!(matches!(keys.key(content(9, 9)), Err(Error::Overflow { .. })));
    }

    #[test]
    fn digests_are_of_content_and_not_of_keys() {
        let (mut one, mut other) = (MediaKeys::new(), MediaKeys::new());
        other.key(content(9, 1)).unwrap();
        let tokens = |keys: &mut MediaKeys, n| [1, keys.key(content(n, 5)).unwrap(), 6];
        let (a, b, c) = (tokens(&mut one, 1), tokens(&mut other, 1), tokens(&mut other, 2));
        assert_ne!(a, b);
        assert_eq!(one.digest(None, &a), other.digest(None, &b));
        assert_ne!(other.digest(None, &b), other.digest(None, &c));
        assert_ne!(one.digest(None, &a), one.digest(None, &[1, 5, 6]));
        assert_eq!(one.digest(None, &[1, 5, 6]), Digest::of_block(None, &[1, 5, 6]));
        one.tell(&a, |tokens, media| {
            assert_eq!((tokens, media), (&[1, 5, 6][..], &[(1, Digest([1; 32]))][..]));
        });
    }
}
