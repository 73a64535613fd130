//! Sixteen f32 side by side, with the fused multiply-add that attention lives on.

use half::{bf16, f16};

use crate::e4m3::E4m3;

/// Sixteen lanes of f32.
///
/// # Safety
/// Every function needs the machine to have the instruction set of the implementing type; pointers must be
/// valid for sixteen elements, at any alignment.
pub(super) trait Sixteen: Copy {
    /// Most queries that share what is loaded; 1, 4 or 6.
    const QUERIES: usize;
    /// Sums that fit in registers beside what is loaded.
    const SUMS: usize;
    /// Whether [`mul_add`](Sixteen::mul_add) rounds once.
    const FUSED: bool;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load_f32(from: *const f32) -> Self;
    unsafe fn load_f16(from: *const f16) -> Self;
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// As halves that are 2^-8 of the numbers.
    unsafe fn load_e4m3(from: *const E4m3) -> Self;
    unsafe fn mul(a: Self, b: Self) -> Self;
    /// `a × b + c`.
    unsafe fn mul_add(a: Self, b: Self, c: Self) -> Self;
    unsafe fn store(self, to: *mut f32);
}

/// An element that vectors are read from.
///
/// # Safety
/// As for [`Sixteen`].
pub(super) trait Load: Copy {
    unsafe fn load<S: Sixteen>(from: *const Self) -> S;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load<S: Sixteen>(from: *const f32) -> S {
        // SAFETY: as the caller vouches.
        unsafe { S::load_f32(from) }
    }
}

impl Load for f16 {
    #[inline(always)]
    unsafe fn load<S: Sixteen>(from: *const f16) -> S {
        // SAFETY: as the caller vouches.
        unsafe { S::load_f16(from) }
    }
}

impl Load for bf16 {
    #[inline(always)]
    unsafe fn load<S: Sixteen>(from: *const bf16) -> S {
        // SAFETY: as the caller vouches.
        unsafe { S::load_bf16(from) }
    }
}

impl Load for E4m3 {
    #[inline(always)]
    unsafe fn load<S: Sixteen>(from: *const E4m3) -> S {
        // SAFETY: as the caller vouches.
        unsafe { S::load_e4m3(from) }
    }
}

/// Plain code.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 16]);

