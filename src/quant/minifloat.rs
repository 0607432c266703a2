//! Floats of 8 and 4 bits: E4M3 and E5M2 of the OCP 8-bit proposal, E2M1 of its microscaling one.
//!
//! Rounding is to nearest even; what is past the largest finite value becomes that value
//! (saturation, as inference engines store caches).

/// One of the formats: exponent bits above `mantissa_bits`, an exponent bias, a largest code.
struct Mini {
    mantissa_bits: u32,
    /// Exponent of the smallest normal number.
    min_exponent: i32,
    /// The code of the largest finite magnitude.
    max_code: u32,
}

const E4M3: Mini = Mini { mantissa_bits: 3, min_exponent: -6, max_code: 0x7e };
const E5M2: Mini = Mini { mantissa_bits: 2, min_exponent: -14, max_code: 0x7b };
const E2M1: Mini = Mini { mantissa_bits: 1, min_exponent: 0, max_code: 0x7 };

/// 2 to the power of `n`, for `n` in -126..=127.
fn pow2(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

impl Mini {
    /// The code of a magnitude, which may be infinite but not NaN.
    fn encode(&self, magnitude: f32) -> u32 {
        if magnitude.is_infinite() {
            return self.max_code;
        }
        let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(self.min_exponent);
        // In units of the last place: exact, whether the number is normal in either format or not.
        let units = libm::rintf(magnitude * pow2(self.mantissa_bits as i32 - exponent));
        let binade = (exponent - self.min_exponent) as u32;
        // A normal number's units hold the implicit bit, which counts one binade up; rounding to
        // the next power of two carries by itself.
        ((binade << self.mantissa_bits) + units as u32).min(self.max_code)
    }

    fn decode(&self, code: u32) -> f32 {
        let (binade, mantissa) =
            (code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1));
        let implicit = if binade == 0 { 0 } else { 1 << self.mantissa_bits };
        let exponent = self.min_exponent + binade.saturating_sub(1) as i32;
        (implicit + mantissa) as f32 * pow2(exponent - self.mantissa_bits as i32)
    }
}

fn signed(code: u32, x: f32, sign_bit: u32) -> u8 {
    (code | if x.is_sign_negative() { sign_bit } else { 0 }) as u8
}

/// E4M3, saturating at 448; NaN keeps its sign and becomes 0x7f.
pub fn e4m3_from_f32(x: f32) -> u8 {
    signed(if x.is_nan() { 0x7f } else { E4M3.encode(x.abs()) }, x, 0x80)
}

/// The value of an E4M3 code; 0x7f and 0xff are NaN.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let magnitude = match code & 0x7f {
        0x7f => f32::NAN,
        magnitude => E4M3.decode(magnitude.into()),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// E5M2, saturating at 57344; NaN keeps its sign and becomes 0x7f.
pub fn e5m2_from_f32(x: f32) -> u8 {
    signed(if x.is_nan() { 0x7f } else { E5M2.encode(x.abs()) }, x, 0x80)
}

/// The value of an E5M2 code, which is the upper byte of an f16: infinities and NaN included.
pub fn e5m2_to_f32(code: u8) -> f32 {
    half::f16::from_bits(u16::from(code) << 8).to_f32()
}

/// E2M1 in the low four bits, saturating at 6. NaN becomes 6 with its sign: the format has none.
pub fn e2m1_from_f32(x: f32) -> u8 {
    signed(if x.is_nan() { E2M1.max_code } else { E2M1.encode(x.abs()) }, x, 0x8)
}

/// The value of an E2M1 code: 0, 0.5, 1, 1.5, 2, 3, 4 or 6 with a sign. The high four bits are not
/// read.
pub fn e2m1_to_f32(code: u8) -> f32 {
    let magnitude = E2M1.decode(u32::from(code & 0x7));
    if code & 0x8 != 0 { -magnitude } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The nearest of all finite codes, the even one of two.
    fn nearest(x: f32, codes: u8, decode: fn(u8) -> f32) -> u8 {
        let distance = |code: u8| (f64::from(decode(code)) - f64::from(x.abs())).abs();
        (0..=codes)
            .min_by(|&a, &b| {
                distance(a).partial_cmp(&distance(b)).unwrap().then((a & 1).cmp(&(b & 1)))
            })
            .unwrap()
    }

    #[test]
    fn every_code_comes_back_and_every_float_goes_to_the_nearest() {
        type Format = (fn(f32) -> u8, fn(u8) -> f32, u8, u8);
        let formats: [Format; 3] = [
            (e4m3_from_f32, e4m3_to_f32, 0x7e, 0x80),
            (e5m2_from_f32, e5m2_to_f32, 0x7b, 0x80),
            (e2m1_from_f32, e2m1_to_f32, 0x07, 0x08),
        ];
        for (encode, decode, max, sign) in formats {
            for code in 0..=max {
                assert_eq!(encode(decode(code)), code);
                assert_eq!(encode(-decode(code)), code | sign);
                assert_eq!(decode(code | sign).to_bits(), (-decode(code)).to_bits());
                // Between a code and the next: the middle, and the floats around it.
                if code < max {
                    let middle = (decode(code) + decode(code + 1)) / 2.0;
                    for x in [middle, middle.next_down(), middle.next_up()] {
                        assert_eq!(encode(x), nearest(x, max, decode), "{x:e} near {code}");
                    }
                }
            }
            let largest = decode(max);
            for x in [largest * 1.01, largest * 100.0, f32::MAX, f32::INFINITY] {
                assert_eq!((encode(x), encode(-x)), (max, max | sign));
            }
            for x in [0.0, f32::MIN_POSITIVE, f32::from_bits(1)] {
                assert_eq!(encode(x), 0);
            }
        }
    }

    #[test]
    fn published_values() {
        assert_eq!((e4m3_to_f32(0x7e), e4m3_to_f32(0x01)), (448.0, 1.0 / 512.0));
        assert_eq!((e5m2_to_f32(0x7b), e5m2_to_f32(0x01)), (57344.0, 1.0 / 65536.0));
        assert_eq!(e4m3_from_f32(1.0), 0x38);
        let four: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        assert!((0..8).all(|code| e2m1_to_f32(code) == four[usize::from(code)]));
        assert!(e4m3_to_f32(e4m3_from_f32(f32::NAN)).is_nan());
        assert!(e5m2_to_f32(e5m2_from_f32(f32::NAN)).is_nan());
    }
}
