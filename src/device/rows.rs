//! Dense rows in device memory that somebody else owns: an engine's queries, keys, values, outputs.
//!
//! Their maker answers for them once; the operations that take them check types and sizes.

use crate::dtype::DType;

/// Rows to read: `elements` elements, contiguous, on the device.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRows {
    address: u64,
    dtype: DType,
    elements: u64,
}

/// Rows to write, which nothing else overlaps.
#[derive(Debug)]
pub struct DeviceRowsMut {
    address: u64,
    dtype: DType,
    elements: u64,
}

macro_rules! rows {
    ($name:ident) => {
        impl $name {
            /// Vouches for `elements` elements of `dtype` at `address`.
            ///
            /// # Safety
            /// They are in memory of the device that the rows are used with, aligned to 16 bytes,
            /// for as long as work that was given them is enqueued; while it runs nobody writes
            /// what it reads or touches what it writes.
            pub const unsafe fn new(address: u64, dtype: DType, elements: u64) -> Self {
                Self { address, dtype, elements }
            }

            /// Where they begin.
            pub const fn address(&self) -> u64 {
                self.address
            }

            /// Their element type.
            pub const fn dtype(&self) -> DType {
                self.dtype
            }

            /// Elements in all rows together.
            pub const fn elements(&self) -> u64 {
                self.elements
            }
        }
    };
}
rows!(DeviceRows);
rows!(DeviceRowsMut);
