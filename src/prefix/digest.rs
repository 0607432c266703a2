//! Digests: the name of a block outside this process.
//!
//! A block's digest is SHA-256 of the digest before it and of its tokens, little-endian, so it
//! names the block and all that leads to it. The first block of [`Namespace`] 0 has nothing before
//! it; any other namespace puts a digest of its keys there, so that equal tokens of two namespaces
//! have unrelated digests. Without keys that is the page hash of SGLang, which other stores
//! understand. Digests never decide what is a hit: the index compares tokens, and computes none of
//! these. Whoever needs one (events, tiers) computes it once, when the block is committed.

use sha2::{Digest as _, Sha256};

use crate::ids::{Namespace, TokenId};

/// SHA-256 of a block and of everything before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Digest(pub [u8; 32]);

/// What separates a namespace from others, in the words of the server that chose it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Keys<'a> {
    /// Tenant or other salt; empty for none.
    pub salt: &'a str,
    /// Name of the adapter; empty for none.
    pub lora: &'a str,
    /// Further keys, such as digests of images, in order.
    pub extra: &'a [&'a [u8]],
}

impl Digest {
    /// The digest of a block of `tokens` that follows `parent`; for the first block of a sequence
    /// that is what [`Self::of_namespace`] or [`Self::of_keys`] gave.
    pub fn of_block(parent: Option<&Digest>, tokens: &[TokenId]) -> Digest {
        let mut hash = Sha256::new();
        if let Some(Digest(bytes)) = parent {
            hash.update(bytes);
        }
        // One compression block of SHA-256 at a time.
        let mut bytes = [0; 64];
        for part in tokens.chunks(16) {
            for (four, token) in bytes.chunks_exact_mut(4).zip(part) {
                four.copy_from_slice(&token.to_le_bytes());
            }
            hash.update(&bytes[..part.len() * 4]);
        }
        Digest(hash.finalize().into())
    }

    /// The same for a block in which tokens stand for `media`, each given by its token's place in the
    /// block and the digest of its content. Without any it is [`Self::of_block`].
    pub fn of_block_with_media(
        parent: Option<&Digest>,
        tokens: &[TokenId],
        media: &[(u32, Digest)],
    ) -> Digest {
        let block = Self::of_block(parent, tokens);
        if media.is_empty() {
            return block;
        }
        let mut hash = Sha256::new();
        hash.update(b"kvcache media 1");
        hash.update(block.0);
        Self::update_media(&mut hash, media);
        Digest(hash.finalize().into())
    }

    /// What stands before the first block of a namespace of which nothing but the number is known:
    /// nothing for namespace 0.
    pub fn of_namespace(space: Namespace) -> Option<Digest> {
        if space.0 == 0 {
            return None;
        }
        let mut hash = Sha256::new();
        hash.update(b"kvcache namespace 1");
        hash.update(space.0.to_le_bytes());
        Some(Digest(hash.finalize().into()))
    }

    /// What stands before the first block of a namespace with these keys: nothing where they are
    /// all empty. The same in every process.
    pub fn of_keys(keys: &Keys) -> Option<Digest> {
        if *keys == Keys::default() {
            return None;
        }
        let mut hash = Sha256::new();
        hash.update(b"kvcache keys 1");
        // With its length before each part, no two lists of parts give the same bytes.
        let parts = [keys.salt, keys.lora].map(str::as_bytes);
        for part in parts.into_iter().chain(keys.extra.iter().copied()) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Some(Digest(hash.finalize().into()))
    }

    /// What an object of a block says of its keys: those of the namespace (`before`) and of the
    /// `media` in the block, as for [`Self::of_block_with_media`].
    pub fn of_media(before: Option<&Digest>, media: &[(u32, Digest)]) -> Option<Digest> {
        if media.is_empty() {
            return before.copied();
        }
        let mut hash = Sha256::new();
        hash.update(b"kvcache keys and media 1");
        hash.update([u8::from(before.is_some())]);
        if let Some(Digest(bytes)) = before {
            hash.update(bytes);
        }
        Self::update_media(&mut hash, media);
        Some(Digest(hash.finalize().into()))
    }

