//! "Did you mean": the known name that a mistyped one most likely stands for.

/// The candidate nearest to `word`, if one is near enough to be worth suggesting.
///
/// Case and `-` for `_` don't count; otherwise about one letter in three may differ.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    const LONGEST: usize = 64;
    if word.is_empty() || word.len() > LONGEST {
        return None;
    }
    let folded = |text: &str| text.to_lowercase().replace('-', "_");
    let word = folded(word);
    let allowed = |candidate: &str| (word.chars().count().max(candidate.chars().count()) / 3).max(1);
    candidates
        .into_iter()
        .filter(|candidate| candidate.len() <= LONGEST)
        .map(|candidate| (strsim::damerau_levenshtein(&word, &folded(candidate)), candidate))
        .filter(|(distance, candidate)| *distance <= allowed(candidate))
        .min_by_key(|(distance, candidate)| (*distance, *candidate))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn the_nearest_name_is_found_and_strangers_are_not() {
        let known = ["queue_timeout_s", "max_priority", "fcfs", "fair_share"];
        let cases = [
            ("queue_timeout", Some("queue_timeout_s")),
            ("queue-timeout-s", Some("queue_timeout_s")),
            ("QUEUE_TIMEOUT_S", Some("queue_timeout_s")),
            ("fcsf", Some("fcfs")),
            ("fairshare", Some("fair_share")),
            ("chunk", None),
            ("", None),
            ("x", None),
        ];
        for (word, expected) in cases {
            assert_eq!(nearest(word, known), expected, "{word:?}");
        }
        assert_eq!(nearest(&"x".repeat(1 << 20), known), None);
    }
}
