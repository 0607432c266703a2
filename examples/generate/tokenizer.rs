//! The model's byte-level BPE: ids 0 to 255 are bytes, 256 ends a text, the rest are merges in
//! rank order. The rule that splits text into pieces is stated in `model/README.md`.

use std::collections::HashMap;
use std::error::Error;

/// The id that ends a text.
pub const END: u32 = 256;
const FIRST_MERGE: u32 = 257;

pub struct Tokenizer {
    ranks: HashMap<(u32, u32), u32>,
    bytes: Vec<Vec<u8>>,
}

impl Tokenizer {
    /// Reads one merge a line: the two ids it joins.
    pub fn parse(text: &str) -> Result<Self, Box<dyn Error>> {
        let mut bytes: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
        bytes.push(Vec::new());
        let mut ranks = HashMap::new();
        for line in text.lines() {
            let (left, right) = line.split_once(' ').ok_or("a merge is two ids")?;
            let pair: (u32, u32) = (left.parse()?, right.parse()?);
            let part = |id: u32| bytes.get(id as usize).ok_or("a merge names a later id");
            let joined = [part(pair.0)?.as_slice(), part(pair.1)?].concat();
            ranks.insert(pair, FIRST_MERGE + ranks.len() as u32);
            bytes.push(joined);
        }
        Ok(Self { ranks, bytes })
    }

    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at(piece_len(rest));
            self.encode_piece(piece, &mut ids);
            rest = tail;
        }
        ids
    }

    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|&id| self.bytes.get(id as usize).into_iter().flatten())
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Joins the pair of the lowest rank until none is left.
    fn encode_piece(&self, piece: &[u8], out: &mut Vec<u32>) {
        let mut ids: Vec<u32> = piece.iter().map(|&byte| u32::from(byte)).collect();
        let rank = |pair: &[u32]| self.ranks.get(&(pair[0], pair[1])).copied();
        while let Some(merge) = ids.windows(2).filter_map(rank).min() {
            let mut joined = Vec::with_capacity(ids.len());
            let mut at = 0;
            while at < ids.len() {
                let pair = ids.get(at..at + 2).and_then(rank) == Some(merge);
                joined.push(if pair { merge } else { ids[at] });
                at += 1 + usize::from(pair);
            }
            ids = joined;
        }
        out.extend(ids);
    }
}

/// Length of the piece that `text` begins with: letters or other characters, either with one
/// space before them, or white space, which leaves its last space to a piece that follows.
fn piece_len(text: &[u8]) -> usize {
    let space = |byte: u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
    let other = |byte: u8| !space(byte) && !byte.is_ascii_alphabetic();
    let run = |from: usize, class: &dyn Fn(u8) -> bool| {
        from + text[from..].iter().take_while(|&&byte| class(byte)).count()
    };
    let start = usize::from(text[0] == b' ');
    match text.get(start) {
        Some(byte) if byte.is_ascii_alphabetic() => run(start, &|b| b.is_ascii_alphabetic()),
        Some(&byte) if other(byte) => run(start, &other),
        _ => {
            let end = run(0, &space);
            let lends = end < text.len() && end > 1 && text[end - 1] == b' ';
            end - usize::from(lends)
        }
    }
}
