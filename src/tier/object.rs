//! An object: a block with everything that is needed to know that it is the right one.
//!
//! ```text
//! 0    magic "KVCOBJ1\0"
//! 8    u32 CRC-32C of all bytes from 12 on
//! 12   u32 bytes of the head: 4,096
//! 16   u64 bytes of the payload
//! 24   u32 tokens
//! 28   u32 0
//! 32   key, 32 bytes
//! 64   digest of the configuration
//! 96   digest of the block before; zeros where there is none
//! 128  digest of the namespace's keys (salt, adapter) and of the media in the block; zeros where there
//!      are none
//! 160  the tokens, u32 each; zeros up to the head's end
//! 4096 payload: the block of each layer group, one after the other; zeros up to a multiple of 4,096
//! ```
//!
//! Little-endian. An object is used only where all of it is as expected ([`verify`]): a hash or an
//! index that leads to the wrong object is a miss, never a wrong answer.

use alloc::boxed::Box;

use super::ObjectKey;
use super::key::Configuration;
use crate::ids::{Namespace, TokenId};
use crate::prefix::Digest;

/// Bytes of an object's head; objects are whole pages, so that they can be read past the page cache.
pub const HEAD_BYTES: usize = 4096;

const MAGIC: [u8; 8] = *b"KVCOBJ1\0";
const CRC_AT: usize = 8;
const CHECKED_FROM: usize = 12;
const TOKENS_AT: usize = 160;

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
/// the checksum.
pub fn seal(object: &mut [u8], config: &Configuration, label: &Label) {
    let payload = HEAD_BYTES + config.payload_bytes() as usize;
    object[payload..].fill(0);
    let (head, payload) = object.split_at_mut(HEAD_BYTES);
    head.fill(0);
    head_fields(head, config, label);
    let crc = checksum(head, payload);
    head[CRC_AT..CHECKED_FROM].copy_from_slice(&crc.to_le_bytes());
}

fn head_fields(head: &mut [u8], config: &Configuration, label: &Label) {
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC);
    put(12, &(HEAD_BYTES as u32).to_le_bytes());
    put(16, &config.payload_bytes().to_le_bytes());
    put(24, &(label.tokens.len() as u32).to_le_bytes());
    put(32, &label.key.0);
    put(64, config.digest());
    put(96, &label.parent.unwrap_or_default().0);
    put(128, &label.keys.unwrap_or_default().0);
    for (i, token) in label.tokens.iter().enumerate() {
        put(TOKENS_AT + i * 4, &token.to_le_bytes());
    }
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&head[CHECKED_FROM..]), payload)
}

/// Whether `object` is the sealed object of this block, byte for byte.
///
/// # Errors
/// What is wrong with it.
pub fn verify(object: &[u8], config: &Configuration, label: &Label) -> Result<(), Fault> {
    let whole = object_bytes(config.payload_bytes()) == Some(object.len() as u64);
    if object.len() < HEAD_BYTES || object[..8] != MAGIC {
        return Err(Fault::Format);
    }
    let (head, payload) = object.split_at(HEAD_BYTES);
    let mut expected = [0; HEAD_BYTES];
    head_fields(&mut expected, config, label);
    if head[CHECKED_FROM..] != expected[CHECKED_FROM..] {
        // A changed byte of the head and another block's head look alike until the sum is taken.
        let sum = checksum(head, payload).to_le_bytes();
        return Err(if head[CRC_AT..CHECKED_FROM] == sum { Fault::Other } else { Fault::Checksum });
    }
    if !whole {
        return Err(Fault::Format);
    }
    if head[CRC_AT..CHECKED_FROM] != checksum(head, payload).to_le_bytes() {
        return Err(Fault::Checksum);
    }
    Ok(())
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
        Label { key: config.key(&block), block, parent, keys: None, tokens, origin }
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
        for length in [0, 7, 100, 4095, 4096, 8192, object.len() - 1] {
            assert!(verify(&object[..length], &config, &label).is_err(), "{length} bytes");
        }
        object.extend([0; 4096]);
        assert!(verify(&object, &config, &label).is_err());
    }

    #[test]
    fn objects_that_cannot_be_have_no_size() {
        assert_eq!(object_bytes(0), Some(4096));
        assert_eq!(object_bytes(u64::MAX - 4096), None);
        assert_eq!(object_bytes(u64::MAX), None);
    }
}
