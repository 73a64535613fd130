//! Every kernel against plain f64 sums, and every split of a product against the whole, bit for bit.

use half::{bf16, f16};
use setu_core::DType;

use super::*;

/// A small generator with a fixed start: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Evenly from −1 to 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Mostly small values, and now and then an outlier, like a model's activations.
    fn activation(&mut self) -> f32 {
        let x = self.unit() * self.unit();
        if self.next().is_multiple_of(50) { 40.0 * x } else { x }
    }

    /// Rows with random codes and sensible scales.
    fn weights(&mut self, dtype: DType, rows: usize, cols: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..rows * cols / dtype.block_len() {
            match dtype {
                DType::F32 => bytes.extend(self.unit().to_le_bytes()),
                DType::F16 => bytes.extend(f16::from_f32(self.unit()).to_le_bytes()),
                DType::BF16 => bytes.extend(bf16::from_f32(self.unit()).to_le_bytes()),
                _ => {
                    let start = bytes.len();
                    bytes.extend((0..dtype.block_bytes()).map(|_| self.next() as u8));
                    for at in floats(dtype) {
                        let scale = f16::from_f32(0.1 * self.unit());
                        bytes[start + at..start + at + 2].copy_from_slice(&scale.to_le_bytes());
                    }
                }
            }
        }
        bytes
    }
}

/// Where a block has its scale and min.
fn floats(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
        DType::Q2K => &[80, 82],
        DType::Q3K => &[108],
        DType::Q6K => &[208],
        _ => &[0],
    }
}

struct Case {
    dtype: DType,
    rows: usize,
    cols: usize,
    tokens: usize,
    raw: Vec<u8>,
    weights: Vec<f32>,
    x: Vec<f32>,
}

impl Case {
    fn new(random: &mut Random, dtype: DType, rows: usize, cols: usize, tokens: usize) -> Case {
        let raw = random.weights(dtype, rows, cols);
        let x = (0..tokens * cols).map(|_| random.activation()).collect();
        Case::of(dtype, [rows, cols, tokens], raw, x)
    }

    fn of(dtype: DType, [rows, cols, tokens]: [usize; 3], raw: Vec<u8>, x: Vec<f32>) -> Case {
        let mut weights = vec![0.0; rows * cols];
        let row_bytes = raw.len() / rows;
        for (row, out) in raw.chunks_exact(row_bytes).zip(weights.chunks_exact_mut(cols)) {
            dequantize_row(dtype, row, out).unwrap();
        }
        Case { dtype, rows, cols, tokens, raw, weights, x }
    }

    /// Checks every sum that a kernel takes against f64.
    fn check(&self, isa: Isa, precision: Precision) {
        let Case { dtype, rows, cols, tokens, .. } = *self;
        let (out, activations) = (self.run(isa, precision), self.activations(isa, precision));
        for token in 0..tokens {
            let prepared = activations.dequantize(token);
            for row in 0..rows {
                let (sum, size) = self.exact(precision, row, &prepared);
                let error = (f64::from(out[token * rows + row]) - sum).abs();
                // Sums of codes before the zero point or min is taken off can be larger than the terms.
                let largest = prepared.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
                let bound = 1e-6 * size + 1e-6 * f64::from(largest);
                assert!(error <= bound, "{isa} {dtype} {precision:?} {rows}×{cols}: {error} > {bound}");
            }
        }
    }

    fn pack(&self, precision: Precision) -> PackedMatrix {
        PackedMatrix::pack(PackedFormat::new(self.dtype, precision), self.cols, &[&self.raw]).unwrap()
    }

    fn activations(&self, isa: Isa, precision: Precision) -> Activations {
        let mut activations = Activations::new(precision, self.tokens, self.cols).unwrap();
        activations.quantize(isa, 0, &self.x);
        activations
    }

    fn run(&self, isa: Isa, precision: Precision) -> Vec<f32> {
        let kernel = Kernel::select(isa, self.dtype, precision).unwrap();
        let mut out = vec![f32::NAN; self.tokens * self.rows];
        kernel.multiply(&self.pack(precision), &self.activations(isa, precision), 0..self.tokens, &mut out);
        out
    }

    /// The f64 sum for `x`, one token's activations, and the sum of the terms' magnitudes.
    fn exact(&self, precision: Precision, row: usize, x: &[f32]) -> (f64, f64) {
        let mut weights = self.weights[row * self.cols..(row + 1) * self.cols].to_vec();
        if self.dtype.is_float() && precision == Precision::Int16 {
            weights.chunks_mut(32).for_each(round);
        }
        weights.iter().zip(x).fold((0.0, 0.0), |(sum, size), (&w, &x)| {
            let term = f64::from(w) * f64::from(x);
            (sum + term, size + term.abs())
        })
    }
}

