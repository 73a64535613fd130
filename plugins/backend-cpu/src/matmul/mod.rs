//! Matrix products: `y[token, row] = Σ w[row, col] · x[token, col]` for weights in every format of checkpoints.
//!
//! Weights are [packed](PackedMatrix) once, when a model is loaded, so that vectors hold one output row a lane.
//! [Activations] are prepared once for all products that read them, and a [`Kernel`], chosen once by
//! instruction set, format and precision, multiplies any row blocks with any tokens, on any thread: a result
//! is bit for bit the same however the work is split and whatever is computed beside it.

mod activations;
mod formats;
mod isa;
mod kernel;
mod layout;
mod mode;
mod pack;
mod simd;
#[cfg(test)]
mod tests;

pub use activations::{Activations, Precision};
pub use formats::dequantize_row;
pub use isa::Isa;
pub use kernel::{Kernel, Output};
pub use layout::ROWS;
pub use pack::{PackedFormat, PackedMatrix, Source};
