//! Sizes in bytes as people write them: `2GiB`, `1.5 GB`, `4096`.

/// Suffixes and what they multiply by, smallest first; binary and decimal units side by side.
const UNITS: [(&str, u64); 10] = [
    ("B", 1),
    ("kB", 1000),
    ("KB", 1000),
    ("KiB", 1 << 10),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
    ("TB", 1_000_000_000_000),
    ("TiB", 1 << 40),
];

/// How a schema or a help text describes a size that is written as text.
pub(super) const PATTERN: &str = r"^[0-9]+(\.[0-9]+)? ?(B|[kK]B|KiB|MB|MiB|GB|GiB|TB|TiB)?$";

/// The number of bytes that `text` names; `None` where it is no size or more than 64 bits hold.
///
/// A fraction of a byte is cut off. `const`, so that `derive(Config)` can read a default when the
/// component is compiled.
pub const fn parse_size(text: &str) -> Option<u64> {
    let bytes = text.as_bytes();
    let (whole, mut at) = match digits(bytes, 0) {
        Some(found) => found,
        None => return None,
    };
    let (mut fraction, mut scale) = (0u128, 1u128);
    if at < bytes.len() && bytes[at] == b'.' {
        let start = at + 1;
        let found = match digits(bytes, start) {
            Some(found) => found,
            None => return None,
        };
        (fraction, at) = found;
        let mut n = start;
        while n < at {
            scale *= 10;
            n += 1;
        }
    }
    if at < bytes.len() && bytes[at] == b' ' {
        at += 1;
        if at == bytes.len() {
            return None;
        }
    }
    let unit = match unit(bytes, at) {
        Some(unit) => unit as u128,
        None => return None,
    };
    // `digits` keeps both factors below 2^64, so neither product overflows.
    let total = whole * unit + fraction * unit / scale;
    if total > u64::MAX as u128 { None } else { Some(total as u64) }
}

/// `bytes` with the largest binary unit that divides it.
pub fn size_text(bytes: u64) -> String {
    let binary = [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match binary.into_iter().find(|(_, unit)| bytes != 0 && bytes.is_multiple_of(*unit)) {
        Some((suffix, unit)) => format!("{}{suffix}", bytes / unit),
        None => format!("{bytes}B"),
    }
}

/// The number written at `at` in at most 19 digits, and where it ends.
const fn digits(bytes: &[u8], at: usize) -> Option<(u128, usize)> {
    let (mut value, mut end) = (0u128, at);
    while end < bytes.len() && bytes[end].is_ascii_digit() {
        value = value * 10 + (bytes[end] - b'0') as u128;
        end += 1;
        if end - at > 19 {
            return None;
        }
    }
    if end == at { None } else { Some((value, end)) }
}

const fn unit(bytes: &[u8], at: usize) -> Option<u64> {
    if at == bytes.len() {
        return Some(1);
    }
    let mut n = 0;
    while n < UNITS.len() {
        let (suffix, unit) = (UNITS[n].0.as_bytes(), UNITS[n].1);
        let mut same = suffix.len() == bytes.len() - at;
        let mut i = 0;
        while same && i < suffix.len() {
            same = suffix[i] == bytes[at + i];
            i += 1;
        }
        if same {
            return Some(unit);
        }
        n += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        let cases = [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("1B", Some(1)),
            ("2GiB", Some(2 << 30)),
            ("2 GiB", Some(2 << 30)),
            ("1.5GiB", Some(3 << 29)),
            ("3kB", Some(3000)),
            ("3KB", Some(3000)),
            ("1TiB", Some(1 << 40)),
            ("0.5B", Some(0)),
            ("16777215TiB", Some(16_777_215 << 40)),
            ("16777216TiB", None),
            ("99999999999999999999", None),
            ("1.99999999999999999999GiB", None),
            ("", None),
            ("GiB", None),
            ("2gib", None),
            ("2G", None),
            ("2  GiB", None),
            ("2 ", None),
            ("-2GiB", None),
            (".5GiB", None),
            ("1.GiB", None),
            ("2GiBx", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_size(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_size_is_shown_in_the_largest_unit_that_divides_it() {
        for (bytes, expected) in [(0, "0B"), (1000, "1000B"), (1 << 20, "1MiB"), (3 << 29, "1536MiB")] {
            assert_eq!(size_text(bytes), expected);
            assert_eq!(parse_size(&size_text(bytes)), Some(bytes));
        }
    }
}