/// Rounds weights to multiples of the power of two that the largest is just under 4,096 times as large as.
fn round(unit: &mut [f32]) {
    let largest = unit.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    let step = (largest.log2().floor() - 11.0).exp2();
    unit.iter_mut().filter(|_| largest > 0.0).for_each(|x| *x = (*x / step).round_ties_even() * step);
}

/// Formats with the precisions that they can be multiplied with.
fn kernels() -> impl Iterator<Item = (DType, Precision)> {
    DType::ALL.into_iter().flat_map(|dtype| {
        let precisions: &[Precision] = match dtype {
            DType::F32 => &[Precision::F32],
            DType::F16 | DType::BF16 => &[Precision::Int16, Precision::F32],
            _ => &[Precision::Int8, Precision::Int16, Precision::F32],
        };
        precisions.iter().map(move |&precision| (dtype, precision))
    })
}

const SHAPES: [(usize, usize, usize); 5] = [(1, 1, 1), (16, 2, 8), (37, 1, 13), (5, 3, 40), (48, 4, 3)];

#[test]
fn kernels_agree_with_f64_sums() {
    let mut random = Random(1);
    for isa in Isa::available() {
        for (dtype, precision) in kernels() {
            for (rows, blocks, tokens) in SHAPES {
                let cols = if dtype.is_float() { 31 * blocks + 1 } else { blocks * dtype.block_len() };
                Case::new(&mut random, dtype, rows, cols, tokens).check(isa, precision);
            }
        }
    }
}

/// Where codes and activations are all as large as they can be, sums that are too narrow overflow.
#[test]
fn the_largest_sums_are_exact() {
    let (rows, tokens) = (16, 8);
    for (dtype, precision) in kernels().filter(|(dtype, _)| !dtype.is_float()) {
        let cols = 2 * dtype.block_len();
        // Among them the codes -128, -1 and 127 of Q8_0.
        for codes in [0x00, 0x7f, 0x80, 0xff] {
            let mut block = vec![codes; dtype.block_bytes()];
            for &at in floats(dtype) {
                block[at..at + 2].copy_from_slice(&f16::from_f32(0.01).to_le_bytes());
            }
            let x = (0..tokens * cols).map(|at| if at / cols % 2 == 0 { 1.0 } else { -1.0 }).collect();
            let case = Case::of(dtype, [rows, cols, tokens], block.repeat(2 * rows), x);
            Isa::available().into_iter().for_each(|isa| case.check(isa, precision));
        }
    }
}

/// As large as integers of floats can be, in sums of one sign and of both; and weights at both ends of what BF16 holds.
#[test]
fn floats_become_integers_that_fit() {
    let (rows, cols, tokens) = (16, 64, 2);
    let x: Vec<f32> = (0..tokens * cols).map(|at| if at >= cols && at % 2 == 1 { -1.0 } else { 1.0 }).collect();
    for (dtype, largest) in
        [(DType::BF16, 0x3fff_u16), (DType::F16, 0x3fff), (DType::BF16, 0x5f7f), (DType::BF16, 0x1f7f)]
    {
        for sign in [0, 1 << 15] {
            let raw: Vec<u8> = (0..rows * cols).flat_map(|_| (largest | sign).to_le_bytes()).collect();
            let case = Case::of(dtype, [rows, cols, tokens], raw, x.clone());
            Isa::available().into_iter().for_each(|isa| case.check(isa, Precision::Int16));
        }
    }
    // Too small for a scale that is no subnormal number.
    let tiny: Vec<u8> = (0..rows * cols).flat_map(|_| 0x0420_u16.to_le_bytes()).collect();
    let case = Case::of(DType::BF16, [rows, cols, tokens], tiny, x);
    for isa in Isa::available() {
        assert!(case.run(isa, Precision::Int16).iter().all(|y| *y == 0.0), "{isa}");
    }
}

