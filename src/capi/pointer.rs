//! What may be read and written through a caller's pointers.
//!
//! NULL, alignment, sizes and overflow are checked here and nowhere else; what cannot be checked
//! (that the memory is there, and as long as the caller says) is the contract of the ABI. Structs
//! that carry their size follow one rule: fields past the caller's size have their default, bytes
//! past ours must be zero. This file knows no noun.

use core::ffi::c_char;
#[cfg(feature = "std")]
use core::ffi::c_void;
use core::mem::MaybeUninit;
use core::ptr;

#[cfg(feature = "std")]
use crate::dtype::{DType, Rows, RowsMut};
use crate::dtype::{bf16, f16};
use crate::error::{Error, Result};
use crate::ids::BlockId;

/// The address that a pointer into a device's memory is.
#[cfg(feature = "std")]
pub(super) fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

/// The same, of a pointer that may be NULL and must be aligned to `align_bytes`.
#[cfg(feature = "std")]
pub(super) fn aligned<T>(pointer: *const T, align_bytes: u32, what: &'static str) -> Result<u64> {
    let address = address(pointer);
    if address.is_multiple_of(u64::from(align_bytes)) {
        Ok(address)
    } else {
        Err(Error::Misaligned { what, align_bytes })
    }
}

/// NULL and alignment of a pointer.
fn check<T>(pointer: *const T, what: &'static str) -> Result<()> {
    if pointer.is_null() {
        return Err(Error::NullPointer { what });
    }
    if !pointer.is_aligned() {
        return Err(Error::Misaligned { what, align_bytes: align_of::<T>() as u32 });
    }
    Ok(())
}

/// Bytes of `count` elements, at most what an object can have.
fn span<T>(count: u64, what: &'static str) -> Result<usize> {
    let count = usize::try_from(count).map_err(|_| Error::Overflow { what })?;
    match count.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(count),
        _ => Err(Error::Overflow { what }),
    }
}

/// A type that every bit pattern is a valid value of.
///
/// # Safety
/// Must be `repr(C)`, transparent or primitive, of integers, floats and raw pointers.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: primitives.
unsafe impl Plain for u8 {}
// SAFETY: primitives.
unsafe impl Plain for i32 {}
// SAFETY: primitives.
unsafe impl Plain for u32 {}
// SAFETY: primitives.
unsafe impl Plain for u64 {}
// SAFETY: primitives.
unsafe impl Plain for f32 {}
// SAFETY: transparent over u32.
unsafe impl Plain for BlockId {}
// SAFETY: transparent over u16.
unsafe impl Plain for f16 {}
// SAFETY: transparent over u16.
unsafe impl Plain for bf16 {}

/// A place for one result, checked now and written at the end.
///
/// # Safety
/// Unless NULL or misaligned, `out` must be writable for the time of the call.
pub(crate) unsafe fn out<'a, T>(out: *mut T, what: &'static str) -> Result<&'a mut MaybeUninit<T>> {
    check(out, what)?;
    // SAFETY: the caller's promise; MaybeUninit asks for no valid value.
    Ok(unsafe { &mut *out.cast::<MaybeUninit<T>>() })
}

/// A place for a result that the caller may not want.
///
/// # Safety
/// As for [`out`].
pub(crate) unsafe fn maybe_out<'a, T>(
    pointer: *mut T,
    what: &'static str,
) -> Result<Option<&'a mut MaybeUninit<T>>> {
    // SAFETY: the caller's promise.
    if pointer.is_null() { Ok(None) } else { unsafe { out(pointer, what) }.map(Some) }
}

/// `count` elements to read. A count of 0 needs no pointer.
///
/// # Safety
/// Unless NULL or misaligned, `pointer` must be readable for `count` elements, and unchanged by
/// others, for the time of the call.
pub(crate) unsafe fn slice<'a, T: Plain>(
    pointer: *const T,
    count: u64,
    what: &'static str,
) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    check(pointer, what)?;
    let count = span::<T>(count, what)?;
    // SAFETY: the caller's promise; the size was checked, and every bit pattern is valid.
    Ok(unsafe { core::slice::from_raw_parts(pointer, count) })
}

/// `count` elements to write. A count of 0 needs no pointer.
///
/// # Safety
/// Unless NULL or misaligned, `pointer` must be writable for `count` elements, and used by nobody
/// else, for the time of the call. What it holds need not be set: it comes from outside the
/// compiler's view, so it has some value.
pub(crate) unsafe fn slice_out<'a, T: Plain>(
    pointer: *mut T,
    count: u64,
    what: &'static str,
) -> Result<&'a mut [T]> {
    if count == 0 {
        return Ok(&mut []);
    }
    check(pointer, what)?;
    let count = span::<T>(count, what)?;
    // SAFETY: the caller's promise; the size was checked, and every bit pattern is valid.
    Ok(unsafe { core::slice::from_raw_parts_mut(pointer, count) })
}

