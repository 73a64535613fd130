//! What is in the tensors: scales that aren't numbers are found, and quantizing does what it says.

use half::{bf16, f16};
use setu_core::DType;
use setu_engine::checkpoint::quantize::quantize;
use setu_engine::checkpoint::{Tensor, scan_all, scan_scales};
use setu_testkit::blocks::{decode, random};
use setu_testkit::rng::Rng;

fn tensor<'a>(name: &'a str, dtype: DType, shape: &'a [usize], data: &'a [u8]) -> Tensor<'a> {
    Tensor { name, dtype, shape, data }
}

/// Where a block keeps its half-precision scale, and its minimum.
fn scales(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
        DType::Q2K => &[80, 82],
        DType::Q3K => &[108],
        DType::Q6K => &[208],
        _ => &[],
    }
}

#[test]
fn every_scale_that_is_no_number_is_found() {
    let mut rng = Rng::new(1);
    for dtype in DType::ALL {
        let blocks = 1200;
        let shape = [blocks * dtype.block_len()];
        let clean = random(dtype, shape[0], 0.5, &mut rng);
        scan_scales(&tensor("t", dtype, &shape, &clean)).unwrap();

        let width = if dtype == DType::F32 { 4 } else { 2 };
        let places = if dtype.is_float() { &[0][..] } else { scales(dtype) };
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for block in [0, 255, 256, 700, blocks - 1] {
                for place in places {
                    let bytes = match dtype {
                        DType::F32 => value.to_le_bytes().to_vec(),
                        DType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
                        _ => f16::from_f32(value).to_le_bytes().to_vec(),
                    };
                    let mut data = clean.clone();
                    let at = block * dtype.block_bytes() + place;
                    data[at..at + width].copy_from_slice(&bytes);
                    let error = scan_scales(&tensor("t", dtype, &shape, &data)).expect_err(dtype.name());
                    let what = if dtype.is_float() { "value" } else { "scale" };
                    let unit = if dtype.is_float() { "element" } else { "block" };
                    assert_eq!(
                        error.message(),
                        format!(
                            "the tensor `t` ({dtype}) has a {what} that is no finite number, first in {unit} {block}: \
                             the file is damaged or was converted wrongly"
                        )
                    );
                }
            }
        }
    }
}

#[test]
fn the_largest_finite_scales_pass_and_quants_are_no_scales() {
    for dtype in DType::ALL {
        let mut block = vec![0xFF; dtype.block_bytes()];
        match dtype {
            DType::F32 => block.copy_from_slice(&f32::MAX.to_le_bytes()),
            DType::BF16 => block.copy_from_slice(&bf16::MAX.to_le_bytes()),
            DType::F16 => block.copy_from_slice(&f16::MIN.to_le_bytes()),
            _ => scales(dtype).iter().for_each(|&at| block[at..at + 2].copy_from_slice(&f16::MIN.to_le_bytes())),
        }
        scan_scales(&tensor("t", dtype, &[dtype.block_len()], &block)).unwrap();
    }
}

