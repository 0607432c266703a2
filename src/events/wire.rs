//! Messages as vLLM's routers read them: msgpack, `[seconds, [event, ...], rank]`.
//!
//! An event is a map with its `type` first, or, for older readers, an array of the same fields in a
//! fixed order. Hashes are the digests' last 64 bits as unsigned integers, which every known reader
//! takes. Fields that are always there may be nil; optional ones are left out of maps. Writing to
//! memory cannot fail, so the encoder's results are not looked at.

use alloc::vec::Vec;

use rmp::encode::{write_array_len, write_f64, write_map_len, write_nil, write_str, write_uint};

use super::{Event, Message, Name};
use crate::prefix::Digest;

/// How an event is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Encoding {
    /// As a map: what current routers read.
    #[default]
    Map,
    /// As an array: what older ones read.
    Array,
}

/// Writes a message to `out`, which is emptied first. `rank` is the data-parallel rank.
pub fn encode(message: &Message, encoding: Encoding, rank: u32, out: &mut Vec<u8>) {
    out.clear();
    let _ = write_array_len(out, 3);
    let _ = write_f64(out, message.time);
    let _ = write_array_len(out, message.len() as u32);
    for event in message.events() {
        match encoding {
            Encoding::Map => map(out, &event, message),
            Encoding::Array => array(out, &event, message),
        }
    }
    let _ = write_uint(out, rank.into());
}

/// No less than the bytes that [`encode`] writes.
pub(super) fn most_bytes(message: &Message) -> usize {
    let bytes = |event| match event {
        Event::Stored { space, digests, tokens, media, .. } => {
            let name = message.name(space).unwrap_or_default();
            let extra =
                name.salt.len() + (digests.len() + 1) * (name.lora.len() + 6) + 74 * media.len();
            420 + 9 * digests.len() + 5 * tokens.len() + extra
        }
        Event::Removed { digests, .. } => 100 + 9 * digests.len(),
        Event::Cleared => 30,
    };
    30 + message.events().map(bytes).sum::<usize>()
}

fn map(out: &mut Vec<u8>, event: &Event, message: &Message) {
    match *event {
        Event::Stored { medium, group, space, parent, digests, tokens, media } => {
            let (shape, name) = (message.shape, message.name(space));
            let extra = Extra::of(name.as_deref(), parent.is_none(), media, shape.block_tokens);
            let kind = shape.groups.get(group as usize);
            let window = kind.and_then(|kind| kind.window());
            let fields = [kind.is_some(), window.is_some(), extra.is_some()];
            let fields = 9 + fields.into_iter().map(u32::from).sum::<u32>();
            let _ = write_map_len(out, fields);
            text(out, "type", "BlockStored");
            key(out, "block_hashes");
            hashes(out, digests);
            key(out, "parent_block_hash");
            maybe(out, parent.map(|parent| parent.short()));
            key(out, "token_ids");
            numbers(out, tokens);
            key(out, "block_size");
            let _ = write_uint(out, shape.block_tokens.into());
            key(out, "lora_id");
            let _ = write_nil(out);
            text(out, "medium", medium.name());
            key(out, "lora_name");
            lora(out, name.as_deref());
            if let Some(extra) = &extra {
                key(out, "extra_keys");
                extra.write(out, digests.len());
            }
            key(out, "group_idx");
            let _ = write_uint(out, group.into());
            if let Some(kind) = kind {
                text(out, "kv_cache_spec_kind", kind.name());
            }
            if let Some(window) = window {
                key(out, "kv_cache_spec_sliding_window");
                let _ = write_uint(out, window.into());
            }
        }
        Event::Removed { medium, group, digests } => {
            let _ = write_map_len(out, 4);
            text(out, "type", "BlockRemoved");
            key(out, "block_hashes");
            hashes(out, digests);
            text(out, "medium", medium.name());
            key(out, "group_idx");
            let _ = write_uint(out, group.into());
        }
        Event::Cleared => {
            let _ = write_map_len(out, 1);
            text(out, "type", "AllBlocksCleared");
        }
    }
}