/// `elements` elements of the type with the id `dtype`, to read.
///
/// # Safety
/// As for [`slice`].
#[cfg(feature = "std")]
pub(crate) unsafe fn rows<'a>(
    pointer: *const c_void,
    dtype: u32,
    elements: u64,
    what: &'static str,
) -> Result<Rows<'a>> {
    // SAFETY: the caller's promise.
    unsafe {
        Ok(match DType::from_id(dtype)? {
            DType::F32 => Rows::F32(slice(pointer.cast(), elements, what)?),
            DType::F16 => Rows::F16(slice(pointer.cast(), elements, what)?),
            DType::Bf16 => Rows::Bf16(slice(pointer.cast(), elements, what)?),
        })
    }
}

/// `elements` elements of the type with the id `dtype`, to write.
///
/// # Safety
/// As for [`slice_out`].
#[cfg(feature = "std")]
pub(crate) unsafe fn rows_out<'a>(
    pointer: *mut c_void,
    dtype: u32,
    elements: u64,
    what: &'static str,
) -> Result<RowsMut<'a>> {
    // SAFETY: the caller's promise.
    unsafe {
        Ok(match DType::from_id(dtype)? {
            DType::F32 => RowsMut::F32(slice_out(pointer.cast(), elements, what)?),
            DType::F16 => RowsMut::F16(slice_out(pointer.cast(), elements, what)?),
            DType::Bf16 => RowsMut::Bf16(slice_out(pointer.cast(), elements, what)?),
        })
    }
}

/// Refuses memory that overlaps the first range or the second: those that a call writes. Ranges
/// are (address, bytes).
pub(crate) fn disjoint(ranges: &[(usize, u64)]) -> Result<()> {
    for (i, &(a, a_bytes)) in ranges.iter().enumerate().take(2) {
        for &(b, b_bytes) in &ranges[i + 1..] {
            let (a, b) = (a as u64, b as u64);
            if a < b.saturating_add(b_bytes) && b < a.saturating_add(a_bytes) {
                return Err(Error::invalid("pointers", "what is written must overlap nothing"));
            }
        }
    }
    Ok(())
}

/// A flag: 0 or 1.
pub(crate) fn flag(value: u32, what: &'static str) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::invalid(what, "must be 0 or 1")),
    }
}

/// A struct that begins with `uint32_t struct_size` and only ever grows.
///
/// # Safety
/// The first field must be that size; otherwise as for [`Plain`].
pub(crate) unsafe trait Sized32: Plain {
    /// Its name in errors.
    const NAME: &'static str;
    /// Its size in the first version that had it.
    const FIRST_BYTES: usize;
    /// The defaults, with `struct_size` of this version.
    fn initial() -> Self;
}

/// The caller's struct in this version's shape.
///
/// # Safety
/// Unless NULL or misaligned, `pointer` must be readable for its `struct_size` bytes (4 at least).
pub(crate) unsafe fn read<T: Sized32>(pointer: *const T) -> Result<T> {
    check(pointer, T::NAME)?;
    // SAFETY: the caller's promise.
    unsafe { read_at(pointer.cast(), pointer.cast::<u32>().read()) }
}

/// `count` structs, one behind the other at the distance that the first one's `struct_size` says;
/// all must have the same.
///
/// # Safety
/// Unless NULL or misaligned, `pointer` must be readable for `count` structs of that size.
pub(crate) unsafe fn read_array<T: Sized32>(
    pointer: *const T,
    count: u32,
) -> Result<impl Iterator<Item = Result<T>>> {
    check(pointer, T::NAME)?;
    // SAFETY: the caller's promise.
    let bytes = unsafe { pointer.cast::<u32>().read() };
    let wrong = Error::StructSize { what: T::NAME, given_bytes: bytes };
    if (bytes as usize) < T::FIRST_BYTES || !(bytes as usize).is_multiple_of(align_of::<T>()) {
        return Err(wrong);
    }
    Ok((0..count as usize).map(move |i| {
        let at = pointer.cast::<u8>().wrapping_add(i * bytes as usize);
        // SAFETY: the caller's promise; the address is aligned because the distance is.
        unsafe {
            if at.cast::<u32>().read() != bytes {
                return Err(wrong);
            }
            read_at(at, bytes)
        }
    }))
}

