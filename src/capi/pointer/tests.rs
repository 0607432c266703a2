//! Growing structs between versions, and texts cut to their buffers.

use alloc::vec::Vec;

use super::*;

/// Version 2 of a struct whose version 1 ended before `added`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Options {
    struct_size: u32,
    first: u32,
    added: u32,
    more: u32,
}
// SAFETY: four u32.
unsafe impl Plain for Options {}
// SAFETY: the first is the size.
unsafe impl Sized32 for Options {
    const NAME: &'static str = "options";
    const FIRST_BYTES: usize = 8;
    fn initial() -> Self {
        Self { struct_size: 16, first: 1, added: 7, more: 0 }
    }
}

fn read_words(words: &[u32]) -> Result<Options> {
    // SAFETY: the tests give as many words as they say.
    unsafe { read(words.as_ptr().cast::<Options>()) }
}

#[test]
fn older_structs_get_defaults_and_newer_ones_must_end_in_zeros() {
    let seen = |words: &[u32]| read_words(words).unwrap();
    assert_eq!(seen(&[8, 5]), Options { struct_size: 8, first: 5, added: 7, more: 0 });
    assert_eq!(seen(&[12, 5, 6]), Options { struct_size: 12, first: 5, added: 6, more: 0 });
    assert_eq!(seen(&[16, 5, 6, 9]), Options { struct_size: 16, first: 5, added: 6, more: 9 });
    assert_eq!(seen(&[24, 5, 6, 9, 0, 0]).more, 9);
    for bad in [&[24, 5, 6, 9, 0, 1][..], &[24, 5, 6, 9, 1 << 31, 0], &[0, 5], &[7, 5]] {
        let given_bytes = bad[0];
        assert_eq!(read_words(bad), Err(Error::StructSize { what: "options", given_bytes }));
    }
}

#[test]
fn arrays_step_by_the_callers_size() {
    let all = |words: &[u32], count| {
        // SAFETY: the tests give as many words as they say.
        let structs = unsafe { read_array(words.as_ptr().cast::<Options>(), count) }?;
        structs.collect::<Result<Vec<_>>>()
    };
    let firsts: Vec<u32> = all(&[8, 1, 8, 2, 8, 3], 3).unwrap().iter().map(|o| o.first).collect();
    assert_eq!(firsts, [1, 2, 3]);
    let wide = all(&[20, 1, 2, 3, 0, 20, 4, 5, 6, 0], 2).unwrap();
    assert_eq!((wide[1].first, wide[1].more), (4, 6));
    assert!(all(&[20, 1, 2, 3, 0, 20, 4, 5, 6, 1], 2).is_err(), "tail of the second");
    assert!(all(&[8, 1, 12, 2, 3], 2).is_err(), "sizes differ");
    assert!(all(&[10, 1, 0, 0], 1).is_err(), "would misalign the next");
}

#[test]
fn init_fills_what_the_caller_has_and_no_more() {
    for bytes in [8u32, 12, 16, 20] {
        let mut words = [u32::MAX; 6];
        // SAFETY: six words are there.
        unsafe { init(words.as_mut_ptr().cast::<Options>(), bytes) }.unwrap();
        let expected = [bytes, 1, 7, 0, 0, u32::MAX];
        for (i, (&seen, value)) in words.iter().zip(expected).enumerate() {
            let inside = (i as u32) < bytes / 4;
            assert_eq!(seen, if inside { value } else { u32::MAX }, "{bytes} bytes, word {i}");
        }
    }
    let mut words = [u32::MAX; 6];
    for bytes in [0, 4, 7, u32::MAX] {
        // SAFETY: refused before anything is written.
        assert!(unsafe { init(words.as_mut_ptr().cast::<Options>(), bytes) }.is_err());
    }
    assert_eq!(words, [u32::MAX; 6]);
}

#[test]
fn pointers_are_checked_before_they_are_followed() {
    let words = [0u32; 4];
    let odd = words.as_ptr().cast::<u8>().wrapping_add(1).cast::<u32>();
    // SAFETY: each is refused, or has no elements.
    unsafe {
        assert_eq!(slice::<u32>(ptr::null(), 0, "x"), Ok(&[][..]));
        assert_eq!(slice::<u32>(ptr::null(), 1, "x"), Err(Error::NullPointer { what: "x" }));
        let misaligned = Error::Misaligned { what: "x", align_bytes: 4 };
        assert_eq!(slice(odd, 1, "x"), Err(misaligned));
        assert_eq!(out(odd.cast_mut(), "x").err(), Some(misaligned));
        let overflow = Err(Error::Overflow { what: "x" });
        assert_eq!(slice(words.as_ptr(), u64::MAX, "x"), overflow);
        assert_eq!(slice(words.as_ptr(), u64::MAX / 8 + 1, "x"), overflow);
        assert!(rows(words.as_ptr().cast(), 4, 1, "x").is_err(), "no such dtype");
        assert_eq!(rows(words.as_ptr().cast(), 2, 8, "x").unwrap().elements(), 8);
    }
}

#[test]
fn texts_are_cut_like_snprintf() {
    for len in 0..8u64 {
        let mut buf = [b'#' as c_char; 8];
        // SAFETY: eight bytes are there.
        assert_eq!(unsafe { copy_text("hello", buf.as_mut_ptr(), len) }, 5);
        let kept = "hello".len().min(len.saturating_sub(1) as usize);
        for (i, &c) in buf.iter().enumerate() {
            let expected = match i {
                _ if i as u64 >= len || i > kept => b'#',
                _ if i == kept => 0,
                _ => b"hello"[i],
            };
            assert_eq!(c as u8, expected, "len {len}, byte {i}");
        }
    }
    // SAFETY: NULL is not written.
    assert_eq!(unsafe { copy_text("hello", ptr::null_mut(), 9) }, 5);
}
