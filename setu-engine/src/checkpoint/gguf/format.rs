//! The tensor formats of GGUF by their numbers, those included that are only known by name.

use setu_core::{DType, Error, Result};

/// What a format's number stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Weight(DType),
    /// Plain numbers that no weight consists of: name and bytes of an element.
    Plain(&'static str, usize),
}

const SUPPORTED: [(u32, DType); 13] = [
    (0, DType::F32),
    (1, DType::F16),
    (30, DType::BF16),
    (2, DType::Q4_0),
    (3, DType::Q4_1),
    (6, DType::Q5_0),
    (7, DType::Q5_1),
    (8, DType::Q8_0),
    (10, DType::Q2K),
    (11, DType::Q3K),
    (12, DType::Q4K),
    (13, DType::Q5K),
    (14, DType::Q6K),
];

const PLAIN: [(u32, &str, usize); 5] = [(24, "I8", 1), (25, "I16", 2), (26, "I32", 4), (27, "I64", 8), (28, "F64", 8)];

const UNSUPPORTED: [(u32, &str); 24] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

/// The format with this number.
///
/// # Errors
/// It isn't supported: the error ends the sentence that the tensor's name begins.
pub fn format(code: u32) -> Result<Format> {
    if let Some(&(_, dtype)) = SUPPORTED.iter().find(|known| known.0 == code) {
        return Ok(Format::Weight(dtype));
    }
    if let Some(&(_, name, bytes)) = PLAIN.iter().find(|known| known.0 == code) {
        return Ok(Format::Plain(name, bytes));
    }
    let supported = SUPPORTED.map(|(_, dtype)| dtype.name()).join(", ");
    Err(match UNSUPPORTED.iter().find(|known| known.0 == code) {
        Some((_, name)) => Error::unsupported(format!(
            "has the format {name}, which is not supported; take a file quantized to one of {supported}"
        )),
        None => Error::invalid(format!(
            "has the unknown format {code}: the file is damaged or newer than this program; supported are {supported}"
        )),
    })
}

/// The number of a format.
pub fn code(dtype: DType) -> Option<u32> {
    SUPPORTED.iter().find(|known| known.1 == dtype).map(|known| known.0)
}