#[test]
fn activations_keep_their_precision() {
    let mut random = Random(2);
    let x: Vec<f32> = (0..3 * 96).map(|_| random.activation()).collect();
    for isa in Isa::available() {
        for (precision, steps) in
            [(Precision::Int8, 127.0), (Precision::Int16, 16383.0), (Precision::F32, f32::INFINITY)]
        {
            let mut activations = Activations::new(precision, 3, 96).unwrap();
            activations.quantize(isa, 0, &x);
            for (token, row) in x.chunks_exact(96).enumerate() {
                for (unit, prepared) in row.chunks_exact(32).zip(activations.dequantize(token).chunks_exact(32)) {
                    let largest = unit.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
                    for (x, y) in unit.iter().zip(prepared) {
                        assert!((x - y).abs() <= 0.5001 * largest / steps, "{isa} {precision:?}: {x} became {y}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_instruction_set_prepares_the_same_activations() {
    let mut random = Random(7);
    let mut x: Vec<f32> = (0..9 * 77).map(|_| random.activation()).collect();
    // Halfway between integers, zeros, and what is too small to have a scale.
    x[..32].iter_mut().enumerate().for_each(|(i, x)| *x = if i == 0 { 127.0 } else { i as f32 - 16.5 });
    x[77..77 + 32].fill(0.0);
    x[2 * 77..2 * 77 + 32].fill(1e-35);
    for precision in [Precision::Int8, Precision::Int16] {
        let prepared = |isa| {
            let mut activations = Activations::new(precision, 9, 77).unwrap();
            activations.quantize(isa, 0, &x);
            activations.bytes().to_vec()
        };
        let expected = prepared(Isa::PORTABLE);
        for isa in Isa::available() {
            assert!(prepared(isa) == expected, "{isa} {precision:?}");
        }
    }
}

#[test]
fn splits_change_no_bit() {
    let mut random = Random(3);
    for isa in Isa::available() {
        for (dtype, precision) in kernels() {
            let cols = if dtype.is_float() { 70 } else { 2 * dtype.block_len() };
            let case = Case::new(&mut random, dtype, 53, cols, 37);
            let whole = case.run(isa, precision);
            let (weights, activations) = (case.pack(precision), case.activations(isa, precision));
            let kernel = Kernel::select(isa, dtype, precision).unwrap();
            for (token_step, block_step) in [(1, 4), (2, 1), (3, 3), (5, 2), (8, 4), (13, 1), (37, 1)] {
                let mut out = vec![f32::NAN; whole.len()];
                let output = Output::new(&mut out, case.rows);
                for token in (0..case.tokens).step_by(token_step) {
                    for block in (0..weights.row_blocks()).step_by(block_step) {
                        let tokens = token..case.tokens.min(token + token_step);
                        let blocks = block..weights.row_blocks().min(block + block_step);
                        // SAFETY: one thread; `activations` isn't written.
                        unsafe { kernel.run(&weights, &activations, tokens, blocks, output) };
                    }
                }
                assert!(same_bits(&out, &whole), "{isa} {dtype} {precision:?}: by {token_step}, {block_step}");
            }
            // Each token alone, wherever in a tile it was.
            for (token, expected) in whole.chunks_exact(case.rows).enumerate() {
                let mut alone = Activations::new(precision, 1, cols).unwrap();
                alone.quantize(isa, 0, &case.x[token * cols..(token + 1) * cols]);
                let mut out = vec![f32::NAN; case.rows];
                kernel.multiply(&weights, &alone, 0..1, &mut out);
                assert!(same_bits(&out, expected), "{isa} {dtype} {precision:?}: token {token} alone");
            }
        }
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn parts_of_a_row_may_be_prepared_apart() {
    let mut random = Random(4);
    let x: Vec<f32> = (0..80).map(|_| random.activation()).collect();
    for isa in Isa::available() {
        for precision in [Precision::Int8, Precision::Int16, Precision::F32] {
            let mut whole = Activations::new(precision, 1, 80).unwrap();
            whole.quantize(isa, 0, &x);
            let parts = Activations::new(precision, 1, 80).unwrap();
            for (first, end) in [(64, 80), (0, 64)] {
                // SAFETY: one thread.
                unsafe { parts.quantize_shared(isa, 0, first, &x[first..end]) };
            }
            assert!(same_bits(&whole.dequantize(0), &parts.dequantize(0)), "{isa} {precision:?}");
        }
    }
}

#[test]
fn parts_of_a_matrix_are_stacked() {
    let mut random = Random(5);
    let case = Case::new(&mut random, DType::Q4_1, 40, 64, 2);
    let row_bytes = case.raw.len() / 40;
    let parts = [&case.raw[..3 * row_bytes], &case.raw[3 * row_bytes..20 * row_bytes], &case.raw[20 * row_bytes..]];
    let stacked = PackedMatrix::pack(PackedFormat::new(DType::Q4_1, Precision::Int8), 64, &parts).unwrap();
    let kernel = Kernel::select(Isa::best(), DType::Q4_1, Precision::Int8).unwrap();
    let mut out = vec![0.0; 80];
    kernel.multiply(&stacked, &case.activations(Isa::best(), Precision::Int8), 0..2, &mut out);
    assert!(same_bits(&out, &case.run(Isa::best(), Precision::Int8)));
}

#[test]
fn non_finite_numbers_stay_in_their_rows() {
    let mut random = Random(6);
    for isa in Isa::available() {
        for (dtype, precision) in kernels() {
            let cols = 2 * dtype.block_len().max(32);
            let mut case = Case::new(&mut random, dtype, 20, cols, 3);
            for bad in [f32::NAN, f32::INFINITY] {
                case.x[cols + 5] = bad;
                let out = case.run(isa, precision);
                for (i, y) in out.iter().enumerate() {
                    assert_eq!(y.is_finite(), i / case.rows != 1, "{isa} {dtype} {precision:?}: {bad} gave {y} at {i}");
                }
            }
            // All bits set: NaN scales and elements.
            let row_bytes = case.raw.len() / case.rows;
            case.raw[3 * row_bytes..4 * row_bytes].fill(0xff);
            case.x[cols + 5] = 0.0;
            for (i, y) in case.run(isa, precision).iter().enumerate() {
                assert_eq!(y.is_nan(), i % case.rows == 3, "{isa} {dtype} {precision:?}: {y} at {i}");
            }
        }
    }
}

#[test]
fn misfits_are_refused() {
    let refused = [
        (DType::Q4_1, 48, 30, "rows of 48 columns cannot be stored in Q4_1"),
        (DType::Q4_1, 64, 41, "no whole number of rows"),
        (DType::Q6K, 32, 210, "rows of 32 columns cannot be stored in Q6_K"),
        (DType::F32, 0, 0, "rows of 0 columns"),
    ];
    for (dtype, cols, bytes, message) in refused {
        let format = PackedFormat::new(dtype, Precision::F32);
        let error = PackedMatrix::pack(format, cols, &[&vec![0; bytes]]).unwrap_err();
        assert!(error.message().contains(message), "{error}");
    }
    let error = dequantize_row(DType::Q8_0, &[0; 33], &mut [0.0; 32]).unwrap_err();
    assert!(error.message().contains("cannot be 33 bytes long"), "{error}");
    for (dtype, precision) in
        [(DType::BF16, Precision::Int8), (DType::F32, Precision::Int8), (DType::F32, Precision::Int16)]
    {
        assert!(Kernel::select(Isa::best(), dtype, precision).is_err());
    }
    assert!(Isa::named("mmx").unwrap_err().message().contains("portable"));
    assert!(PackedMatrix::zeroed(PackedFormat::new(DType::F32, Precision::F32), usize::MAX, 64).is_err());
    assert!(PackedMatrix::zeroed(PackedFormat::new(DType::Q4K, Precision::Int8), 16, 128).is_err());
}

#[test]
fn dequantizing_agrees_with_the_python_package_gguf() {
    // One block of `(7 i² + 31 i + 11) mod 251` with scale 0.5 and min 0.25; its first, second and last element,
    // the sum, and sums weighted by `i mod 7 + 1` and `i mod 31`, from gguf 0.19's `dequantize`.
    let cases: [(DType, &[usize], [f64; 6]); 10] = [
        (DType::Q4_0, &[0], [-1.5, -0.5, -2.5, -16.0, -5.5, -290.0]),
        (DType::Q4_1, &[0, 2], [3.75, 5.25, 3.75, 119.0, 451.0, 1566.75]),
        (DType::Q5_0, &[0], [3.0, -5.5, -1.0, 18.0, 12.5, 295.0]),
        (DType::Q5_1, &[0, 2], [14.75, 12.25, 5.25, 260.0, 994.0, 3409.75]),
        (DType::Q8_0, &[0], [50.5, -44.5, 61.5, 84.5, 631.0, -2347.0]),
        (DType::Q2K, &[80, 82], [0.0, 16.5, 16.0, 941.0, 3775.75, 13106.75]),
        (DType::Q3K, &[108], [-13.5, -13.5, 4.5, -455.5, -2984.0, -10428.0]),
        (DType::Q4K, &[0, 2], [216.75, 79.25, 190.0, 29499.0, 117326.25, 438436.25]),
        (DType::Q5K, &[0, 2], [244.25, 821.75, 136.0, 62344.0, 254011.75, 878080.75]),
        (DType::Q6K, &[208], [-621.0, 345.0, 1260.0, 4519.5, 45307.5, 109909.5]),
    ];
    for (dtype, halves, expected) in cases {
        let mut block: Vec<u8> = (0..dtype.block_bytes()).map(|i| ((7 * i * i + 31 * i + 11) % 251) as u8).collect();
        for (&at, value) in halves.iter().zip([0.5, 0.25]) {
            block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
        }
        let mut out = vec![0.0; dtype.block_len()];
        dequantize_row(dtype, &block, &mut out).unwrap();
        let sum = |weight: fn(usize) -> usize| -> f64 {
            out.iter().enumerate().map(|(i, &x)| f64::from(x) * weight(i) as f64).sum()
        };
        let [first, second, last] = [out[0], out[1], out[out.len() - 1]].map(f64::from);
        assert_eq!([first, second, last, sum(|_| 1), sum(|i| i % 7 + 1), sum(|i| i % 31)], expected, "{dtype}");
    }
}
