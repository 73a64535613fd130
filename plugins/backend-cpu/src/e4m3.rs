//! Keys and values in eight bits, as [`KvDType::F8E4M3`] describes them.
//!
//! A scale is kept as the exponent's bits of a float that is 2^120 times as large, 255 where an element isn't finite: then
//! all of the head is NaN. Vectors of codes are loaded as halves, which have the same bits but for the exponent's bias, and so
//! are 2^-8 of what they stand for; [`factor`] makes up for it where it applies the scale.

use setu_core::KvDType;

use crate::kv::Element;

/// A code of e4m3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct E4m3(pub u8);

/// The scale of a head with an element that isn't finite.
const NOT_FINITE: u8 = 255;

impl E4m3 {
    /// The half with the same bits: 2^-8 of the number.
    #[inline(always)]
    pub fn small_half(self) -> half::f16 {
        let bits = u16::from(self.0);
        half::f16::from_bits((bits & 0x80) << 8 | (bits & 0x7f) << 7)
    }
}

impl Element for E4m3 {
    const DTYPE: KvDType = KvDType::F8E4M3;
    const SCALED: bool = true;

    fn scale_of(head: &[f32]) -> u8 {
        let largest = head.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        if largest >= f32::INFINITY.to_bits() {
            return NOT_FINITE;
        }
        // 448 is 1.75 × 2^8.
        let exponent = (largest >> 23) as i32 - 127 - 8 + i32::from(largest & 0x7f_ffff > 0x60_0000);
        (exponent.clamp(-120, 7) + 247) as u8
    }

    fn from_f32(values: &[f32], scale: u8, out: &mut [E4m3]) {
        if scale == NOT_FINITE {
            out.fill(E4m3(0));
            return;
        }
        let inverse = f32::from_bits((374 - u32::from(scale)) << 23);
        for (x, out) in values.iter().zip(out) {
            let bits = (x * inverse).to_bits();
            let magnitude = bits & 0x7fff_ffff;
            // Numbers below the least normal one, 2^-6, are multiples of 2^-9: as those behind 2^14 are of a float.
            let code = if magnitude < 0x3c80_0000 {
                (f32::from_bits(magnitude) + 16384.0).to_bits() - 0x4680_0000
            } else {
                ((magnitude + 0x7_ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3)
            };
            *out = E4m3((bits >> 24 & 0x80) as u8 | code.min(0x7e) as u8);
        }
    }
}

/// What codes that were loaded as halves are multiplied with.
#[inline(always)]
pub fn factor(scale: u8) -> f32 {
    let exponent = u32::from(scale).saturating_sub(112);
    f32::from_bits((if scale == NOT_FINITE { 255 } else { exponent }) << 23)
}

#[cfg(test)]
mod tests {
    use setu_testkit::blocks;
    use setu_testkit::rng::Rng;

    use super::*;

    #[test]
    fn heads_are_kept_as_the_contract_says() {
        let mut rng = Rng::new(11);
        for exponent in [-130, -119, -20, -7, 0, 3, 12, 20] {
            let mut head: Vec<f32> = (0..200).map(|_| (rng.centered() * f64::from(exponent).exp2()) as f32).collect();
            // From the largest to what vanishes, and between two codes.
            head.extend((0..24).map(|n| f64::from(exponent - n).exp2() as f32 * 1.0625));
            let scale = E4m3::scale_of(&head);
            let mut codes = vec![E4m3::default(); head.len()];
            E4m3::from_f32(&head, scale, &mut codes);
            let found: Vec<f64> =
                codes.iter().map(|code| f64::from(code.small_half().to_f32() * factor(scale))).collect();
            let wide: Vec<f64> = head.iter().map(|&x| f64::from(x)).collect();
            assert_eq!(found, blocks::rounded(KvDType::F8E4M3, &wide), "2^{exponent}");
        }
    }

    #[test]
    fn a_head_that_is_not_finite_is_nan() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let scale = E4m3::scale_of(&[1.0, bad]);
            let mut codes = [E4m3(3); 2];
            E4m3::from_f32(&[1.0, bad], scale, &mut codes);
            assert!(codes.iter().all(|code| (code.small_half().to_f32() * factor(scale)).is_nan()), "{bad}");
        }
    }
}
