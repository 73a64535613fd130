//! A session's place in the order as one number, so that sorting ten thousand of them is cheap.

use setu_core::admission::queue::Candidate;

/// Highest level first, then the smallest urgency, then the index into the view, which is the order of arrival.
///
/// From the highest bit: 3 of the level, 32 of the urgency, 24 of the index, and whether the session runs or returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(u64);

const HIGHEST_LEVEL: u32 = 7;
const INDEX_BITS: u32 = 24;
const FLAG_BITS: u32 = 2;
const RUNS: u64 = 1;
const RETURNS: u64 = 2;

impl Key {
    /// Sessions whose index fits.
    pub const MOST_SESSIONS: u32 = 1 << INDEX_BITS;

    /// Levels are at most 7; an urgency that is no number comes last.
    pub fn new(candidate: &Candidate, urgency: f64) -> Key {
        let urgency = if urgency.is_nan() { f32::INFINITY } else { urgency as f32 };
        // The bits of a float in the order of the numbers.
        let bits = urgency.to_bits();
        let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        let level = HIGHEST_LEVEL - candidate.level.min(HIGHEST_LEVEL);
        let top = (u64::from(level) << 32 | u64::from(ordered)) << INDEX_BITS | u64::from(candidate.index);
        let flag = |is: bool, flag: u64| if is { flag } else { 0 };
        let flags = flag(candidate.runs, RUNS) | flag(candidate.returns, RETURNS);
        Key(top << FLAG_BITS | flags)
    }

    /// The candidate that it was made of, with `power` for its own.
    pub fn candidate(self, power: impl FnOnce(u32) -> u32) -> Candidate {
        let index = self.index() as u32;
        let level = HIGHEST_LEVEL - (self.0 >> (32 + INDEX_BITS + FLAG_BITS)) as u32;
        let (runs, returns) = (self.0 & RUNS != 0, self.0 & RETURNS != 0);
        Candidate { index, level, power: power(level), runs, returns }
    }

    /// Index into the view.
    pub fn index(self) -> usize {
        (self.0 >> FLAG_BITS) as usize & (Key::MOST_SESSIONS as usize - 1)
    }

    pub fn waits(self) -> bool {
        self.0 & RUNS == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_by_level_then_urgency_then_arrival_and_read_back() {
        let last = Key::MOST_SESSIONS - 1;
        // (level, urgency, index, runs, returns), in the order expected.
        let sorted = [
            (3, 9e99, 4, true, false),
            (2, -1e300, 7, false, false),
            (2, f64::NEG_INFINITY, 9, false, true),
            (2, -3.0, 1, true, false),
            (2, 2.0, 2, false, false),
            (2, 2.0, 3, false, false),
            (2, 2.0, last, true, false),
            (2, f64::NAN, 0, false, false),
            (1, -0.5, 6, false, false),
            (0, f64::NEG_INFINITY, 5, false, true),
        ];
        let candidates =
            sorted.map(|(level, _, index, runs, returns)| Candidate { index, level, power: level + 1, runs, returns });
        let keys: Vec<Key> =
            candidates.iter().zip(sorted).map(|(candidate, case)| Key::new(candidate, case.1)).collect();
        assert!(keys.is_sorted(), "{keys:x?}");
        for (key, candidate) in keys.iter().zip(&candidates) {
            assert_eq!(key.candidate(|level| level + 1), *candidate);
            assert_eq!((key.index(), key.waits()), (candidate.index as usize, !candidate.runs));
        }
    }
}
