//! What an object is called: the configuration that its bytes mean something in, and its block.
//!
//! A configuration is a text (model, format with its parameters, geometry, the layers and heads
//! held) and the SHA-256 of it. An object's key is the SHA-256 of both digests, so that a change of
//! anything that changes the bytes is another key, and another part of the same model has other
//! objects of the same blocks.

use alloc::format;
use alloc::string::String;
use core::fmt::Write as _;

use sha2::{Digest as _, Sha256};

use super::parts::Parts;
use super::spread::Spread;
use crate::error::{Error, Result};
use crate::layout::slice::Slice;
use crate::layout::{CacheSpec, GroupLayout};
use crate::prefix::Digest;

/// The longest name of a model, in bytes.
pub const MOST_MODEL_BYTES: usize = 1024;

/// The name of an object in every tier and store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct ObjectKey(pub [u8; 32]);

impl ObjectKey {
    /// In hexadecimal: 64 characters.
    pub fn hex(&self) -> String {
        hex(&self.0)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// What the bytes of a cache's blocks are: what two caches must agree on to use each other's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    text: String,
    digest: [u8; 32],
    block_tokens: u32,
    payload_bytes: u64,
    parts: Parts,
    spread: Spread,
}

impl Configuration {
    /// Of a cache with the geometry `spec`, which holds `slice` of the model called `model`: a name
    /// that changes whenever its weights do, such as a revision or a digest of them.
    ///
    /// # Errors
    /// `InvalidArgument` for an impossible spec, a model without a name or with one above
    /// [`MOST_MODEL_BYTES`], and for a slice that has not the spec's layers and heads; `Overflow`.
    pub fn new(model: &str, spec: &CacheSpec, slice: &Slice) -> Result<Self> {
        if model.is_empty() || model.len() > MOST_MODEL_BYTES {
            return Err(Error::invalid("model", "must be 1 to 1024 bytes"));
        }
        let layouts = spec.layouts()?;
        let same = slice.groups.len() == spec.groups.len()
            && slice.groups.iter().zip(&spec.groups).all(|(part, group)| {
                (part.layers, part.heads) == (group.layers, group.kv_heads)
                    && part.first_layer.checked_add(part.layers).is_some()
                    && part.first_head.checked_add(part.heads).is_some()
            });
        if !same {
            return Err(Error::invalid("slice", "must have the layers and heads of the spec"));
        }
        let mut payload_bytes = 0u64;
        // The model's name is escaped: it cannot pass for a line of its own.
        let mut text = format!("kvcache objects 2\nmodel={model:?}\n");
        text.push_str(&format!("block_tokens={}\n", spec.block_tokens));
        for (layout, part) in layouts.iter().zip(&slice.groups) {
            payload_bytes = payload_bytes
                .checked_add(layout.block_bytes())
                .ok_or(Error::Overflow { what: "object bytes" })?;
            // Writing to a `String` cannot fail.
            let _ = writeln!(text, "{}", describe(layout, part));
        }
        let digest = Sha256::digest(text.as_bytes()).into();
        let parts = Parts::new(&layouts, payload_bytes)?;
        let spread = Spread::new(&layouts)?;
        Ok(Self { text, digest, block_tokens: spec.block_tokens, payload_bytes, parts, spread })
    }

