//! Blocks of a sequence as a stream of bytes, from one cache to another.
//!
//! ```text
//! "KVCSTRM3"  u32 bytes of the head  head  u32 CRC-32C of the head
//! for each block: the block of each layer group, of sinks the raw rows  u32 CRC-32C of those
//! "KVCSTEND"
//!
//! head: u32 block_tokens  u32 groups  u32 bytes of the model's name  u32 tokens  32 B digest of the
//!       namespace's keys  name
//!       for each group: u32 format  k_dim  v_dim  v_in_k  window  first_layer  layers
//!                       first_head  heads  sink_tokens
//!       u32 for each token
//!       for each medium: u32 position  32 B digest of its content
//! ```
//!
//! Little-endian. The head says all that is needed to know whose blocks they are, so that a cache of
//! another block size or of other heads can take what is its own. Whoever reads trusts nothing.

use alloc::string::String;
use alloc::vec::Vec;
use std::io::{Read, Write};

use crate::dtype::KvFormat;
use crate::error::{Error, Result};
use crate::ids::TokenId;
use crate::layout::slice::GroupSlice;
use crate::layout::{CacheSpec, GroupSpec, MAX_GROUPS};
use crate::prefix::Digest;

const MAGIC: &[u8; 8] = b"KVCSTRM3";
const END: &[u8; 8] = b"KVCSTEND";
/// A head of more bytes is no head: 64 Mi tokens.
const MOST_HEAD_BYTES: u32 = 1 << 28;
const GROUP_WORDS: usize = 10;
const MEDIUM_WORDS: usize = 9;

/// What a stream holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamHead {
    /// The model's name.
    pub model: String,
    /// The digest of the namespace's keys.
    pub keys: Option<Digest>,
    /// The geometry of the cache that it comes from.
    pub spec: CacheSpec,
    /// Where in the model that lies.
    pub slices: Vec<GroupSlice>,
    /// The tokens of all blocks.
    pub tokens: Vec<TokenId>,
    /// What begins at some of them that they do not name: position and digest of the content.
    pub media: Vec<(u32, Digest)>,
}

fn io(error: std::io::Error) -> Error {
    Error::TierFailed { what: "the stream", os_code: error.raw_os_error().unwrap_or(0) }
}

fn bad(why: &'static str) -> Error {
    Error::invalid("stream", why)
}

/// Writes a head.
///
/// # Errors
/// `TierFailed` where the stream does; `Overflow` for more tokens than a head can have.
pub fn write_head(out: &mut dyn Write, head: &StreamHead) -> Result<()> {
    let mut bytes = Vec::new();
    let count = |n: usize| u32::try_from(n).map_err(|_| Error::Overflow { what: "stream head" });
    let mut words = alloc::vec![
        head.spec.block_tokens,
        count(head.slices.len())?,
        count(head.model.len())?,
        count(head.tokens.len())?,
    ];
    words.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    bytes.extend(head.keys.unwrap_or_default().0);
    bytes.extend(head.model.as_bytes());
    words.clear();
    for (group, slice) in head.spec.groups.iter().zip(&head.slices) {
        words.extend([
            group.format.id(),
            group.k_dim,
            group.v_dim,
            u32::from(group.v_in_k),
            group.window.unwrap_or(0),
            slice.first_layer,
            slice.layers,
            slice.first_head,
            slice.heads,
            group.sink_tokens,
        ]);
    }
    words.extend(&head.tokens);
    words.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    for (position, digest) in &head.media {
        bytes.extend(position.to_le_bytes());
        bytes.extend(digest.0);
    }
    let length = count(bytes.len())?;
    if length > MOST_HEAD_BYTES {
        return Err(Error::Overflow { what: "stream head" });
    }
    out.write_all(MAGIC).map_err(io)?;
    out.write_all(&length.to_le_bytes()).map_err(io)?;
    out.write_all(&bytes).map_err(io)?;
    out.write_all(&crc32c::crc32c(&bytes).to_le_bytes()).map_err(io)
}

/// Writes a block, all groups one after the other.
///
/// # Errors
/// `TierFailed` where the stream does.
pub fn write_block(out: &mut dyn Write, block: &[u8]) -> Result<()> {
    out.write_all(block).map_err(io)?;
    out.write_all(&crc32c::crc32c(block).to_le_bytes()).map_err(io)
}

/// Writes the end.
///
/// # Errors
/// `TierFailed` where the stream does.
pub fn write_end(out: &mut dyn Write) -> Result<()> {
    out.write_all(END).map_err(io)?;
    out.flush().map_err(io)
}

