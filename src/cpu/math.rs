//! exp and tanh over vectors: the same polynomials in every build and at every level.

use super::vector::Vector;

/// Below this the result of [`exp`] is 0 (the smallest argument with a normal result).
const EXP_MIN: f32 = -87.336_54;
/// Above this the argument is clamped, which keeps the result finite.
const EXP_MAX: f32 = 88.3;

/// `e^x`, relative error below 2^-22 for -87.3 <= x <= 88.3; exactly 0 below (so for -inf) and
/// about `f32::MAX / 2` above. NaN gives an unspecified value.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(crate) unsafe fn exp<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, the first with few bits, so
        // that n times it is exact.
        let clamped = x.min(V::splat(EXP_MAX)).max(V::splat(EXP_MIN));
        let n = clamped.mul(V::splat(core::f32::consts::LOG2_E)).round();
        let r = n.fma(V::splat(-0.693_359_4), clamped);
        let r = n.fma(V::splat(2.121_944_4e-4), r);
        // Minimax polynomial of e^r.
        let p = V::splat(1.987_569_1e-4).fma(r, V::splat(1.398_199_9e-3));
        let p = p.fma(r, V::splat(8.333_452e-3));
        let p = p.fma(r, V::splat(4.166_579_6e-2));
        let p = p.fma(r, V::splat(1.666_666_5e-1));
        let p = p.fma(r, V::splat(0.5));
        let p = p.fma(r.mul(r), r.add(V::splat(1.0)));
        p.scale2(n).above(x, V::splat(EXP_MIN))
    }
}

/// `2^x` for `x <= 0`, relative error below 2^-22; exactly 0 below -126 (so for -inf). NaN gives an
/// unspecified value.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(crate) unsafe fn exp2<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        let floor = V::splat(-126.0);
        let clamped = x.max(floor);
        let n = clamped.round();
        let f = clamped.sub(n);
        // Minimax polynomial of 2^f for |f| <= 1/2, exact at 0.
        let p = V::splat(1.330_060_7e-3).fma(f, V::splat(9.669_691e-3));
        let p = p.fma(f, V::splat(5.550_558_5e-2));
        let p = p.fma(f, V::splat(2.402_228_3e-1));
        let p = p.fma(f, V::splat(core::f32::consts::LN_2));
        let p = p.fma(f, V::splat(1.0));
        p.scale2(n).above(x, floor)
    }
}

/// `tanh(x)` from [`exp`], absolute error below 2^-22.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(crate) unsafe fn tanh<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        // 1 - 2 / (e^2x + 1): saturates by itself on both sides.
        let e = exp(x.add(x).min(V::splat(40.0)));
        V::splat(1.0).sub(V::splat(2.0).div(e.add(V::splat(1.0))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::vector::One;

    fn exp1(x: f32) -> f32 {
        // SAFETY: one lane needs nothing.
        unsafe { exp(One::splat(x)).sum() }
    }

    #[test]
    fn exp_is_within_its_error() {
        let mut x = -87.3f32;
        while x < 88.3 {
            let (got, want) = (f64::from(exp1(x)), f64::from(x).exp());
            let error = (got / want - 1.0).abs();
            assert!(error <= 2f64.powi(-22), "exp({x}) = {got}, want {want}: {error:e}");
            x += 0.013_7;
        }
        assert_eq!(exp1(0.0), 1.0);
        assert_eq!(exp1(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp1(-88.0), 0.0);
        assert!(exp1(f32::INFINITY).is_finite());
    }

    #[test]
    fn exp2_is_within_its_error() {
        let mut x = -126.0f32;
        while x <= 0.0 {
            // SAFETY: one lane needs nothing.
            let got = f64::from(unsafe { exp2(One::splat(x)).sum() });
            let error = (got / f64::from(x).exp2() - 1.0).abs();
            assert!(error <= 2f64.powi(-22), "2^{x} = {got}: {error:e}");
            x += 0.013_7;
        }
        for (x, want) in [(0.0, 1.0), (-1.0, 0.5), (-126.5, 0.0), (f32::NEG_INFINITY, 0.0)] {
            // SAFETY: one lane needs nothing.
            assert_eq!(unsafe { exp2(One::splat(x)).sum() }, want);
        }
    }

    #[test]
    fn tanh_is_within_its_error() {
        for i in -4000..=4000 {
            let x = i as f32 * 0.005;
            // SAFETY: one lane needs nothing.
            let got = f64::from(unsafe { tanh(One::splat(x)).sum() });
            let want = f64::from(x).tanh();
            assert!((got - want).abs() <= 2f64.powi(-22), "tanh({x}) = {got}, want {want}");
        }
    }
}
