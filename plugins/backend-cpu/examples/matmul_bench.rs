//! Speed of the matrix products beside the machine's ceilings, measured in the same run.
//!
//! `cargo run --release -p setu-backend-cpu --example matmul_bench -- [formats=Q4_1,Q8_0] [precisions=Int8,Int16,F32]
//! [shapes=down,head] [tokens=1,32,512] [threads=1,2] [isa=avx512]`
//!
//! Each shape has copies beyond the size of caches, so that one token's product reads from memory as decode
//! does. Figures are those of the best pass, by the CPU time of its slowest thread, so that other processes disturb
//! them little: GB/s of packed weights, and GOP/s (a product and a sum are two).
//! `pack` is the speed of packing, in GB/s of the checkpoint's bytes, `quantize` that of preparing activations, in ns
//! a token, both on one thread.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

use setu_backend_cpu::ceilings::Ceilings;
use setu_backend_cpu::config::{self, CpuConfig, IsaChoice};
use setu_backend_cpu::matmul::{Activations, Isa, Kernel, Output, PackedFormat, PackedMatrix, Precision};
use setu_core::{DType, Result};

/// Name, rows and columns.
const SHAPES: [(&str, usize, usize); 9] = [
    ("135M qkv", 960, 576),
    ("135M o", 576, 576),
    ("135M gate+up", 3072, 576),
    ("135M down", 576, 1536),
    ("135M head", 49152, 576),
    ("1.1B qkv", 2560, 2048),
    ("1.1B o", 2048, 2048),
    ("1.1B gate+up", 11264, 2048),
    ("1.1B down", 2048, 5632),
];
/// Bytes of weights to go through in a pass with few tokens.
const WORKING_SET: usize = 160 << 20;

fn main() {
    let list = |name: &str, default: &str| -> Vec<String> {
        let given =
            std::env::args().find_map(|argument| Some(argument.strip_prefix(name)?.strip_prefix('=')?.to_owned()));
        given.as_deref().unwrap_or(default).split(',').map(String::from).collect()
    };
    let numbers = |list: Vec<String>| -> Vec<usize> { list.iter().filter_map(|n| n.parse().ok()).collect() };
    let formats = list("formats", "Q4_0,Q4_1,Q8_0,Q4_K,Q6_K,BF16");
    let precisions = list("precisions", "Int8,Int16,F32");
    let shapes = list("shapes", "135M,1.1B");
    let (tokens, threads) = (numbers(list("tokens", "1,32,512")), numbers(list("threads", "1,2")));
    let isa = Isa::named(&list("isa", Isa::best().name())[0]).unwrap_or_else(|error| {
        eprintln!("{error}");
        std::process::exit(2);
    });
    println!("instruction set {isa}");
    for &threads in &threads {
        if let Err(error) = print_ceilings(threads, isa) {
            eprintln!("{error}");
        }
    }
    println!("format precision shape              tokens threads   GB/s   GOP/s");
    for dtype in DType::ALL.into_iter().filter(|dtype| formats.iter().any(|name| name == dtype.name())) {
        for (name, rows, cols) in SHAPES {
            if cols % dtype.block_len() != 0 || !shapes.iter().any(|shape| name.contains(shape)) {
                continue;
            }
            let Some(raw) = random_weights(dtype, rows * cols) else { continue };
            let copies = (WORKING_SET / raw.len()).clamp(1, 200);
            for precision in [Precision::Int8, Precision::Int16, Precision::F32] {
                let wanted = precisions.iter().any(|name| *name == format!("{precision:?}"));
                let Some(kernel) = Kernel::select(isa, dtype, precision).ok().filter(|_| wanted) else { continue };
                let format = PackedFormat::new(dtype, precision);
                let start = cpu_nanoseconds();
                let weights: Vec<PackedMatrix> =
                    (0..copies).filter_map(|_| PackedMatrix::pack(format, cols, &[&raw]).ok()).collect();
                let pack = (raw.len() * copies) as f64 / (cpu_nanoseconds() - start) as f64;
                println!("{dtype:6} {precision:9?} pack {pack:.2}");
                println!("{dtype:6} {precision:9?} {name:12} quantize {:.0}", quantize(isa, precision, cols));
                for &tokens in &tokens {
                    for &threads in &threads {
                        let (bytes, seconds) = measure(isa, kernel, precision, &weights, tokens, threads);
                        let gops = 2e-9 * (rows * cols * tokens) as f64 / seconds;
                        let line = format!("{dtype:6} {precision:9?} {name:12} {rows:6}");
                        println!("{line} {tokens:6} {threads:7} {:6.1} {gops:7.0}", 1e-9 * bytes as f64 / seconds);
                    }
                }
            }
        }
    }
}

