//! A session's place in the order as one number, so that sorting ten thousand of them is cheap.

/// Highest level first, then the smallest urgency, then the index into the view, which is the order of arrival.
///
/// From the highest bit: 3 of the level, 32 of the urgency, 24 of the index, 1 of [`is_new`](Key::is_new).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(u64);

const INDEX_BITS: u32 = 24;
const HIGHEST_LEVEL: u32 = 7;

impl Key {
    /// Sessions whose index fits.
    pub const MOST_SESSIONS: u32 = 1 << INDEX_BITS;

    /// `level` is at most 7; an urgency that is no number comes last.
    pub fn new(level: u32, urgency: f64, index: u32, is_new: bool) -> Key {
        let urgency = if urgency.is_nan() { f32::INFINITY } else { urgency as f32 };
        // The bits of a float in the order of the numbers.
        let bits = urgency.to_bits();
        let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        let top = u64::from(HIGHEST_LEVEL - level.min(HIGHEST_LEVEL)) << 32 | u64::from(ordered);
        Key(top << (INDEX_BITS + 1) | u64::from(index) << 1 | u64::from(is_new))
    }

    pub fn level(self) -> u32 {
        HIGHEST_LEVEL - (self.0 >> (32 + INDEX_BITS + 1)) as u32
    }

    pub fn index(self) -> u32 {
        (self.0 >> 1) as u32 & (Key::MOST_SESSIONS - 1)
    }

    /// Whether the session came since the last step and may be turned away.
    pub fn is_new(self) -> bool {
        self.0 & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_by_level_then_urgency_then_arrival() {
        let last = Key::MOST_SESSIONS - 1;
        let mut keys = [
            Key::new(2, f64::NAN, 0, false),
            Key::new(2, -3.0, 1, false),
            Key::new(2, 2.0, 2, true),
            Key::new(2, 2.0, 3, false),
            Key::new(3, 9e99, 4, false),
            Key::new(0, f64::NEG_INFINITY, 5, true),
            Key::new(1, -0.5, 6, false),
            Key::new(2, -1e300, 7, false),
            Key::new(2, 2.0, last, false),
        ];
        keys.sort_unstable();
        let read = keys.map(|key| (key.level(), key.index(), key.is_new()));
        let expected = [
            (3, 4, false),
            (2, 7, false),
            (2, 1, false),
            (2, 2, true),
            (2, 3, false),
            (2, last, false),
            (2, 0, false),
            (1, 6, false),
            (0, 5, true),
        ];
        assert_eq!(read, expected);
    }
}
