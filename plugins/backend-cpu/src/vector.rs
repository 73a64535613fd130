//! Elementwise arithmetic, written once and compiled for every instruction set.
//!
//! The bodies are plain loops over sixteen lanes that the compiler turns into vectors. They never contract a
//! product and a sum into one rounding, so all instruction sets give the same bits.

use crate::matmul::Isa;

/// Lanes that sums are taken in, whatever the machine's vectors hold.
pub const LANES: usize = 16;

/// Which instructions compiled loops may use: as an [`Isa`], proof that the machine has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vectors(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Vectors {
    pub fn of(isa: Isa) -> Vectors {
        Vectors(match isa.name() {
            #[cfg(target_arch = "x86_64")]
            "avx2" | "avx2-vnni" => Level::Avx2,
            #[cfg(target_arch = "x86_64")]
            "avx512" => Level::Avx512,
            _ => Level::Portable,
        })
    }

    pub(crate) fn level(self) -> Level {
        self.0
    }
}

/// Makes a function that takes [`Vectors`] first and runs the body compiled for them.
macro_rules! vectorized {
    ($($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$doc])*
        $vis fn $name(vectors: $crate::vector::Vectors, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

            match vectors.level() {
                $crate::vector::Level::Portable => body($($arg),*),
                // SAFETY: `Vectors` are made from what the machine was found to have.
                #[cfg(target_arch = "x86_64")]
                $crate::vector::Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::vector::Level::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    )*};
}
pub(crate) use vectorized;

/// `f` of each lane. Unlike the array's own `map`, it is always compiled into its caller, with the caller's
/// instructions.
#[inline(always)]
pub(crate) fn each(mut x: [f32; LANES], f: impl Fn(f32) -> f32) -> [f32; LANES] {
    for x in &mut x {
        *x = f(*x);
    }
    x
}

/// `f` of each lane of `a` and `b`.
#[inline(always)]
pub(crate) fn both(mut a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    for (a, &b) in a.iter_mut().zip(&b) {
        *a = f(*a, b);
    }
    a
}

/// Applies `f` to every element, sixteen at a time.
#[inline(always)]
pub(crate) fn map(values: &mut [f32], f: impl Fn([f32; LANES]) -> [f32; LANES]) {
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    for chunk in chunks {
        *chunk = f(*chunk);
    }
    if !rest.is_empty() {
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        rest.copy_from_slice(&f(last)[..rest.len()]);
    }
}

/// Sets every element of `a` to `f` of it and its partner in `b`.
#[inline(always)]
pub(crate) fn zip(a: &mut [f32], b: &[f32], f: impl Fn([f32; LANES], [f32; LANES]) -> [f32; LANES]) {
    let (a_chunks, a_rest) = a.as_chunks_mut::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter_mut().zip(b_chunks) {
        *a = f(*a, *b);
    }
    if !a_rest.is_empty() {
        let (mut last_a, mut last_b) = ([0.0; LANES], [0.0; LANES]);
        last_a[..a_rest.len()].copy_from_slice(a_rest);
        last_b[..b_rest.len()].copy_from_slice(b_rest);
        a_rest.copy_from_slice(&f(last_a, last_b)[..a_rest.len()]);
    }
}

/// The sum over `values` of `f`, in an order that depends on the length alone.
#[inline(always)]
pub(crate) fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += f(x);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f(x);
    }
    reduce(sums)
}

/// The sum of the lanes, pairwise.
#[inline(always)]
pub(crate) fn reduce(mut lanes: [f32; LANES]) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// ln 2 in two parts, of which the first has zeros at its end: small integers times it are exact.
const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// Added to a float of moderate size, 1.5 × 2^23 leaves it, rounded, in the low bits.
const ROUND: f32 = 12_582_912.0;

