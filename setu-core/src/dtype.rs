//! Element and block formats of tensors, with the arithmetic that every size check needs.

use serde::{Deserialize, Serialize};

/// How a tensor's elements are stored. Quantized formats are those of GGUF, bit for bit.
///
/// A quantized tensor is a sequence of blocks along its innermost dimension; a row's length must be
/// a multiple of [`block_len`](DType::block_len).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u32)]
#[non_exhaustive]
pub enum DType {
    F32 = 0,
    F16 = 1,
    BF16 = 2,
    Q4_0 = 3,
    Q4_1 = 4,
    Q5_0 = 5,
    Q5_1 = 6,
    Q8_0 = 7,
    Q2K = 8,
    Q3K = 9,
    Q4K = 10,
    Q5K = 11,
    Q6K = 12,
}

impl DType {
    /// Every format, in the order of their numbers.
    pub const ALL: [DType; 13] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q8_0,
        DType::Q2K,
        DType::Q3K,
        DType::Q4K,
        DType::Q5K,
        DType::Q6K,
    ];

    /// Elements in a block: 1 for the float formats, 32 or 256 for the quantized ones.
    pub const fn block_len(self) -> usize {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 1,
            DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 | DType::Q8_0 => 32,
            DType::Q2K | DType::Q3K | DType::Q4K | DType::Q5K | DType::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Q4_0 => 18,
            DType::Q4_1 => 20,
            DType::Q5_0 => 22,
            DType::Q5_1 => 24,
            DType::Q8_0 => 34,
            DType::Q2K => 84,
            DType::Q3K => 110,
            DType::Q4K => 144,
            DType::Q5K => 176,
            DType::Q6K => 210,
        }
    }

    /// Bytes of a tensor of `shape` (outermost dimension first), or `None` where the innermost
    /// dimension is not a whole number of blocks or the size overflows.
    pub fn size_of(self, shape: &[usize]) -> Option<usize> {
        let inner = shape.last().copied().unwrap_or(1);
        if inner % self.block_len() != 0 {
            return None;
        }
        let mut bytes = (inner / self.block_len()).checked_mul(self.block_bytes())?;
        for &dim in shape.split_last().map_or(&[][..], |(_, outer)| outer) {
            bytes = bytes.checked_mul(dim)?;
        }
        Some(bytes)
    }

    /// The name used in files, errors and configuration, for example `Q4_K`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::Q4_0 => "Q4_0",
            DType::Q4_1 => "Q4_1",
            DType::Q5_0 => "Q5_0",
            DType::Q5_1 => "Q5_1",
            DType::Q8_0 => "Q8_0",
            DType::Q2K => "Q2_K",
            DType::Q3K => "Q3_K",
            DType::Q4K => "Q4_K",
            DType::Q5K => "Q5_K",
            DType::Q6K => "Q6_K",
        }
    }

    /// Whether elements are stored one by one rather than in quantized blocks.
    pub const fn is_float(self) -> bool {
        self.block_len() == 1
    }

    /// The format with this number, as it crosses the ABI.
    pub fn from_code(code: u32) -> Option<DType> {
        DType::ALL.get(code as usize).copied()
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_code(dtype as u32), Some(dtype));
        }
        assert_eq!(DType::from_code(13), None);
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(DType::Q4_1.size_of(&[3, 64]), Some(3 * 2 * 20));
        assert_eq!(DType::Q4_1.size_of(&[3, 33]), None);
        assert_eq!(DType::F32.size_of(&[usize::MAX, 2]), None);
        assert_eq!(DType::F16.size_of(&[]), Some(2));
    }
}
