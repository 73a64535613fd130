//! What can be set.

use setu_core::Result;
use setu_core::config::{Config, ConfigEnum};

use crate::machine;
use crate::matmul::Isa;

/// Runs graphs on the CPU.
#[derive(Config, Clone, Debug, PartialEq)]
pub struct CpuConfig {
    /// Threads that compute a step; 0 takes all the cores that the process may use.
    #[config(default = 0, max = 1024, unit = "threads")]
    pub threads: u32,
    /// Instruction set of the kernels; `auto` takes the fastest that the machine has.
    #[config(default = IsaChoice::Auto)]
    pub isa: IsaChoice,
    /// Precision of the activations that weights are multiplied with. Weights in F32 always see f32; those in F16 and
    /// BF16 see sixteen bits, and are rounded to integers of thirteen with an exponent for every 32, unless it is `f32`.
    #[config(default = Activations::Auto)]
    pub activations: Activations,
}

impl CpuConfig {
    /// How many threads that makes here.
    pub(crate) fn thread_count(&self) -> usize {
        if self.threads == 0 { machine::threads() } else { self.threads as usize }
    }
}

/// Instruction sets to choose from.
#[derive(ConfigEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum IsaChoice {
    /// The fastest that the machine has.
    Auto,
    /// AVX-512 with VNNI.
    Avx512,
    /// AVX2 with FMA.
    Avx2,
    /// Plain code, on every machine.
    Portable,
}

impl IsaChoice {
    /// What was chosen.
    ///
    /// # Errors
    /// This machine doesn't have it.
    pub(crate) fn isa(self) -> Result<Isa> {
        match self {
            IsaChoice::Auto => Ok(Isa::best()),
            IsaChoice::Avx512 => Isa::named("avx512"),
            IsaChoice::Avx2 => Isa::named("avx2-vnni").or_else(|_| Isa::named("avx2")),
            IsaChoice::Portable => Ok(Isa::PORTABLE),
        }
    }
}

/// Precisions to choose from.
#[derive(ConfigEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// Sixteen bits where the result is sensitive to them, eight elsewhere.
    Auto,
    /// Eight bits, a scale for every 32 columns.
    Int8,
    /// Sixteen bits, a scale for every 32 columns.
    Int16,
    /// As they are: the weights are dequantized on the fly. Slow and exact.
    F32,
}