/// e^x to about 1e-7 of its value for x ≤ 0; 0 below the smallest normal number, NaN for NaN. `FUSED` says that the
/// machine multiplies and adds at once, and makes bits of results depend on it.
#[inline(always)]
pub(crate) fn exp_decay<const FUSED: bool>(x: [f32; LANES]) -> [f32; LANES] {
    let mul_add = |a: f32, b: f32, c: f32| if FUSED { a.mul_add(b, c) } else { a * b + c };
    each(x, |x| {
        let shifted = mul_add(x, std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = mul_add(n, -LN2[1], mul_add(n, -LN2[0], x));
        let p = TAYLOR.iter().fold(1.0 / 5040.0, |p, &c| mul_add(p, r, c));
        let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
        if x < -87.336_54 { 0.0 } else { p * power }
    })
}

/// Of e^x, behind the seventh power's; it suffices for |x| <= ln 2 / 2.
const TAYLOR: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// e^x to about 1e-7 of its value; 0 below the smallest normal number, infinite above the largest, NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: [f32; LANES]) -> [f32; LANES] {
    each(x, |x| {
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = x - n * LN2[0] - n * LN2[1];
        let p = TAYLOR.iter().fold(1.0 / 5040.0, |p, &c| p * r + c);
        let exponent = (shifted.to_bits() as i32).wrapping_sub(0x4b40_0000);
        // In two factors, for 2^128 isn't a number of this type though p × 2^128 may be.
        let half = exponent >> 1;
        let power = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
        let value = p * power(half) * power(exponent.wrapping_sub(half));
        let value = if x < -87.336_54 { 0.0 } else { value };
        if x > 88.722_83 { f32::INFINITY } else { value }
    })
}

#[inline(always)]
pub(crate) fn tanh(x: [f32; LANES]) -> [f32; LANES] {
    // Where the difference below would cancel, the series is exact enough.
    let e = exp(each(x, |x| 2.0 * x.abs()));
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        let far = (1.0 - 2.0 / (e[i] + 1.0)).copysign(x[i]);
        let square = x[i] * x[i];
        let near = x[i] * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))));
        out[i] = if x[i].abs() < 0.1 { near } else { far };
    }
    out
}

/// The error function to about 2e-7 (Abramowitz and Stegun, 7.1.26).
#[inline(always)]
pub(crate) fn erf(x: [f32; LANES]) -> [f32; LANES] {
    let e = exp(each(x, |x| -x * x));
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        let t = 1.0 / (1.0 + 0.327_591_1 * x[i].abs());
        let p = 1.061_405_4;
        let p = p * t - 1.453_152;
        let p = p * t + 1.421_413_8;
        let p = p * t - 0.284_496_74;
        let p = p * t + 0.254_829_6;
        out[i] = (1.0 - p * t * e[i]).copysign(x[i]);
    }
    out
}