fn array(out: &mut Vec<u8>, event: &Event, message: &Message) {
    match *event {
        Event::Stored { medium, group, space, parent, digests, tokens, media } => {
            let (shape, name) = (message.shape, message.name(space));
            let extra = Extra::of(name.as_deref(), parent.is_none(), media, shape.block_tokens);
            let kind = shape.groups.get(group as usize);
            let _ = write_array_len(out, 12);
            let _ = write_str(out, "BlockStored");
            hashes(out, digests);
            maybe(out, parent.map(|parent| parent.short()));
            numbers(out, tokens);
            let _ = write_uint(out, shape.block_tokens.into());
            let _ = write_nil(out); // lora_id
            let _ = write_str(out, medium.name());
            lora(out, name.as_deref());
            match extra {
                Some(extra) => extra.write(out, digests.len()),
                None => drop(write_nil(out)),
            }
            let _ = write_uint(out, group.into());
            let _ = match kind {
                Some(kind) => write_str(out, kind.name()).is_ok(),
                None => write_nil(out).is_ok(),
            };
            maybe(out, kind.and_then(|kind| kind.window()).map(u64::from));
        }
        Event::Removed { medium, group, digests } => {
            let _ = write_array_len(out, 4);
            let _ = write_str(out, "BlockRemoved");
            hashes(out, digests);
            let _ = write_str(out, medium.name());
            let _ = write_uint(out, group.into());
        }
        Event::Cleared => {
            let _ = write_array_len(out, 1);
            let _ = write_str(out, "AllBlocksCleared");
        }
    }
}

fn lora(out: &mut Vec<u8>, name: Option<&Name>) {
    let _ = match name.filter(|name| !name.lora.is_empty()) {
        Some(name) => write_str(out, &name.lora).is_ok(),
        None => write_nil(out).is_ok(),
    };
}

/// Keys of blocks beside their tokens: the adapter of each, the media that begin in it, the salt of a
/// sequence's first.
struct Extra<'a> {
    lora: &'a str,
    salt: &'a str,
    media: &'a [(u32, Digest)],
    block_tokens: u32,
}

impl<'a> Extra<'a> {
    /// Those of an event, if it has any; `first`: it begins a sequence.
    fn of(
        name: Option<&'a Name>,
        first: bool,
        media: &'a [(u32, Digest)],
        block_tokens: u32,
    ) -> Option<Self> {
        let (salt, lora) = name.map_or(("", ""), |name| (&*name.salt, &*name.lora));
        let salt = if first { salt } else { "" };
        let any = !salt.is_empty() || !lora.is_empty() || !media.is_empty();
        any.then_some(Extra { lora, salt, media, block_tokens })
    }

    fn write(&self, out: &mut Vec<u8>, blocks: usize) {
        let _ = write_array_len(out, blocks as u32);
        let mut media = self.media;
        for block in 0..blocks as u32 {
            let inside = media.partition_point(|&(at, _)| at / self.block_tokens <= block);
            let (own, later) = media.split_at(inside);
            media = later;
            let salt = if block == 0 { self.salt } else { "" };
            let texts = [self.lora, salt].map(|text| u32::from(!text.is_empty()));
            match texts[0] + own.len() as u32 + texts[1] {
                0 => drop(write_nil(out)),
                count => drop(write_array_len(out, count)),
            }
            if texts[0] == 1 {
                let _ = write_str(out, self.lora);
            }
            for &(at, digest) in own {
                let _ = write_array_len(out, 2);
                let _ = write_str(out, &alloc::format!("{digest}"));
                let _ = write_uint(out, (at % self.block_tokens).into());
            }
            if texts[1] == 1 {
                let _ = write_str(out, salt);
            }
        }
    }
}

fn key(out: &mut Vec<u8>, key: &str) {
    let _ = write_str(out, key);
}

fn text(out: &mut Vec<u8>, name: &str, value: &str) {
    key(out, name);
    let _ = write_str(out, value);
}

