//! How keys and values are kept.

use serde::{Deserialize, Serialize};

use crate::config::ConfigEnum;

/// Formats of K and V in KV pages.
///
/// [`F8E4M3`](KvDType::F8E4M3) is the e4m3 of the OCP 8-bit Floating Point specification, whose largest number is 448. Each head of
/// a token's key, and of its value, has a scale: the least power of two that brings the largest magnitude of its elements to
/// at most 448, but at least 2⁻¹²⁰ and at most 2⁷. An element is the code times the scale, which rounds nothing; the code is
/// the nearest to the element over the scale, the even one of two, and ±448 for what is larger. A head with an element
/// that is infinite or NaN is all NaN. Scales that are powers of two are from the OCP Microscaling Formats (MX)
/// specification 1.0, whose blocks are of 32 elements.
#[derive(ConfigEnum, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum KvDType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    #[config(name = "bf16")]
    BF16,
    /// 8-bit floats (e4m3), with a scale for each head of a token.
    #[serde(rename = "F8_E4M3")]
    #[config(name = "fp8_e4m3")]
    F8E4M3,
}

impl KvDType {
    /// The name used in errors and reports, for example `BF16`.
    pub const fn name(self) -> &'static str {
        match self {
            KvDType::F32 => "F32",
            KvDType::F16 => "F16",
            KvDType::BF16 => "BF16",
            KvDType::F8E4M3 => "F8_E4M3",
        }
    }

    /// Bytes of an element.
    pub const fn element_bytes(self) -> usize {
        match self {
            KvDType::F32 => 4,
            KvDType::F16 | KvDType::BF16 => 2,
            KvDType::F8E4M3 => 1,
        }
    }

    /// Bytes of the scale that a token's key, or its value, has in each head.
    pub const fn scale_bytes(self) -> usize {
        match self {
            KvDType::F8E4M3 => 1,
            _ => 0,
        }
    }
}

impl std::fmt::Display for KvDType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_named_alike_everywhere() {
        for dtype in [KvDType::F32, KvDType::F16, KvDType::BF16, KvDType::F8E4M3] {
            assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.name());
        }
    }
}
