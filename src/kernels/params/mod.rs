//! The parameter structs of the CUDA kernels: the one definition that Rust, nvcc and the emulator
//! share. `cuda/kvc_params.h` is written from this folder, and a test fails when the two differ.
//!
//! Each kernel takes one struct by value. Fields have no padding between them; addresses are those
//! of the device. What a kernel does with them is said in its `.cuh` file; nothing here computes.

use alloc::string::String;
use alloc::vec::Vec;
use core::marker::PhantomData;

/// A device address that a kernel reads.
#[repr(transparent)]
pub struct In<T>(pub u64, PhantomData<fn() -> T>);

/// A device address that a kernel writes (and may read).
#[repr(transparent)]
pub struct Out<T>(pub u64, PhantomData<fn() -> T>);

/// The element of an address whose type a field of the struct names at run time.
#[derive(Debug, Clone, Copy)]
pub enum Any {}

macro_rules! address {
    ($name:ident) => {
        impl<T> $name<T> {
            /// No address.
            pub const NULL: Self = Self::at(0);

            /// This device address.
            pub const fn at(address: u64) -> Self {
                Self(address, PhantomData)
            }
        }
        impl<T> Clone for $name<T> {
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<T> Copy for $name<T> {}
        impl<T> Default for $name<T> {
            fn default() -> Self {
                Self::NULL
            }
        }
        impl<T> core::fmt::Debug for $name<T> {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}
address!(In);
address!(Out);

/// A type that a field may have, by its name in C.
pub trait CType {
    /// The declaration of a field of this type, without the semicolon.
    fn declare(field: &str) -> String;
}

macro_rules! c_type {
    ($($rust:ty => $c:literal),+ $(,)?) => {$(
        impl CType for $rust {
            fn declare(field: &str) -> String {
                alloc::format!("{} {field}", $c)
            }
        }
    )+};
}
c_type!(u64 => "uint64_t", u32 => "uint32_t", i32 => "int32_t", i64 => "int64_t", f32 => "float", Any => "void");

impl<T: CType> CType for In<T> {
    fn declare(field: &str) -> String {
        alloc::format!("const {}", T::declare(&alloc::format!("*{field}")))
    }
}

impl<T: CType> CType for Out<T> {
    fn declare(field: &str) -> String {
        T::declare(&alloc::format!("*{field}"))
    }
}

/// A struct that crosses to device code, described for the header.
pub trait DeviceStruct: Copy + 'static {
    /// The struct's name in C.
    const C_NAME: &'static str;
    /// Its documentation, as lines.
    const DOC: &'static [&'static str];
    /// Its fields in order: documentation lines and C declaration.
    fn fields() -> Vec<(&'static [&'static str], String)>;
}

macro_rules! device_struct {
    (
        $(#[doc = $doc:literal])+
        $name:ident, $c_name:literal {
            $($(#[doc = $field_doc:literal])+ $field:ident: $type:ty,)+
        }
    ) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, Default)]
        #[repr(C)]
        pub struct $name {
            $($(#[doc = $field_doc])+ pub $field: $type,)+
        }
        // A sum of sizes that is the size leaves no room for padding.
        const _: () = assert!(0 $(+ size_of::<$type>())+ == size_of::<$name>());
        impl $crate::kernels::params::DeviceStruct for $name {
            const C_NAME: &'static str = $c_name;
            const DOC: &'static [&'static str] = &[$($doc),+];
            fn fields() -> alloc::vec::Vec<(&'static [&'static str], alloc::string::String)> {
                alloc::vec![$((
                    &[$($field_doc),+] as &'static [&'static str],
                    <$type as $crate::kernels::params::CType>::declare(stringify!($field)),
                )),+]
            }
        }
    };
}

// After the macro that they use.
mod append;
mod append_token;
mod cascade;
mod copy;
mod decode;
mod decode_tile;
mod decode_token;
mod lookup;
mod merge;
mod mla;
mod mla_token;
mod prefill;
mod prefill_sealed;
mod prefill_token;
mod seal;

pub use append::AppendParams;
pub use append_token::AppendTokenParams;
pub use cascade::{CascadeSegment, CascadeSplitParams};
pub use copy::CopyParams;
pub use decode::{DecodeHead, DecodeParams, DecodePlanParams, DecodeRange, DecodeSpan};
pub use decode_tile::DecodeTileParams;
pub use decode_token::DecodeTokenParams;
pub use lookup::{LookupParams, LookupPatch, LookupPatchParams};
pub use merge::MergeParams;
pub use mla::MlaParams;
pub use mla_token::MlaTokenParams;
pub use prefill::PrefillParams;
pub use prefill_sealed::PrefillSealedParams;
pub use prefill_token::PrefillTokenParams;
pub use seal::SealParams;
