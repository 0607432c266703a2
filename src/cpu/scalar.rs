//! The kernels in plain Rust, one lane at a time.

use crate::cpu::vector::One;

crate::cpu::kernels::instantiate!(kernels, One);
crate::cpu::sealed::instantiate_sealed!(sealed, One, Plain);