fn maybe(out: &mut Vec<u8>, value: Option<u64>) {
    let _ = match value {
        Some(value) => write_uint(out, value).is_ok(),
        None => write_nil(out).is_ok(),
    };
}

fn hashes(out: &mut Vec<u8>, digests: &[Digest]) {
    let _ = write_array_len(out, digests.len() as u32);
    for digest in digests {
        let _ = write_uint(out, digest.short());
    }
}

fn numbers(out: &mut Vec<u8>, numbers: &[u32]) {
    let _ = write_array_len(out, numbers.len() as u32);
    for &number in numbers {
        let _ = write_uint(out, number.into());
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::events::{AttentionKind, Batch, Medium, Queue, Shape};
    use crate::ids::Namespace;

    fn digest(short: u64) -> Digest {
        let mut bytes = [0xAA; 32];
        bytes[24..].copy_from_slice(&short.to_be_bytes());
        Digest(bytes)
    }

    /// The bytes of the events that `queue` has, at 1.5 s, rank 0.
    fn encoded(queue: &Queue, encoding: Encoding) -> Vec<u8> {
        let mut batch = Batch::default();
        queue.take(&mut batch);
        let events = Some(batch.events());
        let message = Message { seq: 0, time: 1.5, shape: queue.shape(), queue, events };
        let mut out = vec![9];
        encode(&message, encoding, 0, &mut out);
        assert!(out.len() <= most_bytes(&message));
        out
    }

    fn queue(block_tokens: u32, kind: AttentionKind) -> alloc::sync::Arc<Queue> {
        Queue::new(Shape { block_tokens, groups: vec![kind] }, 100).unwrap()
    }

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
        digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    const A: u64 = 0x0102_0304_0506_0708;
    const B: u64 = 0xF1F2_F3F4_F5F6_F7F8;
    const PLACE: (Medium, u32, Namespace) = (Medium::Gpu, 0, Namespace(0));

    /// What vLLM's own encoder (msgspec) writes for these events, but for the length of the map,
    /// which it writes in three bytes and which is one byte here. Readers take either.
    #[test]
    fn golden_bytes_of_maps() {
        let queue = queue(2, AttentionKind::Full);
        queue.lock().stored(PLACE, None, &[digest(A), digest(B)], &[1, 2, 300, 70000]);
        let golden = "93 cb3ff8000000000000 91 8a a474797065 ab426c6f636b53746f726564
            ac626c6f636b5f686173686573 92 cf0102030405060708 cff1f2f3f4f5f6f7f8
            b1706172656e745f626c6f636b5f68617368 c0 a9746f6b656e5f696473 94 01 02 cd012c ce00011170
            aa626c6f636b5f73697a65 02 a76c6f72615f6964 c0 a66d656469756d a3475055
            a96c6f72615f6e616d65 c0 a967726f75705f696478 00
            b26b765f63616368655f737065635f6b696e64 ae66756c6c5f617474656e74696f6e 00";
        assert_eq!(encoded(&queue, Encoding::Map), bytes(golden));
        queue.lock().removed(Medium::Gpu, 0, digest(B));
        let golden = "93 cb3ff8000000000000 91 84 a474797065 ac426c6f636b52656d6f766564
            ac626c6f636b5f686173686573 91 cff1f2f3f4f5f6f7f8 a66d656469756d a3475055
            a967726f75705f696478 00 00";
        assert_eq!(encoded(&queue, Encoding::Map), bytes(golden));
        queue.lock().restart();
        let golden = "93 cb3ff8000000000000 91 81 a474797065 b0416c6c426c6f636b73436c6561726564 00";
        assert_eq!(encoded(&queue, Encoding::Map), bytes(golden));
    }

    #[test]
    fn golden_bytes_of_arrays() {
        let queue = queue(2, AttentionKind::Full);
        queue.lock().stored(PLACE, Some(digest(B)), &[digest(A)], &[1, 2]);
        // vLLM's array of a group without a kind has nil for the last two but one.
        let golden = "93 cb3ff8000000000000 91 9c ab426c6f636b53746f726564 91 cf0102030405060708
            cff1f2f3f4f5f6f7f8 92 01 02 02 c0 a3475055 c0 c0 00 ae66756c6c5f617474656e74696f6e c0
            00";
        assert_eq!(encoded(&queue, Encoding::Array), bytes(golden));
        queue.lock().removed(Medium::Cpu, 0, digest(B));
        let golden = "93 cb3ff8000000000000 91 94 ac426c6f636b52656d6f766564 91 cff1f2f3f4f5f6f7f8
            a3435055 00 00";
        assert_eq!(encoded(&queue, Encoding::Array), bytes(golden));
        queue.lock().restart();
        let golden = "93 cb3ff8000000000000 91 91 b0416c6c426c6f636b73436c6561726564 00";
        assert_eq!(encoded(&queue, Encoding::Array), bytes(golden));
    }

    #[test]
    fn salt_and_adapter_are_extra_keys() {
        let queue = queue(1, AttentionKind::Full);
        let name = |salt: &str, lora: &str| Name { salt: salt.into(), lora: lora.into() };
        queue.set_name(Namespace(1), name("t", "").into());
        queue.set_name(Namespace(2), name("t", "ad").into());
        // [["t"], nil] for two blocks that begin a sequence, nothing for one that goes on.
        let place = |space| (Medium::Gpu, 0, Namespace(space));
        queue.lock().stored(place(1), None, &[digest(A), digest(B)], &[1, 2]);
        let part =
            bytes("a96c6f72615f6e616d65 c0 aa65787472615f6b657973 92 91 a174 c0 a967726f7570");
        let out = encoded(&queue, Encoding::Map);
        assert!(out.windows(part.len()).any(|w| w == part) && out[11] == 0x8b, "{out:x?}");
        queue.lock().stored(place(1), Some(digest(B)), &[digest(A)], &[1]);
        let out = encoded(&queue, Encoding::Map);
        let part = bytes("a96c6f72615f6e616d65 c0 a967726f75705f696478");
        assert!(out.windows(part.len()).any(|w| w == part) && out[11] == 0x8a, "{out:x?}");
        // The adapter is of every block, before the salt.
        queue.lock().stored(place(2), None, &[digest(A), digest(B)], &[1, 2]);
        let part = bytes("a2 6164 92 92 a26164 a174 91 a26164 00");
        let out = encoded(&queue, Encoding::Array);
        assert!(out.windows(part.len()).any(|w| w == part), "{out:x?}");
    }

    #[test]
    fn media_are_extra_keys_of_the_block_in_which_they_begin() {
        let queue = queue(2, AttentionKind::Full);
        let tokens = [1, 2];
        queue.lock().stored(PLACE, None, &[digest(A)], &tokens);
        let media = [(1, digest(B))];
        queue.lock().stored_with_media(PLACE, Some(digest(A)), digest(B), &tokens, &media);
        // [nil, [[the digest in 64 digits, the place in the block]]]
        let part = bytes("aa65787472615f6b657973 92 c0 91 92 d940");
        let out = encoded(&queue, Encoding::Map);
        let at = out.windows(part.len()).position(|w| w == part).unwrap() + part.len();
        assert_eq!(out[at..at + 64], *alloc::format!("{}", digest(B)).as_bytes());
        assert_eq!((out[at + 64], out[11]), (1, 0x8b));
    }

    #[test]
    fn a_window_is_said() {
        let queue = queue(1, AttentionKind::Window(300));
        queue.lock().stored(PLACE, None, &[digest(A)], &[1]);
        let out = encoded(&queue, Encoding::Map);
        let tail = "b26b765f63616368655f737065635f6b696e64 ae736c6964696e675f77696e646f77
            bc6b765f63616368655f737065635f736c6964696e675f77696e646f77 cd012c 00";
        assert!(out.ends_with(&bytes(tail)), "{out:x?}");
        assert_eq!(out[11], 0x8b);
    }
}
