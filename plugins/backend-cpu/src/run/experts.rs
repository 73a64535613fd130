//! Mixtures of experts: rows are grouped by the experts that they are routed to.
//!
//! Every pair of a row and one of its experts has a *place*; places are ordered by expert, so that an expert
//! multiplies successive places. The results of a row's places are summed in the order of experts.

use std::ops::Range;
use std::sync::RwLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use setu_core::Result;

use super::{Compiled, Rows, grain, output};
use crate::matmul::{Activations, ROWS};
use crate::memory::Matrix;
use crate::ops::elementwise;
use crate::plan::{Experts, Phase, Plan};
use crate::pool::Worker;

/// Places that there is memory for, unless one row has more.
const PLACES: usize = 4096;

/// The memory of all expert nodes.
#[derive(Debug)]
pub(super) struct ExpertSpace {
    /// Rows that are worked on at a time.
    rows: usize,
    places_per_row: usize,
    inputs: Vec<Activations>,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    routed: RwLock<Routed>,
    /// Places, and experts that have some: what threads that come late may read at any time.
    places: AtomicUsize,
    busy_experts: AtomicUsize,
}

/// Who is routed where.
#[derive(Debug, Default)]
struct Routed {
    /// Row and weight of each place.
    places: Vec<(usize, f32)>,
    /// Experts with places.
    experts: Vec<(usize, Range<usize>)>,
    /// For each row its places, in the order of experts.
    of_row: Vec<Vec<usize>>,
}

impl ExpertSpace {
    /// # Errors
    /// Memory ran out.
    pub(super) fn new(plan: &Plan, tokens: usize) -> Result<Option<ExpertSpace>> {
        let nodes = plan.body.iter().chain(&plan.tail).filter_map(|phase| match phase {
            Phase::Experts(experts) => Some(experts),
            _ => None,
        });
        let (mut ffn, mut cols) = (0, 0);
        for experts in nodes {
            ffn = ffn.max(experts.ffn);
            cols = cols.max(experts.out.cols);
        }
        if ffn == 0 {
            return Ok(None);
        }
        let places_per_row = plan.experts_per_row.max(1);
        let rows = (PLACES / places_per_row).clamp(1, tokens.max(1));
        let places = rows * places_per_row;
        let input = |&(cols, precision): &(usize, _)| Activations::new(precision, places, cols);
        Ok(Some(ExpertSpace {
            rows,
            places_per_row,
            inputs: plan.activations.iter().map(input).collect::<Result<_>>()?,
            gate: Matrix::zeroed(places, ffn, "experts")?,
            up: Matrix::zeroed(places, ffn, "experts")?,
            down: Matrix::zeroed(places, cols, "experts")?,
            routed: RwLock::default(),
            places: AtomicUsize::new(0),
            busy_experts: AtomicUsize::new(0),
        }))
    }
}

impl Routed {
    /// Groups rows by expert; `weights` gives a row's routing.
    fn fill<'a>(&mut self, rows: Range<usize>, most: usize, weights: impl Fn(usize) -> &'a [f32]) {
        self.places.clear();
        self.experts.clear();
        self.of_row.iter_mut().for_each(Vec::clear);
        if self.of_row.len() < rows.len() {
            self.of_row.resize_with(rows.len(), Vec::new);
        }
        let experts = weights(rows.start).len();
        for expert in 0..experts {
            let start = self.places.len();
            for row in rows.clone() {
                let weight = weights(row)[expert];
                let of_row = &mut self.of_row[row - rows.start];
                if weight != 0.0 && of_row.len() < most {
                    of_row.push(self.places.len());
                    self.places.push((row, weight));
                }
            }
            if self.places.len() > start {
                self.experts.push((expert, start..self.places.len()));
            }
        }
    }

    /// Calls `run` with expert, places and row blocks for `claimed` of all experts' row blocks, `blocks` each.
    fn each_expert(&self, mut claimed: Range<usize>, blocks: usize, run: impl Fn(usize, Range<usize>, Range<usize>)) {
        while claimed.start < claimed.end {
            let (expert, places) = &self.experts[claimed.start / blocks];
            let start = claimed.start % blocks;
            let end = blocks.min(start + claimed.len());
            run(*expert, places.clone(), start..end);
            claimed.start += end - start;
        }
    }
}

