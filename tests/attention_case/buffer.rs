//! Elements of a type that is known at run time.

use kvcache::dtype::{DType, Rows, bf16, f16};

/// Elements of a run-time type.
pub enum Buffer {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Buffer {
    pub fn filled(dtype: DType, elements: usize, mut next: impl FnMut() -> f32) -> Self {
        match dtype {
            DType::F32 => Buffer::F32((0..elements).map(|_| next()).collect()),
            DType::F16 => Buffer::F16((0..elements).map(|_| f16::from_f32(next())).collect()),
            _ => Buffer::Bf16((0..elements).map(|_| bf16::from_f32(next())).collect()),
        }
    }

    #[allow(dead_code)]
    pub fn of(dtype: DType, values: &[f32]) -> Self {
        let mut values = values.iter().copied();
        Self::filled(dtype, values.len(), || values.next().unwrap_or(f32::NAN))
    }

    pub fn rows(&self) -> Rows<'_> {
        match self {
            Buffer::F32(x) => Rows::F32(x),
            Buffer::F16(x) => Rows::F16(x),
            Buffer::Bf16(x) => Rows::Bf16(x),
        }
    }

    pub fn ptr(&self) -> *mut u8 {
        self.rows().as_ptr().cast_mut()
    }

    pub fn get(&self, i: usize) -> f32 {
        match self {
            Buffer::F32(x) => x[i],
            Buffer::F16(x) => x[i].to_f32(),
            Buffer::Bf16(x) => x[i].to_f32(),
        }
    }
}
