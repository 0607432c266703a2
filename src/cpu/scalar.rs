//! The kernels in plain Rust, one lane at a time.

use crate::cpu::vector::One;

crate::cpu::kernels::instantiate!(kernels, One);