fn word(from: &mut dyn Read) -> Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes).map_err(io)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Reads a head and checks that it can be one.
///
/// # Errors
/// `TierFailed` where the stream fails or ends, `InvalidArgument` for what is no stream of this
/// version, `OutOfMemory`.
pub fn read_head(from: &mut dyn Read) -> Result<StreamHead> {
    let mut magic = [0; 8];
    from.read_exact(&mut magic).map_err(io)?;
    if magic != *MAGIC {
        return Err(bad("is no stream of blocks of this version"));
    }
    let length = word(from)?;
    if length > MOST_HEAD_BYTES {
        return Err(bad("has a head that is too long"));
    }
    // As it comes: a length that was made up must not allocate.
    let mut bytes = Vec::new();
    let mut limited = from.take(length.into());
    while (bytes.len() as u32) < length {
        let have = bytes.len();
        let more = (length as usize - have).min(1 << 16);
        bytes.try_reserve(more).map_err(|_| Error::OutOfMemory { bytes: length.into() })?;
        bytes.resize(have + more, 0);
        limited.read_exact(&mut bytes[have..]).map_err(io)?;
    }
    if word(from)? != crc32c::crc32c(&bytes) {
        return Err(bad("has a damaged head"));
    }
    parse(&bytes).ok_or(bad("has a head that cannot be"))
}

fn parse(bytes: &[u8]) -> Option<StreamHead> {
    let (fixed, rest) = bytes.split_at_checked(48)?;
    let number = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(fixed.get(at..at + 4)?.try_into().ok()?))
    };
    let (block_tokens, groups) = (number(0)?, number(4)? as usize);
    let (name, tokens) = (number(8)? as usize, number(12)? as usize);
    let keys = Digest(fixed[16..48].try_into().ok()?);
    if groups == 0 || groups > MAX_GROUPS {
        return None;
    }
    let (model, rest) = rest.split_at_checked(name)?;
    let words = rest.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
    let words: Vec<u32> = words.collect();
    let before_media = groups.checked_mul(GROUP_WORDS)?.checked_add(tokens)?;
    let (words, media) = words.split_at_checked(before_media)?;
    if rest.len() % 4 != 0 || media.len() % MEDIUM_WORDS != 0 {
        return None;
    }
    let media: Vec<(u32, Digest)> = media.chunks_exact(MEDIUM_WORDS).map(medium).collect();
    let (shapes, tokens) = words.split_at(groups * GROUP_WORDS);
    let (mut specs, mut slices) = (Vec::new(), Vec::new());
    for shape in shapes.chunks_exact(GROUP_WORDS) {
        specs.push(GroupSpec {
            layers: shape[6],
            kv_heads: shape[8],
            k_dim: shape[1],
            v_dim: shape[2],
            v_in_k: shape[3] != 0,
            format: KvFormat::from_id(shape[0]).ok()?,
            window: (shape[4] != 0).then_some(shape[4]),
            sink_tokens: shape[9],
        });
        slices.push(GroupSlice {
            first_layer: shape[5],
            layers: shape[6],
            first_head: shape[7],
            heads: shape[8],
        });
    }
    let spec = CacheSpec { block_tokens, groups: specs };
    let whole = spec.layouts().is_ok() && tokens.len().is_multiple_of(block_tokens as usize);
    let model = String::from_utf8(model.to_vec()).ok()?;
    let keys = (keys != Digest::default()).then_some(keys);
    whole.then(|| StreamHead { model, keys, spec, slices, tokens: tokens.to_vec(), media })
}

fn medium(words: &[u32]) -> (u32, Digest) {
    let mut digest = Digest::default();
    for (bytes, word) in digest.0.chunks_exact_mut(4).zip(&words[1..]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    (words[0], digest)
}

/// Reads a block of `block.len()` bytes.
///
/// # Errors
/// `TierFailed` where the stream fails or ends, `InvalidArgument` for a damaged block.
pub fn read_block(from: &mut dyn Read, block: &mut [u8]) -> Result<()> {
    from.read_exact(block).map_err(io)?;
    if word(from)? != crc32c::crc32c(block) {
        return Err(bad("has a damaged block"));
    }
    Ok(())
}

/// Reads the end.
///
/// # Errors
/// As for [`read_block`].
pub fn read_end(from: &mut dyn Read) -> Result<()> {
    let mut end = [0; 8];
    from.read_exact(&mut end).map_err(io)?;
    if end == *END { Ok(()) } else { Err(bad("does not end where it should")) }
}
