//! Byte-pair encoding's one rule: merge the best neighbours until no two make a token.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ops::Range;

/// A run of bytes that is one symbol so far; a list, since neighbours merge.
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// Two neighbours whose text is a token.
struct Merge<P> {
    priority: P,
    left: usize,
    right: usize,
    /// Where the two lay when they were found; one of them has merged since if they don't any more.
    span: Range<usize>,
}

/// What the symbols of a text, which end at `ends`, come to: each time the two neighbours merge whose span has the
/// highest `priority`, of equal ones the leftmost. A span without a priority is no token.
pub(super) fn merge<P: Ord>(
    ends: impl IntoIterator<Item = usize>,
    priority: impl Fn(Range<usize>) -> Option<P>,
) -> Vec<Range<usize>> {
    let mut symbols: Vec<Symbol> = Vec::new();
    for end in ends {
        let at = symbols.len();
        let start = symbols.last().map_or(0, |last| last.end);
        symbols.push(Symbol { start, end, previous: at.checked_sub(1), next: Some(at + 1) });
    }
    match symbols.last_mut() {
        Some(last) => last.next = None,
        None => return Vec::new(),
    }
    let found = |symbols: &[Symbol], left: usize, right: usize| {
        let span = symbols[left].start..symbols[right].end;
        Some(Merge { priority: priority(span.clone())?, left, right, span })
    };
    let mut merges: BinaryHeap<Merge<P>> =
        (1..symbols.len()).filter_map(|right| found(&symbols, right - 1, right)).collect();
    while let Some(Merge { left, right, span, .. }) = merges.pop() {
        let stale = symbols[left].start != span.start
            || symbols[left].end != symbols[right].start
            || symbols[right].end != span.end;
        if stale {
            continue;
        }
        let next = symbols[right].next;
        symbols[left].end = span.end;
        symbols[left].next = next;
        symbols[right].start = span.end;
        if let Some(next) = next {
            symbols[next].previous = Some(left);
            merges.extend(found(&symbols, left, next));
        }
        if let Some(previous) = symbols[left].previous {
            merges.extend(found(&symbols, previous, left));
        }
    }
    let mut spans = Vec::new();
    let mut at = Some(0);
    while let Some(symbol) = at {
        spans.push(symbols[symbol].start..symbols[symbol].end);
        at = symbols[symbol].next;
    }
    spans
}

impl<P: Ord> Ord for Merge<P> {
    fn cmp(&self, other: &Merge<P>) -> Ordering {
        self.priority.cmp(&other.priority).then_with(|| other.left.cmp(&self.left))
    }
}

impl<P: Ord> PartialOrd for Merge<P> {
    fn partial_cmp(&self, other: &Merge<P>) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<P: Ord> PartialEq for Merge<P> {
    fn eq(&self, other: &Merge<P>) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<P: Ord> Eq for Merge<P> {}
