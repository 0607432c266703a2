//! An object: a block with everything that is needed to know that it is the right one.
//!
//! ```text
//! 0    magic "KVCOBJ2\0"
//! 8    u32 CRC-32C of the head's bytes from 12 on
//! 12   u32 bytes of the head: 4,096
//! 16   u64 bytes of the payload
//! 24   u32 tokens
//! 28   u32 parts
//! 32   key, 32 bytes
//! 64   digest of the configuration
//! 96   digest of the block before; zeros where there is none
//! 128  digest of the namespace's keys (salt, adapter) and of the media in the block; zeros where there
//!      are none
//! 160  the tokens, u32 each; zeros up to 1184
//! 1184 CRC-32C of each part, u32 each; zeros up to the head's end
//! 4096 payload: the block of each layer group, one after the other; zeros up to a multiple of 4,096
//! ```
//!
//! A block with raw rows has several objects, each with a key of its own, and in their payloads the rows
//! instead of records ([`spread`](super::spread)): which blocks those are follows from the configuration.
//!
//! Little-endian. An object is used only where all of it is as expected ([`verify`]): a hash or an
//! index that leads to the wrong object is a miss, never a wrong answer.
//!
//! A sum over all of an object could be checked only when all of it is there, and an engine that
//! starts with the first layers would attend over bytes that nobody has checked. So each part (a
//! layer, in models of up to 728: [`Parts`](super::parts)) has a sum of its own, in a head that has
//! one too: with the head, which says what block it is, a part can be verified alone. Version 1 had
//! one sum; since the version is part of the configuration, its objects have other keys and another
//! directory, and are never found.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;

use super::ObjectKey;
use super::key::Configuration;
use super::parts::Part;
use crate::ids::{Namespace, TokenId};
use crate::layout::BLOCK_TOKENS_RANGE;
use crate::prefix::Digest;

/// Bytes of an object's head; objects are whole pages, so that they can be read past the page cache.
pub const HEAD_BYTES: usize = 4096;

const MAGIC: [u8; 8] = *b"KVCOBJ2\0";
const CRC_AT: usize = 8;
const CHECKED_FROM: usize = 12;
const TOKENS_AT: usize = 160;
const SUMS_AT: usize = TOKENS_AT + 4 * *BLOCK_TOKENS_RANGE.end() as usize;
/// The most parts of an object: as many as there is room for sums in its head.
pub const MOST_PARTS: usize = (HEAD_BYTES - SUMS_AT) / 4;

/// What KV events say of a block and its object does not carry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Origin {
    /// The namespace, by its number in the cache that labelled the block.
    pub space: Namespace,
    /// What stands before a sequence's first block in it; `None` where nothing does.
    pub seed: Option<Digest>,
    /// The media that begin in the block: the place of the token, and the digest.
    pub media: Box<[(u32, Digest)]>,
}

/// What is known of a block beside its bytes. Equal where an object of the one is an object of the
/// other: origins are not looked at.
#[derive(Debug, Clone)]
pub struct Label {
    /// Its key.
    pub key: ObjectKey,
    /// The digest of the block itself.
    pub block: Digest,
    /// The block before; `None` where it is the first of its sequence and the namespace has no keys.
    pub parent: Option<Digest>,
    /// The namespace's keys; `None` where it has none.
    pub keys: Option<Digest>,
    /// Its tokens.
    pub tokens: Box<[TokenId]>,
    /// Where it comes from.
    pub origin: Origin,
    /// Which of the block's objects is meant: the key says so, too.
    pub nth: Nth,
}

/// An object among those that a block is spread over ([`spread`](super::spread)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nth {
    /// Its number.
    pub number: u8,
    /// How many there are.
    pub of: u8,
}

impl Nth {
    /// The object of a block that has one.
    pub const ONLY: Nth = Nth { number: 0, of: 1 };
}

impl Label {
    /// The label of another object of the same block.
    pub fn nth(&self, config: &Configuration, number: u8) -> Self {
        let nth = Nth { number, ..self.nth };
        Self { key: config.key_of(&self.block, number), nth, ..self.clone() }
    }
}

impl PartialEq for Label {
    fn eq(&self, other: &Self) -> bool {
        let of = |label: &Self| (label.key, label.block, label.parent, label.keys);
        of(self) == of(other) && self.tokens == other.tokens
    }
}

impl Eq for Label {}

/// Why an object is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is no object of this version, or cut short.
    Format,
    /// Bytes of it changed.
    Checksum,
    /// It is whole, and of another block or configuration.
    Other,
}

