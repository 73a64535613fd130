//! Which values share memory.
//!
//! A graph's nodes run in two stages: those with a row for each token, once; then those with a row for each wanted
//! output, in passes of a few wants, because logits of a whole prompt would take gigabytes. Values of a stage that
//! never meet share a buffer.

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

/// Memory that several values share in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    pub rows: RowSpace,
    /// Elements of a row.
    pub stride: usize,
}

/// Gives each value of a graph a buffer: the buffers, and of each value which it has.
pub fn assign(graph: &Graph) -> (Vec<Buffer>, Vec<usize>) {
    // The order in which nodes run.
    let stages = [RowSpace::Tokens, RowSpace::Wanted];
    let order: Vec<&Node> =
        stages.iter().flat_map(|&rows| graph.nodes.iter().filter(move |node| stage(graph, node) == rows)).collect();
    let mut dies = vec![0; graph.values.len()];
    for (time, node) in order.iter().enumerate() {
        for &value in node.inputs.iter().chain(&node.outputs) {
            // What the wanted stage reads of the first is read by every pass.
            let crosses = graph.value(value).rows != stage(graph, node);
            dies[value.0 as usize] = if crosses { usize::MAX } else { dies[value.0 as usize].max(time) };
        }
    }
    for output in &graph.outputs {
        dies[output.value.0 as usize] = usize::MAX;
    }
    let mut buffers: Vec<Buffer> = Vec::new();
    let mut busy_until: Vec<usize> = Vec::new();
    let mut of_value = vec![usize::MAX; graph.values.len()];
    for (time, node) in order.iter().enumerate() {
        for &output in &node.outputs {
            let value = graph.value(output);
            let wanted = stride(value.cols as usize);
            let free = (0..buffers.len()).filter(|&at| buffers[at].rows == value.rows && busy_until[at] < time);
            // The one that fits best; if none does, the largest grows.
            let best = free.min_by_key(|&at| {
                let stride = buffers[at].stride;
                if stride >= wanted { (false, stride - wanted) } else { (true, wanted - stride) }
            });
            let at = best.unwrap_or_else(|| {
                buffers.push(Buffer { rows: value.rows, stride: 0 });
                busy_until.push(0);
                buffers.len() - 1
            });
            buffers[at].stride = buffers[at].stride.max(wanted);
            busy_until[at] = dies[output.0 as usize];
            of_value[output.0 as usize] = at;
        }
    }
    (buffers, of_value)
}

#[cfg(test)]
mod tests {
    use setu_core::graph::{ActivationKind, GraphBuilder, Op, Shard};

    use super::*;

    #[test]
    fn values_that_never_meet_share_a_buffer_and_those_that_do_never() {
        let mut g = GraphBuilder::new("chain", 10, 8);
        let table = g.weight("embed", "e", &[10, 12], Shard::Replicated);
        let first = g.embed("embed", table).unwrap();
        let op = Op::Activation { kind: ActivationKind::Relu };
        let mut x = first;
        for layer in 0..4 {
            let y = g.node(&format!("relu.{layer}"), op.clone(), &[x]).unwrap()[0];
            x = g.add(&format!("add.{layer}"), first, y).unwrap();
        }
        let x = g.select("select", x).unwrap();
        let head = g.weight("head", "h", &[10, 12], Shard::Replicated);
        let logits = g.linear("logits", x, head, None).unwrap();
        g.output("logits", logits);
        let graph = g.finish().unwrap();
        let (buffers, of_value) = assign(&graph);
        // The first value lives on; the others take turns in two buffers; selected rows and logits have their own.
        assert_eq!(buffers.len(), 5, "{buffers:?}");
        assert!(buffers.iter().all(|buffer| buffer.stride == 16));
        let mut last_use = vec![0; graph.values.len()];
        for (time, node) in graph.nodes.iter().enumerate() {
            node.inputs.iter().for_each(|input| last_use[input.0 as usize] = time);
        }
        for (time, node) in graph.nodes.iter().enumerate() {
            let mine = of_value[node.outputs[0].0 as usize];
            for other in 0..graph.values.len() {
                let computed = graph.nodes[..time].iter().any(|node| node.outputs[0].0 as usize == other);
                assert!(!computed || last_use[other] < time || of_value[other] != mine, "{}", node.name);
            }
        }
    }
}
