//! The C ABI of libkvcache, as `libkvcache.so` and `libkvcache.a`.
pub use ::kvcache::*;