/// Bytes of an object with so large a payload.
pub fn object_bytes(payload_bytes: u64) -> Option<u64> {
    let page = HEAD_BYTES as u64;
    payload_bytes.checked_next_multiple_of(page)?.checked_add(page)
}

/// Writes the head of an object whose payload lies behind it in `object`, all of which is covered by
/// checksums.
pub fn seal(object: &mut [u8], config: &Configuration, label: &Label) {
    let payload = HEAD_BYTES + config.payload_bytes() as usize;
    object[payload..].fill(0);
    let (head, payload) = object.split_at_mut(HEAD_BYTES);
    head.fill(0);
    head_fields(head, config, label);
    for (n, part) in config.parts().iter().enumerate() {
        let sum = crc32c::crc32c(&payload[part.payload()]);
        head[sum_at(n)].copy_from_slice(&sum.to_le_bytes());
    }
    let crc = crc32c::crc32c(&head[CHECKED_FROM..]);
    head[CRC_AT..CHECKED_FROM].copy_from_slice(&crc.to_le_bytes());
}

fn sum_at(part: usize) -> Range<usize> {
    SUMS_AT + part * 4..SUMS_AT + part * 4 + 4
}

fn head_fields(head: &mut [u8], config: &Configuration, label: &Label) {
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC);
    put(12, &(HEAD_BYTES as u32).to_le_bytes());
    put(16, &config.payload_bytes().to_le_bytes());
    put(24, &(label.tokens.len() as u32).to_le_bytes());
    put(28, &(config.parts().len() as u32).to_le_bytes());
    put(32, &label.key.0);
    put(64, config.digest());
    put(96, &label.parent.unwrap_or_default().0);
    put(128, &label.keys.unwrap_or_default().0);
    for (i, token) in label.tokens.iter().enumerate() {
        put(TOKENS_AT + i * 4, &token.to_le_bytes());
    }
}

/// The checksums of an object's parts, from a head that was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sums(Box<[u32]>);

impl Sums {
    /// Whether the bytes of part `n`, padding behind the last part included, are those sealed.
    pub fn verify(&self, n: usize, bytes: &[u8]) -> bool {
        self.0.get(n).is_some_and(|sum| *sum == crc32c::crc32c(bytes))
    }
}

/// Whether `head` is that of the sealed object of this block; the checksums of its parts.
///
/// # Errors
/// What is wrong with it.
pub fn verify_head(head: &[u8], config: &Configuration, label: &Label) -> Result<Sums, Fault> {
    let head = head.get(..HEAD_BYTES).filter(|head| head[..8] == MAGIC).ok_or(Fault::Format)?;
    if head[CRC_AT..CHECKED_FROM] != crc32c::crc32c(&head[CHECKED_FROM..]).to_le_bytes() {
        return Err(Fault::Checksum);
    }
    let mut expected = [0; HEAD_BYTES];
    head_fields(&mut expected, config, label);
    let end = sum_at(config.parts().len()).start;
    if head[CHECKED_FROM..SUMS_AT] != expected[CHECKED_FROM..SUMS_AT]
        || head[end..] != expected[end..]
    {
        return Err(Fault::Other);
    }
    let sums = head[SUMS_AT..end].as_chunks::<4>().0.iter();
    Ok(Sums(sums.map(|sum| u32::from_le_bytes(*sum)).collect::<Vec<_>>().into()))
}

/// Whether `object` is the sealed object of this block, byte for byte.
///
/// # Errors
/// What is wrong with it.
pub fn verify(object: &[u8], config: &Configuration, label: &Label) -> Result<(), Fault> {
    let sums = verify_head(object, config, label)?;
    if object_bytes(config.payload_bytes()) != Some(object.len() as u64) {
        return Err(Fault::Format);
    }
    let payload = &object[HEAD_BYTES..];
    let whole = |(n, part): (usize, &Part)| sums.verify(n, &payload[part.payload()]);
    if config.parts().iter().enumerate().all(whole) { Ok(()) } else { Err(Fault::Checksum) }
}

