//! Status codes and the error type of every layer.
//!
//! A status number, once published, keeps its meaning for ever: retired numbers stay reserved.
//! Errors carry static context and the numbers a caller needs to act (how many blocks were
//! missing), never an allocation, so that they can be raised under memory pressure and without
//! `std`. This file knows nothing of the layers that raise them.

use core::fmt;

/// The numeric status of a call across the C ABI: 0 is success, errors are negative.
///
/// Blocks: -1 to -99 the caller's arguments, -100 to -199 resources, -200 to -299 devices and
/// kernels, -300 to -399 object state, -900 and below the library's own faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
#[non_exhaustive]
pub enum Status {
    /// The call did what it says.
    Ok = 0,
    /// An argument has a value that the function does not accept.
    InvalidArgument = -1,
    /// A required pointer is NULL.
    NullPointer = -2,
    /// A pointer is not aligned for its element type.
    Misaligned = -3,
    /// An option struct's `struct_size` is too small, or its unknown tail is not zero.
    StructSize = -4,
    /// A size or an address does not fit in 64 bits (or in the type that must hold it).
    Overflow = -5,
    /// The combination is valid but this build cannot do it.
    Unsupported = -6,
    /// A handle or sequence id is not live, or belongs to another object.
    StaleHandle = -7,
    /// A buffer that the caller gave is smaller than the call needs.
    BufferTooSmall = -8,
    /// A block id is outside the pool, or the block is not allocated.
    BadBlock = -9,
    /// Not enough free or evictable blocks; nothing was taken.
    OutOfBlocks = -100,
    /// Every sequence slot is in use.
    OutOfSequences = -101,
    /// The system refused memory.
    OutOfMemory = -102,
    /// Every handle slot of the process is in use.
    TooManyHandles = -103,
    /// The library was built without kernels for this device.
    NoKernels = -200,
    /// The device is not present.
    NoDevice = -201,
    /// The device or its driver reported an error.
    DeviceFailed = -202,
    /// A tier's files or store failed.
    TierFailed = -203,
    /// The object is not in a state in which the call is allowed.
    InvalidState = -300,
    /// A layer of a sequence was to be loaded from a tier, and never will be.
    LayerMissing = -301,
    /// The library panicked; the object involved is poisoned.
    Panic = -900,
    /// An earlier panic left the object unusable; only destroying it is allowed.
    Poisoned = -901,
}

/// What went wrong, with the argument or limit that caused it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// `what` has a value outside its contract; `why` says which values are accepted.
    InvalidArgument {
        /// The argument, as the documentation names it.
        what: &'static str,
        /// What it must be.
        why: &'static str,
    },
    /// A required pointer is NULL.
    NullPointer {
        /// The argument.
        what: &'static str,
    },
    /// A pointer is not aligned to its element.
    Misaligned {
        /// The argument.
        what: &'static str,
        /// The alignment it needs, in bytes.
        align_bytes: u32,
    },
    /// An option struct has an impossible size or an unknown non-zero tail.
    StructSize {
        /// The struct.
        what: &'static str,
        /// The size the caller gave, in bytes.
        given_bytes: u32,
    },
    /// Arithmetic on sizes left its range.
    Overflow {
        /// The quantity that did not fit.
        what: &'static str,
    },
    /// Valid, but not offered by this build or on this CPU.
    Unsupported {
        /// What was asked for.
        what: &'static str,
    },
    /// A handle, sequence or pin that is not live here.
    StaleHandle {
        /// What kind of handle.
        what: &'static str,
    },
    /// A caller's buffer is too small.
    BufferTooSmall {
        /// The buffer.
        what: &'static str,
        /// How much it must hold, in the unit the function documents.
        needed: u64,
    },
    /// A block id that the pool does not own, or that is free.
    BadBlock {
        /// The id.
        block: u32,
    },
    /// Fewer blocks are free or evictable than the call needs. Nothing was taken.
    OutOfBlocks {
        /// Blocks the call needed.
        needed: u32,
        /// Blocks it lacked after everything evictable is counted.
        missing: u32,
    },
    /// All sequence slots are taken.
    OutOfSequences {
        /// How many there are.
        limit: u32,
    },
    /// The allocator refused.
    OutOfMemory {
        /// How much was asked for.
        bytes: u64,
    },
    /// All handle slots of the process are taken.
    TooManyHandles {
        /// How many there are.
        limit: u32,
    },
    /// A kernel that the call needs is not in this build, or not for this device.
    NoKernels {
        /// The kernel, or why there is none at all.
        what: &'static str,
    },
    /// The device is absent.
    NoDevice {
        /// What is missing.
        why: &'static str,
    },
    /// The device or its driver reported an error. Work that was enqueued before may have failed.
    DeviceFailed {
        /// The call of the driver that reported it.
        call: &'static str,
        /// The driver's own text.
        why: &'static str,
    },
    /// A tier's files or store failed. The cache works on without it.
    TierFailed {
        /// What failed.
        what: &'static str,
        /// The system's error number; 0 where there is none.
        os_code: i32,
    },
    /// The object does not allow the call now.
    InvalidState {
        /// Why not.
        why: &'static str,
    },
    /// A load from tiers failed. What is there up to this layer cannot be used without it: the load is
    /// to be cancelled, and its tokens computed.
    LayerMissing {
        /// The layer group.
        group: u32,
        /// The first layer, in the order in which they come, that is not there.
        layer: u32,
        /// Why not.
        why: &'static str,
    },
    /// A bug in the library: a panic was caught at its boundary.
    Panic,
    /// The object was in use when a panic was caught.
    Poisoned,
}