impl Sixteen for Portable {
    const QUERIES: usize = 1;
    const SUMS: usize = 4;
    const FUSED: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Portable {
        Portable([value; 16])
    }

    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Portable {
        // SAFETY: as the caller vouches.
        Portable(unsafe { from.cast::<[f32; 16]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Portable {
        // SAFETY: as the caller vouches.
        Portable(unsafe { from.cast::<[f16; 16]>().read_unaligned() }.map(f16::to_f32))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Portable {
        // SAFETY: as the caller vouches.
        Portable(unsafe { from.cast::<[bf16; 16]>().read_unaligned() }.map(bf16::to_f32))
    }

    #[inline(always)]
    unsafe fn load_e4m3(from: *const E4m3) -> Portable {
        // SAFETY: as the caller vouches.
        Portable(unsafe { from.cast::<[E4m3; 16]>().read_unaligned() }.map(|code| code.small_half().to_f32()))
    }

    #[inline(always)]
    unsafe fn mul(a: Portable, b: Portable) -> Portable {
        Portable(std::array::from_fn(|i| a.0[i] * b.0[i]))
    }

    #[inline(always)]
    unsafe fn mul_add(a: Portable, b: Portable, c: Portable) -> Portable {
        Portable(std::array::from_fn(|i| a.0[i] * b.0[i] + c.0[i]))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as the caller vouches.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(self.0) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::Sixteen;
    use crate::e4m3::E4m3;

    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    #[derive(Clone, Copy)]
    pub struct Avx2([__m256; 2]);

    macro_rules! functions {
        ($features:literal: $(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? $body:block)*) => {$(
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn $name($($arg: $ty),*) $(-> $ret)? $body
        )*};
    }

    /// Sixteen codes as halves: see [`E4m3::small_half`].
    ///
    /// # Safety
    /// The pointer is valid for sixteen codes.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn small_halves(from: *const E4m3) -> __m256i {
        // SAFETY: as the caller vouches.
        let codes = _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(from.cast()) });
        let signs = _mm256_slli_epi16::<8>(_mm256_and_si256(codes, _mm256_set1_epi16(0x80)));
        _mm256_or_si256(signs, _mm256_slli_epi16::<7>(_mm256_and_si256(codes, _mm256_set1_epi16(0x7f))))
    }

    impl Sixteen for Avx512 {
        const QUERIES: usize = 4;
        const SUMS: usize = 16;
        const FUSED: bool = true;

        functions! { "avx512f,avx512bw,avx2,fma,f16c":
            fn splat(value: f32) -> Avx512 { Avx512(_mm512_set1_ps(value)) }
            fn load_f32(from: *const f32) -> Avx512 {
                // SAFETY: as the caller vouches.
                Avx512(unsafe { _mm512_loadu_ps(from) })
            }
            fn load_f16(from: *const f16) -> Avx512 {
                // SAFETY: as the caller vouches.
                Avx512(_mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) }))
            }
            fn load_bf16(from: *const bf16) -> Avx512 {
                // SAFETY: as the caller vouches.
                let words = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(from.cast()) });
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)))
            }
            fn load_e4m3(from: *const E4m3) -> Avx512 {
                // SAFETY: as the caller vouches.
                Avx512(_mm512_cvtph_ps(unsafe { small_halves(from) }))
            }
            fn mul(a: Avx512, b: Avx512) -> Avx512 { Avx512(_mm512_mul_ps(a.0, b.0)) }
            fn mul_add(a: Avx512, b: Avx512, c: Avx512) -> Avx512 { Avx512(_mm512_fmadd_ps(a.0, b.0, c.0)) }
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as the caller vouches.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
    }

    impl Sixteen for Avx2 {
        const QUERIES: usize = 6;
        const SUMS: usize = 6;
        const FUSED: bool = true;

        functions! { "avx2,fma,f16c":
            fn splat(value: f32) -> Avx2 { Avx2([_mm256_set1_ps(value); 2]) }
            fn load_f32(from: *const f32) -> Avx2 {
                // SAFETY: as the caller vouches.
                Avx2(unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] })
            }
            fn load_f16(from: *const f16) -> Avx2 {
                // SAFETY: as the caller vouches.
                let halves = unsafe { [_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast())] };
                Avx2([_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])])
            }
            fn load_bf16(from: *const bf16) -> Avx2 {
                // SAFETY: as the caller vouches.
                let halves = unsafe { [_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast())] };
                let wide = [_mm256_cvtepu16_epi32(halves[0]), _mm256_cvtepu16_epi32(halves[1])];
                Avx2([
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide[0])),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide[1])),
                ])
            }
            fn load_e4m3(from: *const E4m3) -> Avx2 {
                // SAFETY: as the caller vouches.
                let halves = unsafe { small_halves(from) };
                let (low, high) = (_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
                Avx2([_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)])
            }
            fn mul(a: Avx2, b: Avx2) -> Avx2 {
                Avx2([_mm256_mul_ps(a.0[0], b.0[0]), _mm256_mul_ps(a.0[1], b.0[1])])
            }
            fn mul_add(a: Avx2, b: Avx2, c: Avx2) -> Avx2 {
                Avx2([_mm256_fmadd_ps(a.0[0], b.0[0], c.0[0]), _mm256_fmadd_ps(a.0[1], b.0[1], c.0[1])])
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as the caller vouches.
            unsafe {
                _mm256_storeu_ps(to, self.0[0]);
                _mm256_storeu_ps(to.add(8), self.0[1]);
            }
        }
    }
}
