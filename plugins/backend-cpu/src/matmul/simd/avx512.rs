//! AVX-512 with VNNI: sixteen rows a vector, four products a lane and instruction.

use std::arch::x86_64::*;

use super::Simd;

#[derive(Clone, Copy)]
pub(in crate::matmul) struct Avx512;

macro_rules! op {
    ($(fn $name:ident $(<const $n:ident: $t:ty>)? ($($arg:ident: $at:ty),*) $(-> $ret:ty)? { $body:expr })*) => {$(
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
        unsafe fn $name $(<const $n: $t>)? ($($arg: $at),*) $(-> $ret)? {
            $body
        }
    )*};
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    const TOKENS: usize = 8;
    const CROWDED: usize = 9;
    const ASKS_AHEAD: bool = false;
    type Int = __m512i;
    type Float = __m512;
    type Partial = __m512i;
    const QUADS: [usize; 9] = [8; 9];
    const CENTRED: bool = false;

    op! {
        // SAFETY: the caller vouches for 64 readable bytes.
        fn load(from: *const u8) -> __m512i { unsafe { _mm512_loadu_si512(from.cast()) } }
        // SAFETY: the caller vouches for 16 readable bytes.
        fn load_i8(from: *const u8) -> __m512i { _mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(from.cast()) }) }
        fn splat(value: i32) -> __m512i { _mm512_set1_epi32(value) }
        fn add(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        fn sub(a: __m512i, b: __m512i) -> __m512i { _mm512_sub_epi32(a, b) }
        fn and(a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        fn or(a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        fn shl<const BITS: u32>(a: __m512i) -> __m512i { _mm512_slli_epi32::<BITS>(a) }
        fn shr<const BITS: u32>(a: __m512i) -> __m512i { _mm512_srli_epi32::<BITS>(a) }
        fn none() -> __m512i { _mm512_setzero_si512() }
        fn dot(sums: __m512i, codes: __m512i, quad: i32, _wide: bool) -> __m512i {
            _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(quad))
        }
        fn dot_words(sums: __m512i, codes: __m512i, pair: i32) -> __m512i {
            _mm512_dpwssd_epi32(sums, codes, _mm512_set1_epi32(pair))
        }
        fn fold(sums: __m512i, partial: __m512i, _wide: bool) -> __m512i { _mm512_add_epi32(sums, partial) }
        fn to_float(a: __m512i) -> __m512 { _mm512_cvtepi32_ps(a) }
        fn as_float(a: __m512i) -> __m512 { _mm512_castsi512_ps(a) }
        // SAFETY: the caller vouches for 32 readable bytes.
        fn load_f16(from: *const u8) -> __m512 { _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) }) }
        fn splat_float(value: f32) -> __m512 { _mm512_set1_ps(value) }
        fn add_float(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        // SAFETY: the caller vouches for 16 writable f32.
        fn store(value: __m512, to: *mut f32) { unsafe { _mm512_storeu_ps(to, value) } }
    }
}
