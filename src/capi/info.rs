//! Which library this is: version, ABI, and what it was built with.

use core::ffi::c_char;
use core::fmt::{self, Write};

use super::pointer;
use crate::cpu::CpuLevel;
use crate::dtype::DType;
use crate::dtype::KvFormat;
use crate::kernels::image;

/// The ABI that this header describes: 0x00MAJOR_00MINOR as 16 + 16 bits.
pub const KVC_ABI_VERSION: u32 = 0x0000_0001;

/// Element type of rows: 32-bit floats.
pub const KVC_DTYPE_F32: u32 = 1;
/// Element type of rows: IEEE half precision.
pub const KVC_DTYPE_F16: u32 = 2;
/// Element type of rows: bfloat16.
pub const KVC_DTYPE_BF16: u32 = 3;

/// Storage format of K and V: 32-bit floats.
pub const KVC_FORMAT_F32: u32 = 1;
/// Storage format of K and V: IEEE half precision.
pub const KVC_FORMAT_F16: u32 = 2;
/// Storage format of K and V: bfloat16.
pub const KVC_FORMAT_BF16: u32 = 3;
/// Storage format: 8-bit floats, 4 exponent bits; one scale a layer and KV head. The planner knows
/// this format and those below; kernels that lack one answer KVC_ERR_UNSUPPORTED.
pub const KVC_FORMAT_FP8_E4M3: u32 = 4;
/// Storage format: 8-bit floats, 5 exponent bits.
pub const KVC_FORMAT_FP8_E5M2: u32 = 5;
/// Storage format: symmetric 8-bit integers, one scale a token and head, keys rotated.
pub const KVC_FORMAT_INT8_T: u32 = 6;
/// Storage format: 4-bit integers, scale and minimum a token and head, rotated.
pub const KVC_FORMAT_INT4_T: u32 = 7;
/// Storage format: 4-bit floats with a scale for 16 channels.
pub const KVC_FORMAT_NVFP4: u32 = 8;
/// Storage format: sealed tiles of 32, 64 or 128 tokens, 8-bit keys and values.
pub const KVC_FORMAT_KT8V8: u32 = 16;
/// Storage format: sealed tiles, 4-bit keys and values.
pub const KVC_FORMAT_KT4V4: u32 = 17;
/// Storage format: sealed tiles, 3-bit keys and values.
pub const KVC_FORMAT_KT3V3: u32 = 18;
/// Storage format: sealed tiles, 4-bit keys and 2-bit values.
pub const KVC_FORMAT_KT4V2: u32 = 19;
/// Storage format: sealed tiles, 2-bit keys and values.
pub const KVC_FORMAT_KT2V2: u32 = 20;

const _: () = {
    assert!(KVC_DTYPE_F32 == DType::F32.id() && KVC_FORMAT_F32 == KvFormat::F32.id());
    assert!(KVC_DTYPE_F16 == DType::F16.id() && KVC_FORMAT_F16 == KvFormat::F16.id());
    assert!(KVC_DTYPE_BF16 == DType::Bf16.id() && KVC_FORMAT_BF16 == KvFormat::Bf16.id());
    assert!(KVC_FORMAT_FP8_E4M3 == KvFormat::Fp8E4m3.id());
    assert!(KVC_FORMAT_FP8_E5M2 == KvFormat::Fp8E5m2.id());
    assert!(KVC_FORMAT_INT8_T == KvFormat::Int8T.id());
    assert!(KVC_FORMAT_INT4_T == KvFormat::Int4T.id());
    assert!(KVC_FORMAT_NVFP4 == KvFormat::Nvfp4.id());
    assert!(KVC_FORMAT_KT8V8 == KvFormat::Kt8v8.id() && KVC_FORMAT_KT4V4 == KvFormat::Kt4v4.id());
    assert!(KVC_FORMAT_KT3V3 == KvFormat::Kt3v3.id() && KVC_FORMAT_KT4V2 == KvFormat::Kt4v2.id());
    assert!(KVC_FORMAT_KT2V2 == KvFormat::Kt2v2.id());
};

/// Exists in libraries of ABI 0.1 and no others: a program that refers to it does not link with a
/// library of another ABI. Does nothing.
///
/// Threads: thread-safe.
#[unsafe(no_mangle)]
pub extern "C" fn kvc_abi_0_1() {}

/// The KVC_ABI_VERSION that the library was built with, to compare at run time.
///
/// Threads: thread-safe.
#[unsafe(no_mangle)]
pub extern "C" fn kvc_abi_version() -> u32 {
    KVC_ABI_VERSION
}

/// The library's version, "MAJOR.MINOR.PATCH". The text lives for ever.
///
/// Threads: thread-safe.
#[unsafe(no_mangle)]
pub extern "C" fn kvc_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Copies one line about the build as snprintf would, and returns the length of the whole line,
/// the NUL not counted: version, features, storage formats, the CPU level that kernels use (or
/// why there is none), and which GPU kernels are inside. `buf` may be NULL with a `len` of 0.
///
/// Threads: thread-safe.
///
/// # Safety
/// `buf` must be writable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_build_info(buf: *mut c_char, len: u64) -> u64 {
    let mut line = Line { bytes: [0; 512], len: 0 };
    // A line that did not fit is cut; the test below holds its length.
    let _ = describe(&mut line);
    let text = core::str::from_utf8(&line.bytes[..line.len]).unwrap_or("");
    // SAFETY: the caller's promise.
    unsafe { pointer::copy_text(text, buf, len) }
}

fn describe(line: &mut Line) -> fmt::Result {
    write!(line, "libkvcache {}; features:", env!("CARGO_PKG_VERSION"))?;
    let features = [
        ("std", cfg!(feature = "std")),
        ("cuda", cfg!(feature = "cuda")),
        ("emulate", cfg!(feature = "emulate")),
        ("io-uring", cfg!(feature = "io-uring")),
        ("remote", cfg!(feature = "remote")),
        ("remote-tls", cfg!(feature = "remote-tls")),
        ("zmq", cfg!(feature = "zmq")),
    ];
    if !features.iter().any(|(_, built)| *built) {
        line.write_str(" none")?;
    }
    for (name, _) in features.iter().filter(|(_, built)| *built) {
        write!(line, " {name}")?;
    }
    line.write_str("; formats:")?;
    for format in KvFormat::ALL {
        write!(line, " {}", format.name())?;
    }
    match CpuLevel::chosen() {
        Ok(level) => write!(line, "; cpu: {}", level.name())?,
        Err(error) => write!(line, "; cpu: none ({error})")?,
    }
    write!(line, "; cuda: {}", image::build_text())
}

/// Text without an allocation.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let end = self.len + part.len();
        self.bytes.get_mut(self.len..end).ok_or(fmt::Error)?.copy_from_slice(part.as_bytes());
        self.len = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_line_is_whole() {
        let mut line = Line { bytes: [0; 512], len: 0 };
        describe(&mut line).unwrap();
        let text = core::str::from_utf8(&line.bytes[..line.len]).unwrap();
        assert!(text.starts_with("libkvcache 0.1.0; features: "), "{text}");
        assert!(text.ends_with(&alloc::format!("; cuda: {}", image::build_text())), "{text}");
    }
}
