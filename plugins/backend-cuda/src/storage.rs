//! Which values share memory.
//!
//! Units run in two stages: those with a row for each token, once; then those with a row for each wanted output, in
//! passes of a few wants, because logits of a whole prompt would take gigabytes. Values of a stage that never meet
//! share a buffer.

use setu_core::Graph;
use setu_core::graph::{Node, RowSpace};

/// Columns of a buffer are rounded up to this many, so that rows can be read sixteen bytes at a time.
const ALIGN_COLS: usize = 8;

/// The stage that a node belongs to: it has the rows of what it computes.
pub fn stage(graph: &Graph, node: &Node) -> RowSpace {
    graph.value(node.outputs[0]).rows
}

/// Elements from one row of a value to the next.
pub fn stride(cols: usize) -> usize {
    cols.next_multiple_of(ALIGN_COLS)
}

/// Something that has to be kept: one value, several side by side, or a copy of a value in halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    pub rows: RowSpace,
    /// Four-byte words of a row.
    pub words: usize,
    /// Whether it is an output of the graph, or kept for another reason.
    pub stays: bool,
}

/// What reads and writes items, at one time.
#[derive(Clone, Debug)]
pub struct Access {
    pub rows: RowSpace,
    pub reads: Vec<usize>,
    pub writes: Vec<usize>,
}

/// Memory that several items share in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    pub rows: RowSpace,
    /// Words of a row.
    pub words: usize,
}

/// Gives each item a buffer: the buffers, and of each item which it has.
pub fn assign(items: &[Item], accesses: &[Access]) -> (Vec<Buffer>, Vec<usize>) {
    // The order in which they run.
    let stages = [RowSpace::Tokens, RowSpace::Wanted];
    let order: Vec<&Access> =
        stages.iter().flat_map(|&rows| accesses.iter().filter(move |access| access.rows == rows)).collect();
    let mut dies: Vec<usize> = items.iter().map(|item| if item.stays { usize::MAX } else { 0 }).collect();
    for (time, access) in order.iter().enumerate() {
        for &item in access.reads.iter().chain(&access.writes) {
            // What the wanted stage reads of the first is read by every pass.
            let crosses = items[item].rows != access.rows;
            dies[item] = if crosses { usize::MAX } else { dies[item].max(time) };
        }
    }
    let mut buffers: Vec<Buffer> = Vec::new();
    let mut busy_until: Vec<usize> = Vec::new();
    let mut of_item = vec![usize::MAX; items.len()];
    for (time, access) in order.iter().enumerate() {
        for &output in &access.writes {
            let Item { rows, words, .. } = items[output];
            let free = (0..buffers.len()).filter(|&at| buffers[at].rows == rows && busy_until[at] < time);
            // The one that fits best; if none does, the largest grows.
            let best = free.min_by_key(|&at| {
                let found = buffers[at].words;
                if found >= words { (false, found - words) } else { (true, words - found) }
            });
            let at = best.unwrap_or_else(|| {
                buffers.push(Buffer { rows, words: 0 });
                busy_until.push(0);
                buffers.len() - 1
            });
            buffers[at].words = buffers[at].words.max(words);
            busy_until[at] = dies[output];
            of_item[output] = at;
        }
    }
    (buffers, of_item)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_that_never_meet_share_a_buffer_and_those_that_do_never() {
        let item = |rows| Item { rows, words: 16, stays: false };
        let tokens = RowSpace::Tokens;
        // The first lives on beside a chain of others; what is wanted of the last has buffers of its own.
        let mut items = vec![item(tokens)];
        let mut accesses = vec![Access { rows: tokens, reads: vec![], writes: vec![0] }];
        for link in 0..8 {
            items.push(item(tokens));
            accesses.push(Access { rows: tokens, reads: vec![0, link], writes: vec![link + 1] });
        }
        items.extend([item(RowSpace::Wanted), Item { stays: true, ..item(RowSpace::Wanted) }]);
        accesses.push(Access { rows: RowSpace::Wanted, reads: vec![8], writes: vec![9] });
        accesses.push(Access { rows: RowSpace::Wanted, reads: vec![9], writes: vec![10] });
        let (buffers, of_item) = assign(&items, &accesses);
        assert_eq!(buffers.len(), 5, "{buffers:?}");
        let mut last_use = vec![0; items.len()];
        for (time, access) in accesses.iter().enumerate() {
            access.reads.iter().for_each(|&read| last_use[read] = time);
        }
        for (time, access) in accesses.iter().enumerate() {
            for other in accesses[..time].iter().map(|before| before.writes[0]) {
                let mine = of_item[access.writes[0]];
                assert!(last_use[other] < time || of_item[other] != mine, "at {time}");
            }
        }
    }
}