    /// The text, a line for the model and each layer group.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The SHA-256 of the text.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// The first half of the digest in hexadecimal: a name for a directory.
    pub fn name(&self) -> String {
        hex(&self.digest[..16])
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// Bytes of a block in all layer groups, sealed where its format seals: the payload of an object.
    pub fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// The parts that an object is verified and read by.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Over how many objects blocks are spread.
    pub fn spread(&self) -> &Spread {
        &self.spread
    }

    /// The key of a block: that of its object, or of the first of them.
    pub fn key(&self, block: &Digest) -> ObjectKey {
        self.key_of(block, 0)
    }

    /// The key of the object of this number of a block.
    pub fn key_of(&self, block: &Digest, number: u8) -> ObjectKey {
        let mut hash = Sha256::new();
        hash.update(self.digest);
        hash.update(block.0);
        if number != 0 {
            hash.update([number]);
        }
        ObjectKey(hash.finalize().into())
    }
}

/// One layer group, with what of its blocks is raw. The number of bytes is there so that a format whose record changed is another.
fn describe(layout: &GroupLayout, part: &crate::layout::slice::GroupSlice) -> String {
    let spec = layout.spec();
    let sinks = match spec.sink_tokens {
        0 => String::new(),
        tokens => format!(" sink_tokens={tokens}"),
    };
    format!(
        "group format={} k_bits={} v_bits={} k_dim={} v_dim={} v_in_k={} window={} layers={}+{} \
         heads={}+{} bytes={}{}",
        spec.format.name(),
        spec.format.k_bits(),
        spec.format.v_bits(),
        spec.k_dim,
        spec.v_dim,
        u32::from(spec.v_in_k),
        spec.window.unwrap_or(0),
        part.first_layer,
        part.layers,
        part.first_head,
        part.heads,
        layout.block_bytes(),
        sinks,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::KvFormat;
    use crate::layout::GroupSpec;
    use alloc::collections::BTreeSet;
    use alloc::vec::Vec;

    fn spec() -> CacheSpec {
        CacheSpec::uniform(16, GroupSpec::uniform(4, 4, 64, KvFormat::F16))
    }

    fn of(model: &str, spec: &CacheSpec) -> Configuration {
        Configuration::new(model, spec, &Slice::whole(spec)).unwrap()
    }

    #[test]
    fn whatever_changes_the_bytes_changes_the_key() {
        let block = Digest([7; 32]);
        let mut variants: Vec<Configuration> = alloc::vec![of("a", &spec()), of("b", &spec())];
        let edits: [fn(&mut GroupSpec); 6] = [
            |group| group.layers = 5,
            |group| group.kv_heads = 8,
            |group| (group.k_dim, group.v_dim) = (128, 128),
            |group| group.format = KvFormat::Bf16,
            |group| group.window = Some(128),
            |group| group.v_dim = 32,
        ];
        for edit in edits {
            let mut other = spec();
            edit(&mut other.groups[0]);
            variants.push(of("a", &other));
        }
        let mut wide = spec();
        wide.block_tokens = 32;
        variants.push(of("a", &wide));
        for rank in 0..2 {
            let slice = Slice::tensor_parallel(&spec(), rank, 2).unwrap();
            let part = spec().slice(&slice).unwrap();
            variants.push(Configuration::new("a", &part, &slice).unwrap());
            let slice = Slice::pipeline(&spec(), rank, 2).unwrap();
            let part = spec().slice(&slice).unwrap();
            variants.push(Configuration::new("a", &part, &slice).unwrap());
        }
        for sink_tokens in [0, 64] {
            let mut tiles = CacheSpec::uniform(64, GroupSpec::uniform(4, 4, 64, KvFormat::Kt4v4));
            tiles.groups[0].sink_tokens = sink_tokens;
            variants.push(of("a", &tiles));
        }
        let keys: BTreeSet<_> = variants.iter().map(|c| c.key(&block)).collect();
        assert_eq!(keys.len(), variants.len());
        assert_ne!(variants[0].key(&block), variants[0].key(&Digest([8; 32])));
        assert_eq!(variants[0].key(&block), of("a", &spec()).key(&block));
        assert_eq!(variants[0].key(&block).hex().len(), 64);
        let numbered: BTreeSet<_> = (0..8).map(|n| variants[0].key_of(&block, n)).collect();
        assert!(numbered.len() == 8 && numbered.contains(&variants[0].key(&block)));
    }

    #[test]
    fn impossible_configurations_are_refused() {
        let slice = Slice::whole(&spec());
        assert!(Configuration::new("", &spec(), &slice).is_err());
        assert!(Configuration::new(&"m".repeat(1025), &spec(), &slice).is_err());
        let half = Slice::tensor_parallel(&spec(), 0, 2).unwrap();
        assert!(Configuration::new("a", &spec(), &half).is_err());
        // A name cannot pass for lines of the text.
        let sly = of("a\"\nblock_tokens=32\n", &spec());
        assert_eq!(sly.text().lines().count(), of("a", &spec()).text().lines().count());
    }
}
