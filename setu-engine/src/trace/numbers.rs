//! Figures for stories: what many values come to, and texts that differ in numbers alone.

use serde::{Serialize, Serializer, ser::SerializeStruct};

/// Values, of which count, median, p99 and the largest are told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spread(Vec<f64>);

impl Spread {
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The smallest value that is no less than `share` of all; 0 if there is none.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
    }
}

impl Serialize for Spread {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Spread", 4)?;
        fields.serialize_field("count", &self.count())?;
        fields.serialize_field("median", &self.quantile(0.5))?;
        fields.serialize_field("p99", &self.quantile(0.99))?;
        fields.serialize_field("most", &self.quantile(1.0))?;
        fields.end()
    }
}

/// A text without its numbers: what makes two reasons of one kind.
pub(super) fn shape(text: &str) -> impl Iterator<Item = char> {
    let mut after_digit = false;
    text.chars().filter_map(move |letter| {
        let digit = letter.is_ascii_digit();
        // A run of digits counts once, with the point inside it; sessions' names are hexadecimal.
        let hidden = after_digit && (letter.is_ascii_hexdigit() || letter == '.');
        after_digit = digit || hidden;
        match (hidden, digit) {
            (true, _) => None,
            (_, true) => Some('#'),
            _ => Some(letter),
        }
    })
}

/// A duration for people.
pub(super) fn time(seconds: f64) -> String {
    match seconds.abs() {
        0.0 => "0 ms".to_owned(),
        short if short < 1e-3 => format!("{:.2} ms", seconds * 1e3),
        short if short < 10.0 => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{seconds:.2} s"),
    }
}

/// "1 step", "2 steps".
pub(super) fn counted(count: u64, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_seen() {
        let mut spread = Spread::default();
        assert_eq!(spread.quantile(0.5), 0.0);
        (1..=200).rev().for_each(|value| spread.add(f64::from(value)));
        let cases = [(0.0, 1.0), (0.5, 100.0), (0.99, 198.0), (1.0, 200.0)];
        for (share, expected) in cases {
            assert_eq!(spread.quantile(share), expected, "{share}");
        }
    }

    #[test]
    fn reasons_are_alike_if_only_numbers_differ() {
        let cases = [
            ("needs 12 pages, 3 are left", "needs 7 pages, 112 are left", true),
            ("waited 1.25 s", "waited 30 s", true),
            ("behind session_00000007", "behind session_000001b2", true),
            ("needs 12 pages", "needs pages", false),
            ("", "0", false),
        ];
        for (one, other, alike) in cases {
            assert_eq!(shape(one).eq(shape(other)), alike, "{one:?} {other:?}");
        }
    }

    #[test]
    fn durations_read_well() {
        let cases = [(0.0, "0 ms"), (4.2e-5, "0.04 ms"), (0.0081, "8.1 ms"), (9.9, "9900.0 ms"), (75.5, "75.50 s")];
        for (seconds, text) in cases {
            assert_eq!(time(seconds), text);
        }
    }
}
