//! Products and what prepares their inputs, on one thread, beside the innermost instructions with nothing else to do.
//!
//! ```sh
//! cargo bench -p setu-backend-cpu --bench kernels -- [FORMAT…]
//! ```
//!
//! Figures are billions of multiply-adds in a second, by number of tokens: with weights that lie in the caches, and with
//! weights that come from memory.

use std::hint::black_box;
use std::time::{Duration, Instant};

use setu_backend_cpu::CpuConfig;
use setu_backend_cpu::ceilings::Ceilings;
use setu_backend_cpu::matmul::{Activations, Isa, Kernel, PackedFormat, PackedMatrix, Precision};
use setu_core::config::Config;
use setu_core::{DType, Result};

const SHAPES: [(usize, usize); 2] = [(1536, 576), (576, 1536)];
const TOKENS: [usize; 4] = [1, 8, 32, 256];
const ROUNDS: usize = 9;
/// More than the last cache holds.
const MANY_BYTES: usize = 96 << 20;
const AT_LEAST: Duration = Duration::from_millis(20);

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let isa = Isa::best();
    println!("{isa}, one thread, {} rounds\n", ROUNDS);
    let mut config = CpuConfig::from_table(&Default::default())?;
    config.threads = 1;
    let mut ceilings = Ceilings::new(&config)?;
    for precision in [Precision::Int8, Precision::Int16] {
        if let Some(peak) = ceilings.peak(precision) {
            println!("{precision:?}: {:.1} multiply-adds a nanosecond at most", peak / 2e9);
        }
        for cols in [576, 1536] {
            let row: Vec<f32> = (0..cols).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut inputs = Activations::new(precision, 32, cols)?;
            let seconds = best(|| (0..32).for_each(|token| inputs.quantize(isa, token, &row)));
            println!(
                "{precision:?}: {cols} columns prepared at {:.2} a nanosecond",
                32.0 * cols as f64 / seconds / 1e9
            );
        }
    }
    let tokens = TOKENS.map(|tokens| format!("{tokens:>6}")).join(" ");
    println!("\n{:<6} {:<6} {:<11} {tokens}   from memory{tokens}", "", "", "rows×cols");
    for dtype in DType::ALL.into_iter().filter(|dtype| wanted.is_empty() || wanted.contains(&dtype.to_string())) {
        for precision in [Precision::Int8, Precision::Int16, Precision::F32] {
            for (rows, cols) in SHAPES {
                measure(isa, dtype, precision, rows, cols)?;
            }
        }
    }
    Ok(())
}

fn measure(isa: Isa, dtype: DType, precision: Precision, rows: usize, cols: usize) -> Result<()> {
    let Ok(kernel) = Kernel::select(isa, dtype, precision) else { return Ok(()) };
    let Some(bytes) = dtype.size_of(&[rows, cols]) else { return Ok(()) };
    if !cols.is_multiple_of(dtype.block_len()) {
        return Ok(());
    }
    // Whatever the codes are, the work is the same.
    let raw: Vec<u8> = (0..bytes).map(|i| (i * 37 % 61) as u8).collect();
    let pack = || PackedMatrix::pack(PackedFormat::new(dtype, precision), cols, &[&raw]);
    let mut weights = vec![pack()?];
    let mut figures = String::new();
    for many in [false, true] {
        if many {
            figures += "              ";
            while weights.len() * weights[0].byte_len() < MANY_BYTES {
                weights.push(pack()?);
            }
        }
        let mut next = 0;
        for tokens in TOKENS {
            let mut inputs = Activations::new(precision, tokens, cols)?;
            inputs.quantize(isa, 0, &vec![0.5; tokens * cols]);
            let mut out = vec![0.0; tokens * rows];
            let seconds = best(|| {
                kernel.multiply(&weights[next], &inputs, 0..tokens, black_box(&mut out));
                next = (next + 1) % weights.len();
            });
            figures += &format!(" {:>6.1}", (tokens * rows * cols) as f64 / seconds / 1e9);
        }
    }
    println!("{:<6} {:<6} {:<11}{figures}", dtype.to_string(), format!("{precision:?}"), format!("{rows}×{cols}"));
    Ok(())
}

/// Seconds of one call: the best round, since others only ever make one slower.
fn best(mut call: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let (mut calls, start) = (0, Instant::now());
        while start.elapsed() < AT_LEAST {
            call();
            calls += 1;
        }
        best = best.min(start.elapsed().as_secs_f64() / f64::from(calls));
    }
    best
}