/// The result of every fallible call.
pub type Result<T> = core::result::Result<T, Error>;

impl Error {
    /// The pinned number of this error.
    pub fn status(&self) -> Status {
        match self {
            Error::InvalidArgument { .. } => Status::InvalidArgument,
            Error::NullPointer { .. } => Status::NullPointer,
            Error::Misaligned { .. } => Status::Misaligned,
            Error::StructSize { .. } => Status::StructSize,
            Error::Overflow { .. } => Status::Overflow,
            Error::Unsupported { .. } => Status::Unsupported,
            Error::StaleHandle { .. } => Status::StaleHandle,
            Error::BufferTooSmall { .. } => Status::BufferTooSmall,
            Error::BadBlock { .. } => Status::BadBlock,
            Error::OutOfBlocks { .. } => Status::OutOfBlocks,
            Error::OutOfSequences { .. } => Status::OutOfSequences,
            Error::OutOfMemory { .. } => Status::OutOfMemory,
            Error::TooManyHandles { .. } => Status::TooManyHandles,
            Error::NoKernels { .. } => Status::NoKernels,
            Error::NoDevice { .. } => Status::NoDevice,
            Error::DeviceFailed { .. } => Status::DeviceFailed,
            Error::TierFailed { .. } => Status::TierFailed,
            Error::InvalidState { .. } => Status::InvalidState,
            Error::LayerMissing { .. } => Status::LayerMissing,
            Error::Panic => Status::Panic,
            Error::Poisoned => Status::Poisoned,
        }
    }

    /// Shorthand for [`Error::InvalidArgument`].
    pub(crate) const fn invalid(what: &'static str, why: &'static str) -> Self {
        Error::InvalidArgument { what, why }
    }
}

impl Status {
    /// A short text in English, without context.
    pub fn text(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::InvalidArgument => "invalid argument",
            Status::NullPointer => "null pointer",
            Status::Misaligned => "misaligned pointer",
            Status::StructSize => "wrong struct_size",
            Status::Overflow => "size overflow",
            Status::Unsupported => "unsupported by this build",
            Status::StaleHandle => "stale or foreign handle",
            Status::BufferTooSmall => "buffer too small",
            Status::BadBlock => "bad block id",
            Status::OutOfBlocks => "out of blocks",
            Status::OutOfSequences => "out of sequences",
            Status::OutOfMemory => "out of memory",
            Status::TooManyHandles => "too many handles",
            Status::NoKernels => "no kernels for this device in the build",
            Status::NoDevice => "no such device",
            Status::DeviceFailed => "the device reported an error",
            Status::TierFailed => "a tier failed",
            Status::InvalidState => "not allowed in this state",
            Status::LayerMissing => "a layer could not be loaded",
            Status::Panic => "internal error: a panic was caught",
            Status::Poisoned => "the object was poisoned by an earlier panic",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Error::InvalidArgument { what, why } => write!(f, "{what}: {why}"),
            Error::NullPointer { what } => write!(f, "{what} is NULL"),
            Error::Misaligned { what, align_bytes } => {
                write!(f, "{what} is not aligned to {align_bytes} bytes")
            }
            Error::StructSize { what, given_bytes } => write!(
                f,
                "{what}: struct_size {given_bytes} is too small, or bytes past the known fields are not zero"
            ),
            Error::Overflow { what } => write!(f, "{what} does not fit"),
            Error::Unsupported { what } => write!(f, "{what} is not supported by this build"),
            Error::StaleHandle { what } => write!(f, "{what} is not live in this object"),
            Error::BufferTooSmall { what, needed } => {
                write!(f, "{what} is too small: {needed} needed")
            }
            Error::BadBlock { block } => {
                write!(f, "block {block} is not an allocated block of this pool")
            }
            Error::OutOfBlocks { needed, missing } => {
                write!(f, "{needed} blocks needed, {missing} missing")
            }
            Error::OutOfSequences { limit } => write!(f, "all {limit} sequences are in use"),
            Error::OutOfMemory { bytes } => write!(f, "the system refused {bytes} bytes"),
            Error::TooManyHandles { limit } => write!(f, "all {limit} handles are in use"),
            Error::InvalidState { why } => f.write_str(why),
            Error::LayerMissing { group, layer, why } => {
                write!(f, "layer {layer} of group {group} is not there: {why}")
            }
            Error::NoKernels { what } => write!(f, "no kernels: {what}"),
            Error::NoDevice { why } => f.write_str(why),
            Error::DeviceFailed { call, why } => write!(f, "{call}: {why}"),
            #[cfg(feature = "std")]
            Error::TierFailed { what, os_code } if os_code != 0 => {
                write!(f, "{what}: {}", std::io::Error::from_raw_os_error(os_code))
            }
            Error::TierFailed { what, .. } => write!(f, "{what} failed"),
            Error::Panic | Error::Poisoned => f.write_str(self.status().text()),
        }
    }
}

impl core::error::Error for Error {}