/// # Safety
/// `pointer` must be readable for `bytes` bytes.
unsafe fn read_at<T: Sized32>(pointer: *const u8, bytes: u32) -> Result<T> {
    let wrong = Error::StructSize { what: T::NAME, given_bytes: bytes };
    let (given, known) = (bytes as usize, size_of::<T>());
    if given < T::FIRST_BYTES {
        return Err(wrong);
    }
    for i in known..given {
        // SAFETY: the caller's promise: i is below `bytes`.
        if unsafe { pointer.add(i).read() } != 0 {
            return Err(wrong);
        }
    }
    let mut value = T::initial();
    // SAFETY: both sides hold that many bytes, and any bytes are a valid T.
    unsafe { ptr::copy_nonoverlapping(pointer, (&raw mut value).cast(), given.min(known)) };
    Ok(value)
}

/// Fills a caller's struct of `bytes` bytes with its defaults, and its first field with `bytes`.
///
/// # Safety
/// Unless NULL or misaligned, `pointer` must be writable for `bytes` bytes.
pub(crate) unsafe fn init<T: Sized32>(pointer: *mut T, bytes: u32) -> Result<()> {
    // SAFETY: the caller's promise; the first four bytes are there because FIRST_BYTES has them.
    unsafe {
        write(pointer, u64::from(bytes), T::initial(), T::NAME, T::FIRST_BYTES)?;
        pointer.cast::<u32>().write(bytes);
    }
    Ok(())
}

/// Writes a result struct that grows: at most `bytes` bytes of it, and zeros past what we know.
///
/// # Safety
/// Unless NULL or misaligned, `pointer` must be writable for `bytes` bytes.
pub(crate) unsafe fn write<T: Plain>(
    pointer: *mut T,
    bytes: u64,
    value: T,
    what: &'static str,
    first_bytes: usize,
) -> Result<()> {
    check(pointer, what)?;
    let given = u32::try_from(bytes).unwrap_or(u32::MAX);
    // A size past any struct that will ever be is a mistake, not a newer header.
    if (given as usize) < first_bytes || given > 1 << 16 {
        return Err(Error::StructSize { what, given_bytes: given });
    }
    let (given, known) = (given as usize, size_of::<T>());
    let to = pointer.cast::<u8>();
    // SAFETY: the caller's promise; `value` holds the bytes that are copied.
    unsafe {
        ptr::copy_nonoverlapping((&raw const value).cast(), to, given.min(known));
        ptr::write_bytes(to.add(given.min(known)), 0, given - given.min(known));
    }
    Ok(())
}

/// A NUL-terminated text of at most `most` bytes; `None` for NULL.
///
/// # Safety
/// Unless NULL, `pointer` must be readable up to the first NUL or for `most + 1` bytes, and
/// unchanged by others, for the time of the call.
#[cfg(feature = "std")]
pub(crate) unsafe fn text<'a>(
    pointer: *const c_char,
    most: usize,
    what: &'static str,
) -> Result<Option<&'a str>> {
    if pointer.is_null() {
        return Ok(None);
    }
    let bytes = pointer.cast::<u8>();
    // SAFETY: the caller's promise: bytes are read up to the first NUL, at most `most + 1`.
    let len = (0..=most).find(|&at| unsafe { bytes.add(at).read() } == 0);
    let len = len.ok_or(Error::invalid(what, "is too long"))?;
    // SAFETY: as above; those were just read.
    let text = unsafe { core::slice::from_raw_parts(bytes, len) };
    core::str::from_utf8(text).map(Some).map_err(|_| Error::invalid(what, "must be UTF-8"))
}

/// Copies `text` as `snprintf` would: at most `len - 1` bytes and a NUL. Returns the bytes of the
/// whole text, without the NUL.
///
/// # Safety
/// Unless NULL, `buf` must be writable for `len` bytes.
pub(crate) unsafe fn copy_text(text: &str, buf: *mut c_char, len: u64) -> u64 {
    if !buf.is_null() && len != 0 {
        let room = usize::try_from(len - 1).unwrap_or(usize::MAX);
        let bytes = text.len().min(room);
        // SAFETY: the caller's promise: `bytes + 1` is at most `len`.
        unsafe {
            ptr::copy_nonoverlapping(text.as_ptr().cast::<c_char>(), buf, bytes);
            buf.add(bytes).write(0);
        }
    }
    text.len() as u64
}

#[cfg(test)]
mod tests;
