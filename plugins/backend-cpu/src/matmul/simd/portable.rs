//! Plain Rust over arrays, for machines without a kernel of their own; the compiler vectorizes most of it.

use half::f16;

use super::Simd;

/// As many as the narrowest vector units have, which compilers turn arrays into.
const LANES: usize = 4;

#[derive(Clone, Copy)]
pub(in crate::matmul) struct Portable;

/// Loops, because the functions of arrays themselves aren't inlined at this length.
#[inline(always)]
fn zip<T: Copy>(mut a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> T) -> [T; LANES] {
    for (a, b) in a.iter_mut().zip(b) {
        *a = f(*a, b);
    }
    a
}

#[inline(always)]
fn map<T: Copy, U: Copy + Default>(from: [T; LANES], f: impl Fn(T) -> U) -> [U; LANES] {
    let mut to = [U::default(); LANES];
    for (to, from) in to.iter_mut().zip(from) {
        *to = f(from);
    }
    to
}

impl Simd for Portable {
    const LANES: usize = LANES;
    const TOKENS: usize = 1;
    const CROWDED: usize = 9;
    const ASKS_AHEAD: bool = false;
    type Int = [i32; LANES];
    type Float = [f32; LANES];
    type Partial = [i32; LANES];
    const QUADS: [usize; 9] = [8; 9];
    const CENTRED: bool = false;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::Int {
        // SAFETY: the caller vouches for 16 readable bytes.
        let words = unsafe { from.cast::<[[u8; 4]; LANES]>().read() };
        map(words, i32::from_le_bytes)
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Int {
        // SAFETY: the caller vouches for 4 readable bytes.
        let bytes = unsafe { from.cast::<[i8; LANES]>().read() };
        map(bytes, i32::from)
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
        map(a, |a| a << BITS)
    }

    #[inline(always)]
    unsafe fn shr<const BITS: u32>(a: Self::Int) -> Self::Int {
        map(a, |a| (a as u32 >> BITS) as i32)
    }

    #[inline(always)]
    unsafe fn none() -> Self::Partial {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn dot_words(sums: Self::Int, codes: Self::Int, pair: i32) -> Self::Int {
        let (low, high) = (i32::from(pair as i16), pair >> 16);
        zip(sums, codes, |sum, codes| {
            sum.wrapping_add(i32::from(codes as i16).wrapping_mul(low)).wrapping_add((codes >> 16).wrapping_mul(high))
        })
    }

    #[inline(always)]
    unsafe fn fold(sums: Self::Int, partial: Self::Partial, _wide: bool) -> Self::Int {
        zip(sums, partial, i32::wrapping_add)
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::Int, codes: Self::Int, quad: i32, _wide: bool) -> Self::Int {
        let quad = quad.to_le_bytes().map(|byte| i32::from(byte as i8));
        zip(sums, codes, |sum, codes| {
            let code = |byte: u32| codes >> (8 * byte) & 0xff;
            // No sum over a unit comes near 2^31.
            sum.wrapping_add(code(0) * quad[0] + code(1) * quad[1] + code(2) * quad[2] + code(3) * quad[3])
        })
    }

    #[inline(always)]
    unsafe fn to_float(a: Self::Int) -> Self::Float {
        map(a, |a| a as f32)
    }

    #[inline(always)]
    unsafe fn as_float(a: Self::Int) -> Self::Float {
        map(a, |a| f32::from_bits(a as u32))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::Float {
        // SAFETY: the caller vouches for 8 readable bytes.
        let words = unsafe { from.cast::<[[u8; 2]; LANES]>().read() };
        map(words, |word| f16::from_le_bytes(word).to_f32())
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
        zip(zip(a, b, |a, b| a * b), c, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn store(value: Self::Float, to: *mut f32) {
        // SAFETY: the caller vouches for 4 writable f32.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(value) }
    }
}
