//! Where values lie: in floats, and in halves where products on tensor cores read them.

use std::collections::HashMap;

use setu_core::Graph;
use setu_core::graph::{Op, ValueId};

use crate::fuse::{Kind, Unit};
use crate::ops::Operand;
use crate::product::{Half, Halves, Output};
use crate::storage::{self, Access, Buffer, Item, stride};

/// The memory of a graph's values.
#[derive(Debug)]
pub struct Layout {
    pub buffers: Vec<Buffer>,
    /// Of each value its buffer, and the column of the buffer that it begins at.
    places: Vec<(usize, usize)>,
    cols: Vec<usize>,
    /// Of values in halves their buffers.
    halves: HashMap<(ValueId, Half), usize>,
    /// The kinds of halves that each value is read in.
    wanted: HashMap<ValueId, Vec<Half>>,
    /// Whether somebody reads a value in floats even on tensor cores.
    keeps_floats: Vec<bool>,
    /// Where the buffers are: filled in when they are allocated.
    pub addresses: Vec<u64>,
}

/// Whether the unit is a slice that needs no copy.
fn is_view(graph: &Graph, unit: &Unit<'_>) -> bool {
    let Kind::Node(node) = unit.kind else { return false };
    let Op::Slice { start, .. } = node.op else { return false };
    start % 8 == 0 && graph.value(node.outputs[0]).rows == graph.value(node.inputs[0]).rows
}

impl Layout {
    /// Lays out what `units` compute; `dense` tells of a unit in which halves it reads its first input on tensor cores.
    pub fn new(graph: &Graph, units: &[Unit<'_>], dense: &dyn Fn(&Unit<'_>) -> Option<Half>) -> Layout {
        let mut items: Vec<Item> = Vec::new();
        let mut places = vec![(usize::MAX, 0); graph.values.len()];
        let cols: Vec<usize> = graph.values.iter().map(|value| value.cols as usize).collect();
        let of = |value: ValueId| value.0 as usize;
        for unit in units.iter().filter(|unit| !unit.inputs.is_empty() || !unit.outputs.is_empty()) {
            if let (true, Kind::Node(node)) = (is_view(graph, unit), &unit.kind) {
                let start = if let Op::Slice { start, .. } = node.op { start as usize } else { 0 };
                let (item, column) = places[of(node.inputs[0])];
                places[of(node.outputs[0])] = (item, column + start);
                continue;
            }
            let mut column = 0;
            for &output in &unit.outputs {
                if column == 0 || !unit.is_of_siblings() {
                    items.push(Item { rows: graph.value(output).rows, words: 0, stays: false });
                    column = 0;
                }
                let item = items.len() - 1;
                places[of(output)] = (item, column);
                column += cols[of(output)];
                items[item].words = stride(column);
            }
        }
        graph.outputs.iter().for_each(|output| items[places[of(output.value)].0].stays = true);

        let mut keeps_floats = vec![false; graph.values.len()];
        graph.outputs.iter().for_each(|output| keeps_floats[of(output.value)] = true);
        let mut halves: HashMap<(ValueId, Half), usize> = HashMap::new();
        let mut wanted: HashMap<ValueId, Vec<Half>> = HashMap::new();
        for unit in units {
            let half = dense(unit);
            for (index, &input) in unit.inputs.iter().enumerate() {
                let Some(half) = half.filter(|_| index == 0) else {
                    keeps_floats[of(input)] = true;
                    continue;
                };
                let (rows, words) = (graph.value(input).rows, stride(cols[of(input)]) / 2);
                halves.entry((input, half)).or_insert_with(|| {
                    items.push(Item { rows, words, stays: false });
                    wanted.entry(input).or_default().push(half);
                    items.len() - 1
                });
            }
        }
        let access = |unit: &Unit<'_>| {
            let mut reads: Vec<usize> = unit.inputs.iter().map(|&input| places[of(input)].0).collect();
            if let Some(half) = dense(unit) {
                reads.push(halves[&(unit.inputs[0], half)]);
            }
            let mut writes: Vec<usize> = Vec::new();
            if !is_view(graph, unit) {
                writes.extend(unit.outputs.iter().map(|&output| places[of(output)].0));
                writes.dedup();
            }
            for output in &unit.outputs {
                let kinds = wanted.get(output).into_iter().flatten();
                writes.extend(kinds.map(|&half| halves[&(*output, half)]));
            }
            Access { rows: unit.rows, reads, writes }
        };
        let accesses: Vec<Access> = units.iter().map(access).collect();
        let (buffers, of_item) = storage::assign(&items, &accesses);
        let place = |&(item, column): &(usize, usize)| (of_item.get(item).copied().unwrap_or(usize::MAX), column);
        Layout {
            addresses: vec![0; buffers.len()],
            places: places.iter().map(place).collect(),
            halves: halves.into_iter().map(|(key, item)| (key, of_item[item])).collect(),
            buffers,
            cols,
            wanted,
            keeps_floats,
        }
    }

    /// A value in floats.
    pub fn value(&self, id: ValueId) -> Operand {
        let (buffer, column) = self.places[id.0 as usize];
        let address = self.addresses.get(buffer).map_or(0, |address| address + 4 * column as u64);
        let words = self.buffers.get(buffer).map_or(0, |buffer| buffer.words);
        Operand { address, stride: words, cols: self.cols[id.0 as usize] }
    }

    /// A value in halves, if somebody reads it so.
    pub fn halves(&self, id: ValueId, half: Half) -> Option<Halves> {
        let &buffer = self.halves.get(&(id, half))?;
        Some(Halves { address: self.addresses[buffer], stride: 2 * self.buffers[buffer].words, half })
    }

    /// Where a unit writes a value that it may write in halves as well; and the kinds of halves that are left to do.
    pub fn output(&self, id: ValueId) -> (Output, Vec<Halves>) {
        let mut halves = self.wanted_of(id);
        let first = if halves.is_empty() { None } else { Some(halves.remove(0)) };
        let keeps_floats = self.keeps_floats[id.0 as usize] || !halves.is_empty();
        (Output { floats: self.value(id), halves: first, keeps_floats }, halves)
    }

    /// All halves that a value is read in.
    pub fn wanted_of(&self, id: ValueId) -> Vec<Halves> {
        let kinds = self.wanted.get(&id).into_iter().flatten();
        kinds.filter_map(|&half| self.halves(id, half)).collect()
    }

    /// Whether the unit needs no launch.
    pub fn is_view(&self, graph: &Graph, unit: &Unit<'_>) -> bool {
        is_view(graph, unit)
    }
}
