//! AVX2: eight rows a vector, with and without the VNNI instructions of newer desktop processors.

use std::arch::asm;
use std::arch::x86_64::*;

use super::Simd;

#[derive(Clone, Copy)]
pub(in crate::matmul) struct Avx2;

#[derive(Clone, Copy)]
pub(in crate::matmul) struct Avx2Vnni;

/// A sum that is added up in the order in which the program says. Left to itself, the compiler takes sums of integers
/// apart token by token, and with it keeps a whole unit's codes in memory.
#[inline]
#[target_feature(enable = "avx2")]
fn in_order(mut sum: __m256i) -> __m256i {
    // SAFETY: there is no instruction in it.
    unsafe { asm!("/* {0} */", inout(ymm_reg) sum, options(nomem, nostack, preserves_flags)) };
    sum
}

macro_rules! op {
    ($features:literal $(fn $name:ident $(<const $n:ident: $t:ty>)? ($($arg:ident: $at:ty),*) $(-> $ret:ty)? { $body:expr })*) => {$(
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $name $(<const $n: $t>)? ($($arg: $at),*) $(-> $ret)? {
            $body
        }
    )*};
}

macro_rules! common {
    ($features:literal) => {
        const LANES: usize = 8;
        const TOKENS: usize = 4;
        const CROWDED: usize = 9;
        const ASKS_AHEAD: bool = true;
        type Int = __m256i;
        type Float = __m256;
        type Partial = __m256i;

        op! { $features
            // SAFETY: the caller vouches for 32 readable bytes.
            fn load(from: *const u8) -> __m256i { unsafe { _mm256_loadu_si256(from.cast()) } }
            // SAFETY: the caller vouches for 8 readable bytes.
            fn load_i8(from: *const u8) -> __m256i { _mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(from.cast()) }) }
            fn splat(value: i32) -> __m256i { _mm256_set1_epi32(value) }
            fn none() -> __m256i { _mm256_setzero_si256() }
            fn add(a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi32(a, b) }
            fn sub(a: __m256i, b: __m256i) -> __m256i { _mm256_sub_epi32(a, b) }
            fn and(a: __m256i, b: __m256i) -> __m256i { _mm256_and_si256(a, b) }
            fn or(a: __m256i, b: __m256i) -> __m256i { _mm256_or_si256(a, b) }
            fn shl<const BITS: u32>(a: __m256i) -> __m256i { _mm256_sll_epi32(a, _mm_cvtsi32_si128(BITS as i32)) }
            fn shr<const BITS: u32>(a: __m256i) -> __m256i { _mm256_srl_epi32(a, _mm_cvtsi32_si128(BITS as i32)) }
            fn to_float(a: __m256i) -> __m256 { _mm256_cvtepi32_ps(a) }
            fn as_float(a: __m256i) -> __m256 { _mm256_castsi256_ps(a) }
            // SAFETY: the caller vouches for 16 readable bytes.
            fn load_f16(from: *const u8) -> __m256 { _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) }) }
            fn splat_float(value: f32) -> __m256 { _mm256_set1_ps(value) }
            fn add_float(a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
            fn mul(a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
            fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
            // SAFETY: the caller vouches for 8 writable f32.
            fn store(value: __m256, to: *mut f32) { unsafe { _mm256_storeu_ps(to, value) } }
        }
    };
}

impl Simd for Avx2 {
    common!("avx2,fma,f16c");
    // Sixteen bits hold the sums of two products each: 2 × 15 × 127 × 8 of codes of four bits, say.
    const QUADS: [usize; 9] = [8, 8, 8, 8, 8, 4, 2, 1, 8];
    const CENTRED: bool = true;
    op! { "avx2,fma,f16c"
        fn dot(sums: __m256i, codes: __m256i, quad: i32, wide: bool) -> __m256i {
            if wide {
                // 255 × 127 twice overflows sixteen bits; 128 × 127 twice doesn't.
                let codes = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(_mm256_set1_epi32(quad), codes));
                in_order(_mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))))
            } else {
                in_order(_mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(quad))))
            }
        }
        fn dot_words(sums: __m256i, codes: __m256i, pair: i32) -> __m256i {
            in_order(_mm256_add_epi32(sums, _mm256_madd_epi16(codes, _mm256_set1_epi32(pair))))
        }
        fn fold(sums: __m256i, partial: __m256i, wide: bool) -> __m256i {
            _mm256_add_epi32(sums, if wide { partial } else { _mm256_madd_epi16(partial, _mm256_set1_epi16(1)) })
        }
    }
}

impl Simd for Avx2Vnni {
    common!("avx2,fma,f16c,avxvnni");
    const QUADS: [usize; 9] = [8; 9];
    const CENTRED: bool = false;
    op! { "avx2,fma,f16c,avxvnni"
        fn dot(sums: __m256i, codes: __m256i, quad: i32, _wide: bool) -> __m256i {
            _mm256_dpbusd_avx_epi32(sums, codes, _mm256_set1_epi32(quad))
        }
        fn dot_words(sums: __m256i, codes: __m256i, pair: i32) -> __m256i {
            _mm256_dpwssd_avx_epi32(sums, codes, _mm256_set1_epi32(pair))
        }
        fn fold(sums: __m256i, partial: __m256i, _wide: bool) -> __m256i { _mm256_add_epi32(sums, partial) }
    }
}
