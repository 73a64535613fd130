//! What benches quote.

/// The middle one of `values`, which are sorted by it.
///
/// # Panics
/// There is none.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