/// The key that an object carries, if it is one.
pub fn key_of(object: &[u8]) -> Option<ObjectKey> {
    let key = object.get(32..64).filter(|_| object[..8] == MAGIC)?;
    let mut bytes = [0; 32];
    bytes.copy_from_slice(key);
    Some(ObjectKey(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::KvFormat;
    use crate::layout::slice::Slice;
    use crate::layout::{CacheSpec, GroupSpec};
    use alloc::vec;
    use alloc::vec::Vec;

    fn config(model: &str) -> Configuration {
        let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 3, 24, KvFormat::F16));
        Configuration::new(model, &spec, &Slice::whole(&spec)).unwrap()
    }

    fn label(config: &Configuration, seed: u32) -> Label {
        let tokens: Box<[u32]> = (seed..seed + 16).collect();
        let parent = Some(Digest([3; 32]));
        let block = Digest::of_block(parent.as_ref(), &tokens);
        let origin = Origin::default();
        Label { key: config.key(&block), block, parent, keys: None, tokens, origin, nth: Nth::ONLY }
    }

    fn sealed(config: &Configuration, label: &Label) -> Vec<u8> {
        let mut object = vec![0x5a; object_bytes(config.payload_bytes()).unwrap() as usize];
        seal(&mut object, config, label);
        object
    }

    #[test]
    fn only_the_object_asked_for_verifies() {
        let config = config("m");
        let label = label(&config, 1);
        let object = sealed(&config, &label);
        assert_eq!(config.payload_bytes(), 4608);
        assert_eq!(object.len(), 4096 + 8192);
        assert_eq!(verify(&object, &config, &label), Ok(()));
        assert_eq!(key_of(&object), Some(label.key));
        let others: [fn(&mut Label); 4] = [
            |l| l.key.0[0] ^= 1,
            |l| l.parent = None,
            |l| l.keys = Some(Digest([1; 32])),
            |l| l.tokens[15] += 1,
        ];
        for change in others {
            let mut other = label.clone();
            change(&mut other);
            assert_eq!(verify(&object, &config, &other), Err(Fault::Other));
        }
        assert_eq!(verify(&object, &self::config("n"), &label), Err(Fault::Other));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let config = config("m");
        let label = label(&config, 1);
        let mut object = sealed(&config, &label);
        for at in (0..object.len()).filter(|at| at % 37 == 0 || *at < 200 || *at > 12_000) {
            let bit = 1 << (at % 8);
            object[at] ^= bit;
            assert!(verify(&object, &config, &label).is_err(), "byte {at}");
            object[at] ^= bit;
        }
        for length in [0, 7, 100, 4095, 4096, 8192, object.len() - 4096, object.len() - 1] {
            assert!(verify(&object[..length], &config, &label).is_err(), "{length} bytes");
        }
        object.extend([0; 4096]);
        assert!(verify(&object, &config, &label).is_err());
    }

    #[test]
    fn a_part_verifies_without_the_others_and_only_where_it_belongs() {
        let spec = CacheSpec::uniform(16, GroupSpec::uniform(3, 3, 24 * 8, KvFormat::F16));
        let config = Configuration::new("m", &spec, &Slice::whole(&spec)).unwrap();
        let label = label(&config, 1);
        let mut object = vec![0; object_bytes(config.payload_bytes()).unwrap() as usize];
        for (n, byte) in object.iter_mut().enumerate() {
            *byte = (n / 7) as u8;
        }
        seal(&mut object, &config, &label);
        let sums = verify_head(&object[..HEAD_BYTES], &config, &label).unwrap();
        const LAYER: usize = 8 * 4608;
        let of = |n: usize| HEAD_BYTES + LAYER * n..HEAD_BYTES + LAYER * (n + 1);
        // The last has the padding, too.
        assert_eq!(config.parts().iter().nth(2).unwrap().payload().len(), 27 * 4096 - 2 * LAYER);
        assert!(sums.verify(0, &object[of(0)]) && sums.verify(1, &object[of(1)]));
        assert!(!sums.verify(0, &object[of(1)]) && !sums.verify(3, &[]));
        object[of(1).end - 1] ^= 0x80;
        assert!(sums.verify(0, &object[of(0)]) && !sums.verify(1, &object[of(1)]));
        assert_eq!(verify(&object, &config, &label), Err(Fault::Checksum));
        // A head whose sums somebody changed is no head.
        object[SUMS_AT] ^= 1;
        assert_eq!(verify_head(&object, &config, &label), Err(Fault::Checksum));
    }

    #[test]
    fn objects_that_cannot_be_have_no_size() {
        assert_eq!(object_bytes(0), Some(4096));
        assert_eq!(object_bytes(u64::MAX - 4096), None);
        assert_eq!(object_bytes(u64::MAX), None);
    }
}
