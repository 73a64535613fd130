//! The version of the boundary, apart from that of any crate.

use std::fmt;

/// The boundary that this build speaks.
///
/// Raise the minor number with every addition, and move [`OLDEST`] up with it where something old no
/// longer works. From 1.0 on, nothing old may stop working.
pub const ABI: AbiVersion = AbiVersion { major: 0, minor: 2 };

/// The oldest boundary whose plugins this build still loads.
pub const OLDEST: AbiVersion = AbiVersion { major: 0, minor: 1 };

/// A version of the boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AbiVersion {
    pub major: u16,
    pub minor: u16,
}

impl AbiVersion {
    /// Whether a host of this build can load a plugin that was built against `self`. Never a newer one:
    /// it would read fields that this build doesn't write.
    pub const fn is_loadable(self) -> bool {
        self.major == ABI.major && self.minor >= OLDEST.minor && self.minor <= ABI.minor
    }
}

impl fmt::Display for AbiVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The versions that this build loads, as text.
pub fn loadable() -> String {
    if OLDEST == ABI { ABI.to_string() } else { format!("{OLDEST} to {ABI}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_neither_newer_nor_foreign_is_loaded() {
        let version = |major, minor| AbiVersion { major, minor };
        assert!(ABI.is_loadable() && OLDEST.is_loadable());
        assert!(!version(ABI.major, ABI.minor + 1).is_loadable());
        assert!(!version(ABI.major + 1, ABI.minor).is_loadable());
        assert!(!version(OLDEST.major, OLDEST.minor.wrapping_sub(1)).is_loadable());
    }
}
