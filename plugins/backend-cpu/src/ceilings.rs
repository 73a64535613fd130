//! What the processor can do at most, with the threads and instructions that the backend would use: how fast it reads
//! memory, and how fast the kernels' innermost instructions run when nothing else has to. Benches show their figures
//! beside these, measured in the same run.
//!
//! The best of several passes counts: other processes only ever make one slower.

use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

use setu_core::Result;

use crate::config::CpuConfig;
use crate::matmul::{Isa, Precision};
use crate::memory::Region;
use crate::pool::Pool;
use crate::vector::{Vectors, vectorized};

/// Bytes that a thread reads at a time.
const PART: usize = 1 << 20;
const PASSES: usize = 7;
/// Time that one measurement of reading goes on for at least, so that small working sets are seen often enough.
const AT_LEAST: Duration = Duration::from_millis(200);
/// Turns of the loop of a task; a millisecond or so.
const TURNS: usize = 200_000;
/// Tasks of a pass for each thread: few enough to be long, enough to be shared out evenly.
const TASKS: usize = 8;
/// Sums at once, so that none waits for its own last instruction.
const SUMS: usize = 10;

/// Threads to measure with.
#[derive(Debug)]
pub struct Ceilings {
    isa: Isa,
    pool: Pool,
    threads: usize,
}