    fn update_media(hash: &mut Sha256, media: &[(u32, Digest)]) {
        for (at, Digest(bytes)) in media {
            hash.update(at.to_le_bytes());
            hash.update(bytes);
        }
    }

    /// What stands before the first block where K and V are not stored as they were given: `before`
    /// (that of the namespace), and `storage`, all that says what the stored bytes mean.
    pub fn of_storage(before: Option<&Digest>, storage: &[u8]) -> Digest {
        let mut hash = Sha256::new();
        hash.update(b"kvcache storage 1");
        hash.update([u8::from(before.is_some())]);
        if let Some(Digest(bytes)) = before {
            hash.update(bytes);
        }
        hash.update(storage);
        Digest(hash.finalize().into())
    }

    /// The 64 bits that KV events carry: the last eight bytes, big-endian.
    pub fn short(&self) -> u64 {
        let mut last = [0; 8];
        last.copy_from_slice(&self.0[24..]);
        u64::from_be_bytes(last)
    }
}

/// In hexadecimal.
impl core::fmt::Display for Digest {
    fn fmt(&self, to: &mut core::fmt::Formatter) -> core::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(to, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::{String, ToString};
    use alloc::vec::Vec;

    fn hex(digest: &Digest) -> String {
        digest.to_string()
    }

    #[test]
    fn a_chain_without_keys_is_the_page_hash_of_sglang() {
        let first = Digest::of_block(None, &[1, 2, 3, 4]);
        assert!(hex(&first).starts_with("cf97adeedb59e05b"), "{}", hex(&first));
        let second = Digest::of_block(Some(&first), &[5, 6, 7, 8]);
        assert!(hex(&second).starts_with("4ebfa8a1f3c34151"), "{}", hex(&second));
        assert_eq!(format!("{:016x}", first.short()), hex(&first)[48..]);
    }

    #[test]
    fn long_blocks_are_hashed_whole() {
        // Against the hash of the bytes in one piece, for lengths around the pieces' own.
        for count in [0u32, 1, 15, 16, 17, 31, 32, 33, 256] {
            let tokens: Vec<u32> = (0..count).map(|i: u32| i.wrapping_mul(0x9e37_79b9)).collect();
            let parent = Digest([9; 32]);
            let mut bytes = parent.0.to_vec();
            bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
            let whole = Digest(Sha256::digest(&bytes).into());
            assert_eq!(Digest::of_block(Some(&parent), &tokens), whole, "{count} tokens");
        }
    }

    #[test]
    fn namespaces_and_keys_never_meet() {
        let extra: [&[u8]; 2] = [b"c", b""];
        let keys = [
            Keys { salt: "ab", ..Keys::default() },
            Keys { lora: "ab", ..Keys::default() },
            Keys { salt: "a", lora: "b", extra: &[] },
            Keys { salt: "ab", lora: "", extra: &extra },
            Keys { salt: "ab", lora: "", extra: &extra[..1] },
        ];
        let spaces = [1, 2, u64::MAX].map(Namespace);
        let mut seeds: Vec<_> = keys.iter().map(|keys| Digest::of_keys(keys).unwrap()).collect();
        seeds.extend(spaces.iter().map(|&space| Digest::of_namespace(space).unwrap()));
        let stored: Vec<_> =
            seeds.iter().map(|seed| Digest::of_storage(Some(seed), b"x")).collect();
        let plain = [b"x".as_slice(), b"y"].map(|bytes| Digest::of_storage(None, bytes));
        seeds.sort();
        seeds.dedup();
        assert_eq!(seeds.len(), keys.len() + spaces.len());
        seeds.extend(stored.iter().chain(&plain));
        seeds.sort();
        seeds.dedup();
        assert_eq!(seeds.len(), 2 * (keys.len() + spaces.len()) + plain.len());
        assert_eq!(Digest::of_namespace(Namespace(0)), None);
        assert_eq!(Digest::of_keys(&Keys::default()), None);
    }
}