fn print_ceilings(threads: usize, isa: Isa) -> Result<()> {
    let choice = match isa.name() {
        "avx512" => IsaChoice::Avx512,
        "portable" => IsaChoice::Portable,
        _ => IsaChoice::Avx2,
    };
    let config = CpuConfig { threads: threads as u32, isa: choice, activations: config::Activations::Auto };
    let mut ceilings = Ceilings::new(&config)?;
    print!("{threads} threads: reads {:.1} GB/s", 1e-9 * ceilings.read_bandwidth(WORKING_SET)?);
    for precision in [Precision::Int8, Precision::Int16, Precision::F32] {
        if let Some(peak) = ceilings.peak(precision) {
            print!(", {precision:?} {:.0} GOP/s", 1e-9 * peak);
        }
    }
    println!();
    Ok(())
}

/// Bytes of a matrix and the seconds that its product takes.
fn measure(
    isa: Isa,
    kernel: Kernel,
    precision: Precision,
    weights: &[PackedMatrix],
    tokens: usize,
    threads: usize,
) -> (usize, f64) {
    let (rows, cols) = (weights[0].rows(), weights[0].cols());
    let x: Vec<f32> = (0..tokens * cols).map(|i| (i as f32 * 0.37).sin()).collect();
    let Ok(mut activations) = Activations::new(precision, tokens, cols) else { return (0, f64::NAN) };
    activations.quantize(isa, 0, &x);
    let mut out = vec![0.0; tokens * rows];
    let output = Output::new(&mut out, rows);
    let weights = &weights[..weights.len().div_ceil(tokens)];
    let passes = (2_000_000_000 / (rows * cols * tokens * weights.len())).clamp(3, 20);
    let pass = |thread: usize, _: usize| {
        for weights in weights {
            let blocks = weights.row_blocks();
            let range = blocks * thread / threads..blocks * (thread + 1) / threads;
            // SAFETY: threads have row blocks of their own.
            unsafe { kernel.run(weights, &activations, 0..tokens, range, output) };
        }
    };
    let rate = best(threads, passes, weights.len(), pass);
    (weights[0].byte_len(), 1e-9 / rate)
}

/// Nanoseconds to prepare a token.
fn quantize(isa: Isa, precision: Precision, cols: usize) -> f64 {
    let x: Vec<f32> = (0..64 * cols).map(|i| (i as f32 * 0.37).sin()).collect();
    let Ok(mut activations) = Activations::new(precision, 64, cols) else { return f64::NAN };
    let mut shortest = f64::INFINITY;
    for _ in 0..20 {
        let start = cpu_nanoseconds();
        activations.quantize(isa, 0, black_box(&x));
        shortest = shortest.min((cpu_nanoseconds() - start) as f64);
    }
    shortest / 64.0
}

/// Billions of `items` a second, each thread calling `pass` once, in the best of `passes`.
fn best(threads: usize, passes: usize, items: usize, pass: impl Fn(usize, usize) + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let slowest: Vec<AtomicU64> = std::iter::repeat_with(AtomicU64::default).take(passes + 1).collect();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (barrier, slowest, pass) = (&barrier, &slowest, &pass);
            scope.spawn(move || {
                for (index, slowest) in slowest.iter().enumerate() {
                    barrier.wait();
                    let start = cpu_nanoseconds();
                    pass(thread, index);
                    slowest.fetch_max(cpu_nanoseconds() - start, Ordering::Relaxed);
                }
            });
        }
    });
    let shortest = slowest[1..].iter().map(|ns| ns.load(Ordering::Relaxed)).min().unwrap_or(0);
    items as f64 / shortest as f64
}

/// CPU time of this thread.
fn cpu_nanoseconds() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Random codes; the scales' bits are masked to small finite numbers.
fn random_weights(dtype: DType, elements: usize) -> Option<Vec<u8>> {
    let mut state = 1_u64;
    let bytes = dtype.size_of(&[elements])?;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8 & 0xbb
    };
    Some(std::iter::repeat_with(next).take(bytes).collect())
}
