//! The C ABI of libkvcache as the shared library inside the Python wheel.
pub use ::kvcache::*;