#[test]
fn scanning_on_threads_finds_the_first_of_all() {
    let len = 3 << 20;
    let mut big = vec![0; 4 * len];
    let small = vec![0xFF; 64];
    for at in [len - 1, 1_500_000, 1_400_000] {
        big[4 * at..4 * at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        for threads in [0, 1, 2, 7] {
            let shape = [len];
            let tensors = [tensor("big", DType::F32, &shape, &big), tensor("small", DType::F32, &[16], &small)];
            let error = scan_all(&tensors, threads).unwrap_err();
            assert!(error.message().starts_with("the tensor `big` (F32)"), "{error}");
            assert!(error.message().contains(&format!("first in element {at}:")), "{error}");
            let error = scan_all(&tensors[1..], threads).unwrap_err();
            assert!(error.message().starts_with("the tensor `small` (F32)"), "{error}");
        }
    }
    scan_all(&[], 4).unwrap();
}

/// Values between the extremes of each sub-block are off by at most half a step, and the scale's own
/// rounding adds to that: the root of the mean square error over that of the values, at most.
const NOISE: [(DType, f64); 13] = [
    (DType::F32, 0.0),
    (DType::F16, 3e-4),
    (DType::BF16, 2.3e-3),
    (DType::Q8_0, 6.0e-3),
    (DType::Q6K, 2.0e-2),
    (DType::Q5_1, 4.2e-2),
    (DType::Q5_0, 4.6e-2),
    (DType::Q5K, 4.4e-2),
    (DType::Q4_1, 8.6e-2),
    (DType::Q4_0, 9.4e-2),
    (DType::Q4K, 8.9e-2),
    (DType::Q3K, 0.18),
    (DType::Q2K, 0.36),
];

#[test]
fn quantizing_keeps_the_noise_of_each_format() {
    let mut rng = Rng::new(2);
    // Nearly normal, a tenth of the blocks all of one sign, some all zero.
    let values: Vec<f32> = (0..256 * 200)
        .map(|at| {
            let value = (0..6).map(|_| rng.centered()).sum::<f64>() as f32 * 0.02;
            match at / 256 % 20 {
                0 => 0.0,
                1 => value.abs() + 0.01,
                2 => -value.abs(),
                _ => value,
            }
        })
        .collect();
    for (dtype, allowed) in NOISE {
        let bytes = quantize(dtype, &values).unwrap();
        assert_eq!(bytes.len(), dtype.size_of(&[values.len()]).unwrap());
        scan_scales(&tensor("t", dtype, &[values.len()], &bytes)).unwrap();
        let decoded = decode(dtype, &bytes);
        let error: f64 = values.iter().zip(&decoded).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
        let power: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
        let noise = (error / power).sqrt();
        assert!(noise <= allowed && noise >= allowed * 0.6, "{dtype}: {noise:.2e}, expected about {allowed:.2e}");
    }
}

#[test]
fn each_level_is_the_nearest() {
    // Blocks whose scales come out as powers of two, so that the levels are known: whole numbers, with the
    // extremes there to fix the scale. Every value in between must come back as the nearest level.
    let cases: [(DType, f32, f32); 6] = [
        (DType::Q8_0, -127.0, 127.0),
        (DType::Q4_0, -8.0, 7.0),
        (DType::Q5_0, -16.0, 15.0),
        (DType::Q4_1, 2.0, 17.0),
        (DType::Q5_1, -40.0, -9.0),
        (DType::Q6K, -32.0, 31.0),
    ];
    let mut rng = Rng::new(3);
    for (dtype, low, high) in cases {
        for _ in 0..50 {
            let mut values: Vec<f32> = (0..dtype.block_len()).map(|_| low + (high - low) * rng.unit() as f32).collect();
            for sub in values.chunks_mut(16) {
                (sub[0], sub[1]) = (low, high);
            }
            let decoded = decode(dtype, &quantize(dtype, &values).unwrap());
            for (value, decoded) in values.iter().zip(decoded) {
                assert!(
                    decoded.fract() == 0.0 && (f64::from(*value) - decoded).abs() <= 0.5,
                    "{dtype}: {value} {decoded}"
                );
            }
        }
    }
}

#[test]
fn what_no_block_can_hold_is_refused() {
    for (dtype, values, expected) in [
        (DType::Q4_0, vec![0.0; 33], "33 values are no whole blocks of 32 (Q4_0)"),
        (DType::F32, vec![0.0, f32::NAN], "value 1 is NaN, which F32 can't hold"),
        (DType::Q2K, vec![f32::INFINITY; 256], "value 0 is inf, which Q2_K can't hold"),
        (DType::F16, vec![1e6], "F16 would need the number 1000000, which a half-precision float can't hold"),
        (DType::Q8_0, vec![1e9; 32], "Q8_0 would need the number 7874015.5, which a half-precision float can't hold"),
        (DType::Q6K, vec![1e12; 256], "Q6_K would need the number 244140620, which a half-precision float can't hold"),
    ] {
        assert_eq!(quantize(dtype, &values).unwrap_err().message(), expected);
    }
    for dtype in DType::ALL {
        assert!(decode(dtype, &quantize(dtype, &vec![0.0; 256]).unwrap()).iter().all(|value| *value == 0.0), "{dtype}");
        let tiny = quantize(dtype, &vec![1e-30; 256]).unwrap();
        assert!(decode(dtype, &tiny).iter().all(|value| value.abs() < 1e-7), "{dtype}");
    }
}
