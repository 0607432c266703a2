//! The compiled kernels that the build embedded: one fatbin for each `cuda/*.cu`.
//!
//! Without the feature `cuda`, or where the build found no nvcc, there are none, and the text says
//! so; a call on a CUDA device then has no kernels to run.

/// One embedded image.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    /// The source's name without its ending.
    pub name: &'static str,
    /// The fatbin, aligned to 16 bytes.
    pub bytes: &'static [u8],
}

#[cfg(feature = "cuda")]
mod embedded {
    use super::Image;

    /// Gives the bytes it holds the alignment that the driver wants of an image. Unused where there
    /// are none.
    #[allow(dead_code)]
    #[repr(C, align(16))]
    struct Aligned<T: ?Sized>(T);

    include!(concat!(env!("OUT_DIR"), "/kvc_images.rs"));
}

/// Every image of this build, in no particular order.
pub fn images() -> &'static [Image] {
    #[cfg(feature = "cuda")]
    return embedded::IMAGES;
    #[cfg(not(feature = "cuda"))]
    &[]
}

/// What this build embedded and which compiler made it, in one line.
pub fn build_text() -> &'static str {
    #[cfg(feature = "cuda")]
    return embedded::BUILD_TEXT;
    #[cfg(not(feature = "cuda"))]
    "none (built without the feature cuda)"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_fatbins_aligned_to_16() {
        for image in images() {
            assert_eq!(image.bytes.as_ptr().align_offset(16), 0, "{}", image.name);
            // The magic number of a fatbin, which the driver looks for.
            assert_eq!(image.bytes[..4], 0xba55_ed50_u32.to_le_bytes(), "{}", image.name);
        }
        assert_eq!(images().is_empty(), build_text().starts_with("none"));
    }
}
