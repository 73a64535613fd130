//! Two vectors as one, so that what is broadcast once is multiplied twice.

use std::marker::PhantomData;

use super::Simd;

/// Twice the lanes of `S`.
#[derive(Clone, Copy)]
pub(in crate::matmul) struct Pair<S>(PhantomData<S>);

macro_rules! both {
    ($(fn $name:ident $(<const $n:ident: $t:ty>)? ($($arg:ident: $at:ident),*) $(-> $ret:ident)?;)*) => {$(
        #[inline(always)]
        unsafe fn $name $(<const $n: $t>)? ($($arg: both!(@type $at)),*) $(-> both!(@type $ret))? {
            // SAFETY: as the caller vouches.
            unsafe { [S::$name $(::<$n>)? ($(both!(@half $at $arg 0)),*), S::$name $(::<$n>)? ($(both!(@half $at $arg 1)),*)] }
        }
    )*};
    (@type i32) => { i32 };
    (@type f32) => { f32 };
    (@type bool) => { bool };
    (@type $other:ident) => { [S::$other; 2] };
    (@half i32 $arg:ident $half:literal) => { $arg };
    (@half f32 $arg:ident $half:literal) => { $arg };
    (@half bool $arg:ident $half:literal) => { $arg };
    (@half $other:ident $arg:ident $half:literal) => { $arg[$half] };
}

impl<S: Simd> Simd for Pair<S> {
    const LANES: usize = 2 * S::LANES;
    const TOKENS: usize = S::TOKENS;
    const CROWDED: usize = 3;
    const ASKS_AHEAD: bool = S::ASKS_AHEAD;
    type Int = [S::Int; 2];
    type Float = [S::Float; 2];
    type Partial = [S::Partial; 2];
    const QUADS: [usize; 9] = S::QUADS;
    const CENTRED: bool = S::CENTRED;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::Int {
        // SAFETY: the caller vouches for twice the bytes that a half reads.
        unsafe { [S::load(from), S::load(from.add(4 * S::LANES))] }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Int {
        // SAFETY: as for `load`.
        unsafe { [S::load_i8(from), S::load_i8(from.add(S::LANES))] }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::Float {
        // SAFETY: as for `load`.
        unsafe { [S::load_f16(from), S::load_f16(from.add(2 * S::LANES))] }
    }

    #[inline(always)]
    unsafe fn store(value: Self::Float, to: *mut f32) {
        // SAFETY: the caller vouches for twice the f32 that a half writes.
        unsafe {
            S::store(value[0], to);
            S::store(value[1], to.add(S::LANES));
        }
    }

    both! {
        fn splat(value: i32) -> Int;
        fn add(a: Int, b: Int) -> Int;
        fn sub(a: Int, b: Int) -> Int;
        fn and(a: Int, b: Int) -> Int;
        fn or(a: Int, b: Int) -> Int;
        fn shl<const BITS: u32>(a: Int) -> Int;
        fn shr<const BITS: u32>(a: Int) -> Int;
        fn none() -> Partial;
        fn dot(sums: Partial, codes: Int, quad: i32, wide: bool) -> Partial;
        fn dot_words(sums: Int, codes: Int, pair: i32) -> Int;
        fn fold(sums: Int, partial: Partial, wide: bool) -> Int;
        fn to_float(a: Int) -> Float;
        fn as_float(a: Int) -> Float;
        fn splat_float(value: f32) -> Float;
        fn add_float(a: Float, b: Float) -> Float;
        fn mul(a: Float, b: Float) -> Float;
        fn mul_add(a: Float, b: Float, c: Float) -> Float;
    }
}