vectorized! {
    /// a += b.
    pub fn add(a: &mut [f32], b: &[f32]) {
        zip(a, b, |a, b| both(a, b, |a, b| a + b));
    }

    /// a ×= b.
    pub fn mul(a: &mut [f32], b: &[f32]) {
        zip(a, b, |a, b| both(a, b, |a, b| a * b));
    }

    pub fn scale(values: &mut [f32], by: f32) {
        map(values, |x| each(x, |x| x * by));
    }

    /// a = a × a_weight + b × b_weight.
    pub fn mix(a: &mut [f32], a_weight: f32, b: &[f32], b_weight: f32) {
        zip(a, b, |a, b| both(a, b, |a, b| a * a_weight + b * b_weight));
    }

    /// cap · tanh(x / cap).
    pub fn softcap(values: &mut [f32], cap: f32) {
        map(values, |x| each(tanh(each(x, |x| x / cap)), |x| x * cap));
    }

    /// The highest value, or NaN if there is one; −∞ for none.
    pub fn highest(values: &[f32]) -> f32 {
        let (chunks, rest) = values.as_chunks::<LANES>();
        let mut highest = [f32::NEG_INFINITY; LANES];
        let mut nan = [0_u32; LANES];
        for chunk in chunks {
            for i in 0..LANES {
                highest[i] = if chunk[i] > highest[i] { chunk[i] } else { highest[i] };
                nan[i] |= u32::from(chunk[i].is_nan());
            }
        }
        let nan = nan.iter().any(|&nan| nan != 0) || rest.iter().any(|x| x.is_nan());
        let all = highest.iter().chain(rest).copied();
        if nan { f32::NAN } else { all.fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a }) }
    }

    /// The first place of `value`.
    pub fn find(values: &[f32], value: f32) -> Option<usize> {
        let (chunks, rest) = values.as_chunks::<LANES>();
        let start = chunks.iter().position(|chunk| {
            let mut found = 0_u32;
            for x in chunk {
                found |= u32::from(*x == value);
            }
            found != 0
        });
        let start = start.map_or(chunks.len(), |start| start) * LANES;
        let within = |values: &[f32]| values.iter().position(|x| *x == value);
        within(values.get(start..start + LANES).unwrap_or(rest)).map(|at| start + at)
    }

    /// exp(x − base) of each element.
    pub fn exponentials(values: &mut [f32], base: f32) {
        map(values, |x| exp(each(x, |x| x - base)));
    }

    /// The sum of exp(x − base), summed in f64.
    pub fn sum_exp(values: &[f32], base: f32) -> f64 {
        let mut total = [0.0_f64; LANES];
        let (chunks, rest) = values.as_chunks::<LANES>();
        for chunk in chunks {
            let e = exp(each(*chunk, |x| x - base));
            for i in 0..LANES {
                total[i] += f64::from(e[i]);
            }
        }
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let e = exp(each(last, |x| x - base));
        total.iter().zip(e).map(|(a, b)| a + f64::from(b)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Vectors> {
        Isa::available().into_iter().map(Vectors::of).collect()
    }

    #[test]
    fn functions_are_close_to_those_of_f64() {
        for step in -9000..9000 {
            let x = step as f32 * 0.01;
            let lanes = [x; LANES];
            let (e, exact) = (f64::from(exp(lanes)[0]), f64::from(x).exp());
            if (-87.3..88.7).contains(&x) {
                assert!((e - exact).abs() <= 3e-7 * exact, "exp({x}) is {e}, not {exact}");
            }
            if x <= 0.0 {
                for e in [exp_decay::<true>(lanes)[0], exp_decay::<false>(lanes)[0]].map(f64::from) {
                    assert!(
                        (e - exact).abs() <= 3e-7 * exact + f64::from(f32::MIN_POSITIVE),
                        "exp_decay({x}) is {e}, not {exact}"
                    );
                }
            }
            let (t, exact) = (f64::from(tanh(lanes)[0]), f64::from(x).tanh());
            assert!((t - exact).abs() <= 1e-6 * exact.abs(), "tanh({x}) is {t}, not {exact}");
        }
        for (x, expected) in [(0.0, 0.0), (0.5, 0.520_499_9), (1.0, 0.842_700_8), (-2.0, -0.995_322_3), (9.0, 1.0)] {
            assert!((erf([x; LANES])[0] - expected).abs() < 4e-7);
        }
    }

    #[test]
    fn functions_keep_to_their_limits() {
        let cases = [(f32::NEG_INFINITY, 0.0), (-1e9, 0.0), (0.0, 1.0), (1e9, f32::INFINITY)];
        for (x, expected) in cases {
            assert_eq!(exp([x; LANES])[0], expected, "exp({x})");
        }
        assert_eq!(exp_decay::<true>([f32::NEG_INFINITY; LANES])[0], 0.0);
        assert_eq!(exp_decay::<true>([-1e9; LANES])[0], 0.0);
        for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)] {
            assert!(exp([nan; LANES])[0].is_nan());
            assert!(exp_decay::<true>([nan; LANES])[0].is_nan() && exp_decay::<false>([nan; LANES])[0].is_nan());
        }
        assert!(tanh([f32::NAN; LANES])[0].is_nan());
        assert_eq!(tanh([1e9; LANES])[0], 1.0);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let values: Vec<f32> = (0..77).map(|i| (i as f32 * 0.77).sin() * 9.0).collect();
        let run = |vectors| {
            let mut a = values.clone();
            softcap(vectors, &mut a, 3.0);
            mul(vectors, &mut a, &values);
            (a, sum_exp(vectors, &values, 9.0).to_bits(), highest(vectors, &values).to_bits())
        };
        let expected = run(Vectors(Level::Portable));
        for vectors in all() {
            assert_eq!(run(vectors), expected, "{vectors:?}");
        }
    }

    #[test]
    fn the_highest_is_found_and_nan_too() {
        for vectors in all() {
            assert_eq!(highest(vectors, &[]), f32::NEG_INFINITY);
            let mut values = vec![-5.0; 40];
            values[37] = -1.0;
            assert_eq!(highest(vectors, &values), -1.0);
            for at in [0, 20, 39] {
                let mut values = values.clone();
                values[at] = f32::NAN;
                assert!(highest(vectors, &values).is_nan());
            }
        }
    }
}