impl Compiled {
    pub(super) fn experts(&self, node: &Experts, rows: Rows<'_>, worker: &Worker<'_>) {
        let Some(memory) = &self.experts else { return };
        for start in (0..rows.count).step_by(memory.rows) {
            self.some_rows(node, start..rows.count.min(start + memory.rows), rows, memory, worker);
        }
    }

    fn some_rows(&self, node: &Experts, some: Range<usize>, rows: Rows<'_>, memory: &ExpertSpace, worker: &Worker<'_>) {
        let [gate_input, up_input, down_input] = node.activations;
        worker.share(1, 1, |_| {
            let mut routed = memory.routed.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            let experts = node.matrices.len();
            routed.fill(some.clone(), memory.places_per_row, |row| self.read(&node.routing, rows, row, 0..experts));
            memory.places.store(routed.places.len(), Ordering::Relaxed);
            memory.busy_experts.store(routed.experts.len(), Ordering::Relaxed);
        });
        let places = memory.places.load(Ordering::Relaxed);
        let busy_experts = memory.busy_experts.load(Ordering::Relaxed);
        let routed = || memory.routed.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        worker.share(places, grain(places, worker, 4), |claimed| {
            let routed = routed();
            for place in claimed {
                let input = self.read(&node.input, rows, routed.places[place].0, 0..node.input.cols);
                // SAFETY: a place's input is one task's.
                unsafe {
                    memory.inputs[gate_input].quantize_shared(self.isa, place, 0, input);
                    if up_input != gate_input {
                        memory.inputs[up_input].quantize_shared(self.isa, place, 0, input);
                    }
                }
            }
        });
        let blocks = node.ffn.div_ceil(ROWS);
        worker.share(blocks * busy_experts, grain(blocks * busy_experts, worker, 8), |claimed| {
            routed().each_expert(claimed, blocks, |expert, places, blocks| {
                let cols = blocks.start * ROWS..node.ffn.min(blocks.end * ROWS);
                let [gate, up, _] = node.matrices[expert].map(|matrix| &self.matrices[matrix]);
                // SAFETY: the inputs are only read since they were prepared; these columns of these places are this task's.
                unsafe {
                    let gate_out = output(&memory.gate, places.end);
                    let up_out = output(&memory.up, places.end);
                    node.kernels[0].run(gate, &memory.inputs[gate_input], places.clone(), blocks.clone(), gate_out);
                    node.kernels[1].run(up, &memory.inputs[up_input], places.clone(), blocks, up_out);
                    for place in places {
                        let gate = memory.gate.row_mut(place, cols.clone());
                        elementwise::gate(self.vectors, node.kind, gate, memory.up.row(place, cols.clone()));
                    }
                }
            });
        });
        worker.share(places, grain(places, worker, 4), |claimed| {
            for place in claimed {
                // SAFETY: a place's input is one task's; what is read was written in the phase before.
                unsafe {
                    let inner = memory.gate.row(place, 0..node.ffn);
                    memory.inputs[down_input].quantize_shared(self.isa, place, 0, inner);
                }
            }
        });
        let blocks = node.out.cols.div_ceil(ROWS);
        worker.share(blocks * busy_experts, grain(blocks * busy_experts, worker, 8), |claimed| {
            routed().each_expert(claimed, blocks, |expert, places, blocks| {
                let down = &self.matrices[node.matrices[expert][2]];
                // SAFETY: as above.
                unsafe {
                    let out = output(&memory.down, places.end);
                    node.kernels[2].run(down, &memory.inputs[down_input], places, blocks, out);
                }
            });
        });
        worker.share(some.len(), grain(some.len(), worker, 4), |claimed| {
            let routed = routed();
            for row in claimed {
                let out = self.write(&node.out, some.start + row, 0..node.out.cols);
                out.fill(0.0);
                for &place in &routed.of_row[row] {
                    let weight = routed.places[place].1;
                    // SAFETY: written in the phase before.
                    let result = unsafe { memory.down.row(place, 0..node.out.cols) };
                    for (out, x) in out.iter_mut().zip(result) {
                        *out += weight * x;
                    }
                }
            }
        });
    }
}