impl Ceilings {
    /// The threads and instructions of a backend with these settings.
    ///
    /// # Errors
    /// The machine doesn't have the instruction set, or the system gives no threads.
    pub fn new(config: &CpuConfig) -> Result<Ceilings> {
        let threads = config.thread_count();
        Ok(Ceilings { isa: config.isa.isa()?, pool: Pool::new(threads)?, threads })
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Bytes that all threads together read in a second from a working set of `bytes` bytes, over and over.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn read_bandwidth(&mut self, bytes: usize) -> Result<f64> {
        let parts = bytes.div_ceil(PART).max(1);
        let region = Region::zeroed(parts * PART, "a measurement")?;
        region.prefer_huge_pages();
        // As an address, which threads may share.
        let start = region.as_ptr() as usize;
        self.pool.run(|worker| {
            worker.share(parts, 1, |range| {
                // Pages that nobody wrote to would all be the same one.
                // SAFETY: the parts are the region's, and each is one thread's for the phase.
                range.for_each(|part| unsafe { std::ptr::write_bytes((start as *mut u8).add(part * PART), 1, PART) });
            });
        });
        let vectors = Vectors::of(self.isa);
        let read = |range: Range<usize>| {
            // SAFETY: the parts are the region's, aligned to pages, and nobody writes to them any more.
            let words = unsafe {
                let first = (start as *const u8).add(range.start * PART);
                std::slice::from_raw_parts(first.cast::<u64>(), range.len() * PART / 8)
            };
            // Memory yields more to a thread that reads in two places, as kernels do.
            let (front, back) = words.split_at(words.len() / 2);
            black_box(sum_words(vectors, front, back));
        };
        // Each thread has its own stretch, as it has of a matrix's rows.
        let grain = parts.div_ceil(self.threads * TASKS);
        let (mut best, started, mut passes) = (f64::INFINITY, Instant::now(), 0);
        while passes < PASSES || started.elapsed() < AT_LEAST {
            let start = Instant::now();
            self.pool.run(|worker| worker.share(parts, grain, read));
            best = best.min(start.elapsed().as_secs_f64());
            passes += 1;
        }
        Ok((parts * PART) as f64 / best)
    }

    /// Operations in a second, a multiplication and an addition being two, if all threads do nothing but the
    /// instructions that products with activations of `precision` come down to. None where there is no such
    /// instruction: the portable kernels are whatever the compiler makes of them.
    pub fn peak(&mut self, precision: Precision) -> Option<f64> {
        let (turn, operations) = turns(self.isa, precision)?;
        let tasks = self.threads * TASKS;
        let mut best = f64::INFINITY;
        for _ in 0..PASSES {
            let start = Instant::now();
            self.pool.run(|worker| {
                worker.share(tasks, 1, |range| range.for_each(|_| turn()));
            });
            best = best.min(start.elapsed().as_secs_f64());
        }
        Some((tasks * TURNS * SUMS) as f64 * operations / best)
    }
}

vectorized! {
    fn sum_words(front: &[u64], back: &[u64]) -> u64 {
        let mut sums = [0_u64; 32];
        for (front, back) in front.as_chunks::<32>().0.iter().zip(back.as_chunks::<32>().0) {
            for (sum, (front, back)) in sums.iter_mut().zip(front.iter().zip(back)) {
                *sum = sum.wrapping_add(*front).wrapping_add(*back);
            }
        }
        sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
    }
}

/// What does `TURNS` times `SUMS` of the instructions, and the operations of each of them.
#[cfg(target_arch = "x86_64")]
fn turns(isa: Isa, precision: Precision) -> Option<(fn(), f64)> {
    let (floats, words) = (precision == Precision::F32, precision == Precision::Int16);
    let (turn, lanes): (fn(), f64) = match (isa.name(), floats) {
        // SAFETY: an `Isa` is the proof that the machine has its instructions.
        ("avx2" | "avx2-vnni", true) => (|| unsafe { x86::avx2_floats() }, 8.0),
        // SAFETY: as above.
        ("avx2", false) if words => (|| unsafe { x86::avx2_words() }, 8.0),
        // SAFETY: as above.
        ("avx2", false) => (|| unsafe { x86::avx2_bytes() }, 8.0),
        // SAFETY: as above.
        ("avx2-vnni", false) if words => (|| unsafe { x86::avx2_vnni_words() }, 8.0),
        // SAFETY: as above.
        ("avx2-vnni", false) => (|| unsafe { x86::avx2_vnni_bytes() }, 8.0),
        // SAFETY: as above.
        ("avx512", true) => (|| unsafe { x86::avx512_floats() }, 16.0),
        // SAFETY: as above.
        ("avx512", false) if words => (|| unsafe { x86::avx512_words() }, 16.0),
        // SAFETY: as above.
        ("avx512", false) => (|| unsafe { x86::avx512_bytes() }, 16.0),
        _ => return None,
    };
    let operations = match precision {
        Precision::F32 => 2.0,
        Precision::Int8 => 4.0 * 2.0,
        Precision::Int16 => 2.0 * 2.0,
    };
    Some((turn, lanes * operations))
}

#[cfg(not(target_arch = "x86_64"))]
fn turns(_: Isa, _: Precision) -> Option<(fn(), f64)> {
    None
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{SUMS, TURNS};

    /// A loop of `SUMS` sums, each `step` of itself, `a` and `b`. The compiler can't know that `a` stays the same, or it
    /// would take what doesn't change out of the loop.
    macro_rules! turns {
        ($features:literal $name:ident($value:ident: $t:ty = $zero:expr, $one:expr) |$sum:ident, $a:ident, $b:ident| $step:expr) => {
            #[target_feature(enable = $features)]
            pub fn $name() {
                let (mut sums, mut factor, other): ([$t; SUMS], $t, $t) = ([$zero; SUMS], $one, black_box($one));
                for _ in 0..TURNS {
                    for sum in &mut sums {
                        // SAFETY: there is no instruction in it.
                        unsafe { asm!("/* {0} */", inout($value) factor, options(nomem, nostack, preserves_flags)) };
                        let ($sum, $a, $b) = (*sum, factor, other);
                        *sum = $step;
                    }
                }
                black_box(sums);
            }
        };
    }

    turns! { "avx2,fma" avx2_floats(ymm_reg: __m256 = _mm256_setzero_ps(), _mm256_set1_ps(0.5))
    |sum, a, b| _mm256_fmadd_ps(a, b, sum) }
    turns! { "avx2" avx2_bytes(ymm_reg: __m256i = _mm256_setzero_si256(), _mm256_set1_epi8(1))
    |sum, a, b| _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)) }
    turns! { "avx2" avx2_words(ymm_reg: __m256i = _mm256_setzero_si256(), _mm256_set1_epi16(1))
    |sum, a, b| _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)) }
    turns! { "avx2,avxvnni" avx2_vnni_bytes(ymm_reg: __m256i = _mm256_setzero_si256(), _mm256_set1_epi8(1))
    |sum, a, b| _mm256_dpbusd_avx_epi32(sum, a, b) }
    turns! { "avx2,avxvnni" avx2_vnni_words(ymm_reg: __m256i = _mm256_setzero_si256(), _mm256_set1_epi16(1))
    |sum, a, b| _mm256_dpwssd_avx_epi32(sum, a, b) }
    turns! { "avx512f" avx512_floats(zmm_reg: __m512 = _mm512_setzero_ps(), _mm512_set1_ps(0.5))
    |sum, a, b| _mm512_fmadd_ps(a, b, sum) }
    turns! { "avx512f,avx512vnni" avx512_bytes(zmm_reg: __m512i = _mm512_setzero_si512(), _mm512_set1_epi8(1))
    |sum, a, b| _mm512_dpbusd_epi32(sum, a, b) }
    turns! { "avx512f,avx512vnni" avx512_words(zmm_reg: __m512i = _mm512_setzero_si512(), _mm512_set1_epi16(1))
    |sum, a, b| _mm512_dpwssd_epi32(sum, a, b) }
}

#[cfg(test)]
mod tests {
    use setu_core::config::Config;

    use super::*;

    #[test]
    fn every_instruction_set_has_its_ceilings() {
        let mut config = CpuConfig::from_table(&Default::default()).unwrap();
        config.threads = 2;
        let mut ceilings = Ceilings::new(&config).unwrap();
        let bandwidth = ceilings.read_bandwidth(3 << 20).unwrap();
        assert!(bandwidth.is_finite() && bandwidth > 0.0);
        for isa in Isa::available() {
            ceilings.isa = isa;
            for precision in [Precision::Int8, Precision::Int16, Precision::F32] {
                let peak = ceilings.peak(precision);
                assert_eq!(peak.is_none(), isa == Isa::PORTABLE || cfg!(not(target_arch = "x86_64")));
                assert!(peak.is_none_or(|peak| peak.is_finite() && peak > 0.0), "{isa} {precision:?}: {peak:?}");
            }
        }
    }
}
