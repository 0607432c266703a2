//! CRC-32C (Castagnoli), the checksum of sealed records, where they are sealed and where they are
//! read. Any one, two or three flipped bits of a record are found, and any burst of 32.

/// The checksum of `bytes` after those whose checksum is `before` (0 at the start).
pub fn crc32c(before: u32, bytes: &[u8]) -> u32 {
    // By the CPU's instruction where it has one, three streams at a time.
    #[cfg(all(feature = "std", not(miri)))]
    {
        crc32c::crc32c_append(before, bytes)
    }
    #[cfg(not(all(feature = "std", not(miri))))]
    table::crc32c(before, bytes)
}

/// Without anybody to ask what the CPU has: eight bytes a step.
#[cfg(any(test, miri, not(feature = "std")))]
mod table {
    /// `[n][byte]`: what `byte` leaves when `n` zeros follow it.
    static TABLES: [[u32; 256]; 8] = tables();

    const fn tables() -> [[u32; 256]; 8] {
        let mut tables = [[0; 256]; 8];
        let mut byte = 0;
        while byte < 256 {
            let mut crc = byte as u32;
            let mut bit = 0;
            while bit < 64 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
                if bit % 8 == 0 {
                    tables[bit / 8 - 1][byte] = crc;
                }
            }
            byte += 1;
        }
        tables
    }

    pub(super) fn crc32c(before: u32, bytes: &[u8]) -> u32 {
        let (words, rest) = bytes.as_chunks::<8>();
        let crc = words.iter().fold(!before, |crc, word| {
            let word = (u64::from_le_bytes(*word) ^ u64::from(crc)).to_le_bytes();
            word.iter().zip(TABLES.iter().rev()).fold(0, |sum, (&b, t)| sum ^ t[usize::from(b)])
        });
        !rest.iter().fold(crc, |crc, &b| (crc >> 8) ^ TABLES[0][usize::from((crc as u8) ^ b)])
    }
}

#[cfg(test)]
mod tests {
    use super::{crc32c, table};

    /// The definition, bit by bit.
    fn by_bits(before: u32, bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!before, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 * (crc & 1)))
        })
    }

    #[test]
    fn the_published_vectors() {
        for crc32c in [crc32c, table::crc32c, by_bits] {
            assert_eq!(crc32c(0, b"123456789"), 0xe306_9283);
            assert_eq!(crc32c(0, &[0; 32]), 0x8a91_36aa);
            assert_eq!(crc32c(0, &[0xff; 32]), 0x62a8_ab43);
            assert_eq!(crc32c(crc32c(0, b"1234"), b"56789"), 0xe306_9283);
        }
    }

    #[test]
    fn every_way_computes_the_same() {
        let mut state = 1u32;
        let bytes: Vec<u8> = (0..6000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        // Ends within a word, and enough bytes for each length that three streams are taken of.
        for start in 0..9 {
            for end in (start..start + 40).chain([800, 1203, 800 + 650 * start]) {
                let part = &bytes[start..end];
                let expected = by_bits(state, part);
                assert_eq!(crc32c(state, part), expected, "{start}..{end}");
                assert_eq!(table::crc32c(state, part), expected, "{start}..{end}, by tables");
            }
        }
    }
}
