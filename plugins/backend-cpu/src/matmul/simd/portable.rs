//! Plain Rust over arrays, for machines without a kernel of their own; the compiler vectorizes most of it.

use half::f16;

use super::Simd;

const LANES: usize = 16;

#[derive(Clone, Copy)]
pub(in crate::matmul) struct Portable;

#[inline(always)]
fn zip<T: Copy>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> T) -> [T; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    const LANES: usize = LANES;
    const TOKENS: usize = 1;
    type Int = [i32; LANES];
    type Float = [f32; LANES];

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::Int {
        // SAFETY: the caller vouches for 64 readable bytes.
        let words = unsafe { from.cast::<[[u8; 4]; LANES]>().read() };
        words.map(i32::from_le_bytes)
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Int {
        // SAFETY: the caller vouches for 16 readable bytes.
        let bytes = unsafe { from.cast::<[i8; LANES]>().read() };
        bytes.map(i32::from)
    }

    #[inline(always)]
    unsafe fn splat(value: i32) -> Self::Int {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn add(a: Self::Int, b: Self::Int) -> Self::Int {
        zip(a, b, i32::wrapping_add)
    }

    #[inline(always)]
    unsafe fn sub(a: Self::Int, b: Self::Int) -> Self::Int {
        zip(a, b, i32::wrapping_sub)
    }

    #[inline(always)]
    unsafe fn and(a: Self::Int, b: Self::Int) -> Self::Int {
        zip(a, b, |a, b| a & b)
    }

    #[inline(always)]
    unsafe fn or(a: Self::Int, b: Self::Int) -> Self::Int {
        zip(a, b, |a, b| a | b)
    }

    #[inline(always)]
    unsafe fn shl<const BITS: u32>(a: Self::Int) -> Self::Int {
        a.map(|a| a << BITS)
    }

    #[inline(always)]
    unsafe fn shr<const BITS: u32>(a: Self::Int) -> Self::Int {
        a.map(|a| (a as u32 >> BITS) as i32)
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::Int, codes: Self::Int, quad: i32, _wide: bool) -> Self::Int {
        let quad = quad.to_le_bytes().map(|byte| i32::from(byte as i8));
        zip(sums, codes, |sum, codes| {
            let codes = codes.to_le_bytes().map(i32::from);
            // No sum of a unit comes near 2^31.
            sum.wrapping_add(codes[0] * quad[0] + codes[1] * quad[1] + codes[2] * quad[2] + codes[3] * quad[3])
        })
    }

    #[inline(always)]
    unsafe fn to_float(a: Self::Int) -> Self::Float {
        a.map(|a| a as f32)
    }

    #[inline(always)]
    unsafe fn as_float(a: Self::Int) -> Self::Float {
        a.map(|a| f32::from_bits(a as u32))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::Float {
        // SAFETY: the caller vouches for 32 readable bytes.
        let words = unsafe { from.cast::<[[u8; 2]; LANES]>().read() };
        words.map(|word| f16::from_le_bytes(word).to_f32())
    }

    #[inline(always)]
    unsafe fn splat_float(value: f32) -> Self::Float {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn add_float(a: Self::Float, b: Self::Float) -> Self::Float {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float {
        zip(a, b, |a, b| a * b)
    }

    /// Rounds twice: `f32::mul_add` is a library call where the instruction is missing.
    #[inline(always)]
    unsafe fn mul_add(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn store(value: Self::Float, to: *mut f32) {
        // SAFETY: the caller vouches for 16 writable f32.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(value) }
    }
}
