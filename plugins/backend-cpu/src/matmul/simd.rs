//! The vector operations that kernels are written in, once for every instruction set.
//!
//! A lane is an output row, so no operation ever moves data across lanes: that is what keeps a result
//! independent of what is computed beside it.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod pair;
pub(super) mod portable;

/// A vector unit with `LANES` lanes of 32 bits.
///
/// # Safety
/// Every function needs the machine to have the instruction set of the implementing type; pointers must be
/// valid for the bytes that the function names, at any alignment.
pub(super) trait Simd: Copy {
    const LANES: usize;
    /// Most tokens whose sums fit in registers; 1, 2, 4 or 8.
    const TOKENS: usize;
    /// From how many tokens on their sums are kept in memory while a unit's products are added up, or the compiler
    /// keeps the codes there.
    const CROWDED: usize;
    /// Whether weights of less than sixteen bits are to be asked for in advance even where one token meets them.
    const ASKS_AHEAD: bool;
    /// `LANES` integers of 32 bits.
    type Int: Copy;
    /// `LANES` f32.
    type Float: Copy;
    /// Sums of products of a few quads.
    type Partial: Copy;
    /// How many quads of codes of so many bits a `Partial` has room for; a power of two.
    const QUADS: [usize; 9];
    /// Whether [`dot`](Simd::dot) counts wide codes from 128 instead of from 0.
    const CENTRED: bool;

    /// Reads `LANES` 32-bit words.
    unsafe fn load(from: *const u8) -> Self::Int;
    /// Reads `LANES` signed bytes.
    unsafe fn load_i8(from: *const u8) -> Self::Int;
    unsafe fn splat(value: i32) -> Self::Int;
    unsafe fn add(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn sub(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn and(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn or(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn shl<const BITS: u32>(a: Self::Int) -> Self::Int;
    /// Shifts zeros in.
    unsafe fn shr<const BITS: u32>(a: Self::Int) -> Self::Int;
    /// A partial sum of nothing.
    unsafe fn none() -> Self::Partial;
    /// Adds to each lane of `sums` the dot product of its four unsigned bytes in `codes` with the four
    /// signed bytes of `quad`, of which none is -128. `wide`, a constant, says that codes may exceed 127.
    unsafe fn dot(sums: Self::Partial, codes: Self::Int, quad: i32, wide: bool) -> Self::Partial;
    /// Adds to each lane of `sums` the dot product of its two signed halves in `codes` with those of `pair`.
    unsafe fn dot_words(sums: Self::Int, codes: Self::Int, pair: i32) -> Self::Int;
    /// `sums` and what was summed up in `partial`.
    unsafe fn fold(sums: Self::Int, partial: Self::Partial, wide: bool) -> Self::Int;

    unsafe fn to_float(a: Self::Int) -> Self::Float;
    /// The same bits as f32.
    unsafe fn as_float(a: Self::Int) -> Self::Float;
    /// Reads `LANES` f16.
    unsafe fn load_f16(from: *const u8) -> Self::Float;
    unsafe fn splat_float(value: f32) -> Self::Float;
    unsafe fn add_float(a: Self::Float, b: Self::Float) -> Self::Float;
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a × b + c`.
    unsafe fn mul_add(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// Writes `LANES` f32.
    unsafe fn store(value: Self::Float, to: *mut f32);
}
