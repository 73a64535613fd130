//! Running a step: every thread goes through the plan's phases and takes its share of each.
//!
//! All memory that phases touch belongs to [`Compiled`]. Two rules make the shared writes sound: within a phase
//! every element is written by one task and read by no other, and a phase begins when the one before it is done. Since
//! a thread may come late to a phase, shared memory is read and written in tasks only. A phase of rows shares out
//! rows, a matmul columns, attention tiles.

mod experts;

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};

use setu_core::Result;
use setu_core::backend::{StepLimits, Want};
use setu_core::graph::{RopeTable, RowSpace};
use setu_core::sampling::SlotState;

use self::experts::ExpertSpace;
use crate::kv::Pages;
use crate::matmul::{Activations, Isa, Output, PackedMatrix, ROWS};
use crate::memory::{LINE_BYTES, Matrix};
use crate::ops::attention::{self, Io, Tiling};
use crate::ops::{elementwise, rope};
use crate::plan::{AttentionPhase, Bundle, Element, ElementKind, Matmul, Operand, Phase, Plan, RowKind, RowOp};
use crate::pool::{self, Worker};
use crate::sampler::{self, Outputs};
use crate::step::StepData;
use crate::vector::{self, Vectors};
use crate::weights::Table;

/// Rows up to which every thread prepares a matmul's input for itself, which is quicker than to meet once more.
const PRIVATE_ROWS: usize = 2;
/// Most wanted rows that the tail runs for at a time.
const TAIL_ROWS: usize = 64;

/// Rows that a matmul's results are finished for before the next.
const ROWS_AT_ONCE: usize = 64;

/// How much of each of the next matmul's matrices a thread asks for while it waits for others.
const ASKED_BYTES: usize = 16 << 10;

/// A plan with its weights and all the memory that steps need.
#[derive(Debug)]
pub struct Compiled {
    isa: Isa,
    vectors: Vectors,
    plan: Plan,
    matrices: Vec<PackedMatrix>,
    tables: Vec<Table>,
    ropes: Vec<RopeTable>,
    pub pages: Pages,
    buffers: Vec<Matrix>,
    angles: Vec<Matrix>,
    /// Inputs of matmuls, one for each of [`Plan::activations`].
    inputs: Vec<Activations>,
    experts: Option<ExpertSpace>,
    tilings: Vec<Tiling>,
    partials: Matrix,
    partial_cols: usize,
    tail_rows: usize,
    vocab: usize,
    threads: Vec<Mutex<ThreadSpace>>,
    pub slots: Vec<Mutex<SlotState>>,
}

/// What a graph's checkpoint and hyper-parameters come to.
#[derive(Debug)]
pub struct Constants {
    pub matrices: Vec<PackedMatrix>,
    pub tables: Vec<Table>,
    pub ropes: Vec<RopeTable>,
}

/// What a thread works with alone.
#[derive(Debug)]
struct ThreadSpace {
    row: Vec<f32>,
    inputs: Vec<Activations>,
    attention: attention::Scratch,
    sampler: sampler::Scratch,
    chosen: Vec<(usize, f32)>,
}

/// The rows that a phase runs for.
#[derive(Clone, Copy)]
struct Rows<'a> {
    count: usize,
    /// The token of each row.
    tokens: Option<&'a [u32]>,
}

impl Rows<'_> {
    /// Where row `row` of the phase lies in an operand's buffer.
    fn of(&self, operand: &Operand, row: usize) -> usize {
        match self.tokens {
            Some(tokens) if operand.gather => tokens[row] as usize,
            _ => row,
        }
    }
}

impl Compiled {
    /// Allocates what the plan needs for steps within `limits`.
    ///
    /// # Errors
    /// Memory ran out.
    pub fn new(
        isa: Isa,
        plan: Plan,
        constants: Constants,
        pages: Pages,
        limits: &StepLimits,
        threads: usize,
    ) -> Result<Compiled> {
        let Constants { matrices, tables, ropes } = constants;
        let tokens = limits.tokens as usize;
        let tail_rows = TAIL_ROWS.min(tokens);
        let buffer = |spec: &crate::plan::BufferSpec| {
            let rows = if spec.space == RowSpace::Tokens { tokens } else { tail_rows };
            Matrix::zeroed(rows, spec.cols, "activations")
        };
        let inputs_for = |tokens: usize| -> Result<Vec<Activations>> {
            plan.activations.iter().map(|&(cols, precision)| Activations::new(precision, tokens, cols)).collect()
        };
        let widest = plan.buffers.iter().map(|buffer| buffer.cols).max().unwrap_or(0);
        let thread = || -> Result<Mutex<ThreadSpace>> {
            Ok(Mutex::new(ThreadSpace {
                row: vec![0.0; widest],
                inputs: inputs_for(PRIVATE_ROWS)?,
                attention: attention::Scratch::default(),
                sampler: sampler::Scratch::default(),
                chosen: Vec::new(),
            }))
        };
        let tiling = |key: &attention::TilingKey| Tiling::new(*key, pages.groups[key.kv_group].window);
        let partial_cols = plan.body.iter().map(|phase| match phase {
            Phase::Attention(phase) => 2 + phase.attention.v_dim.next_multiple_of(vector::LANES),
            _ => 0,
        });
        Ok(Compiled {
            isa,
            vectors: Vectors::of(isa),
            buffers: plan.buffers.iter().map(buffer).collect::<Result<_>>()?,
            angles: ropes
                .iter()
                .map(|rope| Matrix::zeroed(tokens, 2 * rope.inv_freq.len(), "rope angles"))
                .collect::<Result<_>>()?,
            inputs: inputs_for(tokens)?,
            experts: ExpertSpace::new(&plan, tokens)?,
            tilings: plan.tilings.iter().map(tiling).collect(),
            partials: Matrix::zeroed(0, 0, "attention")?,
            partial_cols: partial_cols.max().unwrap_or(0),
            tail_rows,
            vocab: limits.vocab as usize,
            threads: (0..threads).map(|_| thread()).collect::<Result<_>>()?,
            slots: (0..limits.slots).map(|_| Mutex::default()).collect(),
            plan,
            matrices,
            tables,
            ropes,
            pages,
        })
    }

    pub fn weight_bytes(&self) -> usize {
        self.matrices.iter().map(PackedMatrix::byte_len).sum()
    }

    pub fn workspace_bytes(&self) -> usize {
        self.buffers.iter().chain(&self.angles).map(Matrix::byte_len).sum()
    }

    /// Shares `step` out; the last thing before threads [run](Compiled::run) it.
    ///
    /// # Errors
    /// Memory ran out.
    pub fn prepare(&mut self, step: &StepData) -> Result<()> {
        let (geometry, threads) = (self.pages.geometry, self.threads.len());
        let partials = self.tilings.iter_mut().map(|tiling| tiling.plan(step, geometry, threads)).max();
        let partials = partials.unwrap_or(0);
        if partials > self.partials.rows() {
            self.partials = Matrix::zeroed(partials.next_power_of_two(), self.partial_cols, "attention")?;
        }
        for (slot, state) in &step.opened {
            *self.slots[*slot as usize].get_mut().unwrap_or_else(std::sync::PoisonError::into_inner) = state.clone();
        }
        for &(group, from, to) in &step.copies {
            // SAFETY: `&mut self` keeps all others out.
            unsafe { self.pages.copy(group, from, to) };
        }
        Ok(())
    }

    /// Runs this thread's share of what comes before the wanted rows of `step`.
    ///
    /// # Safety
    /// All threads of one team call this with the same arguments, after one [`prepare`](Compiled::prepare) for the step.
    pub unsafe fn run_body(&self, step: &StepData, worker: &Worker<'_>) {
        let mut space = self.space(worker);
        let all = Rows { count: step.tokens(), tokens: None };
        if all.count > 0 {
            self.angles(step, worker);
            self.phases(&self.plan.body, &self.plan.tail, step, all, worker, &mut space);
        }
    }

    /// Runs this thread's share of the wanted rows of `step`, writing what it samples to `sampled`.
    ///
    /// # Safety
    /// All threads of one team call this with the same arguments, after [`run_body`](Compiled::run_body) for the step.
    pub unsafe fn run_tail(&self, step: &StepData, outputs: &Outputs, sampled: &[AtomicU32], worker: &Worker<'_>) {
        let mut space = self.space(worker);
        let space = &mut *space;
        for first in (0..step.wants.len()).step_by(self.tail_rows) {
            let wants = first..step.wants.len().min(first + self.tail_rows);
            let rows = Rows { count: wants.len(), tokens: Some(&step.want_tokens[wants.clone()]) };
            self.phases(&self.plan.tail, &[], step, rows, worker, space);
            self.sample(step, wants, outputs, sampled, worker, space);
        }
    }

    fn space(&self, worker: &Worker<'_>) -> MutexGuard<'_, ThreadSpace> {
        self.threads[worker.index].lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn angles(&self, step: &StepData, worker: &Worker<'_>) {
        worker.share(step.tokens(), grain(step.tokens(), worker, 4), |tokens| {
            for token in tokens {
                for (rope, angles) in self.ropes.iter().zip(&self.angles) {
                    // SAFETY: a token's angles are one task's.
                    let out = unsafe { angles.row_mut(token, 0..2 * rope.inv_freq.len()) };
                    rope::angles(rope, step.token_position(token) as u32, out);
                }
            }
        });
    }

    /// Runs `phases`, which `then` come after.
    fn phases(
        &self,
        phases: &[Phase],
        then: &[Phase],
        step: &StepData,
        rows: Rows<'_>,
        worker: &Worker<'_>,
        space: &mut ThreadSpace,
    ) {
        for (index, phase) in phases.iter().enumerate() {
            let next = phases[index + 1..].iter().chain(then).find_map(|phase| match phase {
                Phase::Matmul(matmul) => Some(matmul),
                _ => None,
            });
            self.phase(phase, next, step, rows, worker, space);
        }
    }

    /// Runs a phase; `next` is the matmul after it.
    fn phase(
        &self,
        phase: &Phase,
        next: Option<&Matmul>,
        step: &StepData,
        rows: Rows<'_>,
        worker: &Worker<'_>,
        space: &mut ThreadSpace,
    ) {
        match phase {
            Phase::Rows(ops) => worker.share(rows.count, grain(rows.count, worker, 4), |claimed| {
                for row in claimed {
                    ops.iter().for_each(|op| self.row_op(op, step, rows, row, space));
                }
            }),
            Phase::Matmul(matmul) => self.matmul(matmul, next, rows, worker, space),
            Phase::Attention(phase) => self.attention(phase, step, worker, space),
            Phase::Experts(experts) => self.experts(experts, rows, worker),
        }
    }

    fn attention(&self, phase: &AttentionPhase, step: &StepData, worker: &Worker<'_>, space: &mut ThreadSpace) {
        let io = Io {
            vectors: self.vectors,
            step,
            pages: &self.pages,
            tiling: &self.tilings[phase.attention.tiling],
            angles: &self.angles,
            q: &self.buffers[phase.q.buffer],
            k: &self.buffers[phase.k.buffer],
            v: &self.buffers[phase.v.buffer],
            out: &self.buffers[phase.out.buffer],
            partials: &self.partials,
        };
        // SAFETY: every thread of the team comes here with these arguments; what the phase writes are its output
        // and the pages, which no other phase touches meanwhile.
        unsafe { phase.attention.run(io, worker, &mut space.attention) };
    }

    /// An operand's row `row` of the phase.
    fn read(&self, operand: &Operand, rows: Rows<'_>, row: usize, cols: Range<usize>) -> &[f32] {
        let row = rows.of(operand, row);
        // SAFETY: called in tasks; what a phase reads was written in earlier ones, or in this one by this task; in-place
        // ops never read through this what they write.
        unsafe { self.buffers[operand.buffer].row(row, cols) }
    }

    /// Row `row` of a phase's output.
    #[allow(clippy::mut_from_ref, reason = "threads write disjoint parts of shared buffers")]
    fn write(&self, operand: &Operand, row: usize, cols: Range<usize>) -> &mut [f32] {
        // SAFETY: called in tasks; the phase gave these elements to this one, which holds no other slice of them.
        unsafe { self.buffers[operand.buffer].row_mut(row, cols) }
    }

    fn row_op(&self, op: &RowOp, step: &StepData, rows: Rows<'_>, row: usize, space: &mut ThreadSpace) {
        let vectors = self.vectors;
        let cols = 0..op.out.cols;
        if let (RowKind::Element(kind), Some(input)) = (&op.kind, op.input) {
            self.element(&Element { kind: *kind, input, out: op.out }, rows, row, cols);
            return;
        }
        let out = self.write(&op.out, row, cols);
        let input = |cols: Range<usize>| op.input.map_or(&[][..], |input| self.read(&input, rows, row, cols));
        match &op.kind {
            RowKind::Embed { table, scale } => {
                let token = rows.tokens.map_or(row, |tokens| tokens[row] as usize);
                self.tables[*table].row(step.token_ids()[token] as usize, out);
                if *scale != 1.0 {
                    vector::scale(vectors, out, *scale);
                }
            }
            RowKind::Norm(norm) => norm.apply(vectors, input(0..out.len()), out),
            RowKind::Rope { rotation, head_dim } => {
                out.copy_from_slice(input(0..out.len()));
                let token = rows.tokens.map_or(row, |tokens| tokens[row] as usize);
                // SAFETY: angles are only read since the first phase.
                let angles = unsafe { self.angles[rotation.table].row(token, 0..rotation.cols) };
                for head in out.chunks_exact_mut(*head_dim) {
                    rope::rotate(vectors, rotation.style, head, angles);
                }
            }
            RowKind::Slice { start } => out.copy_from_slice(input(*start..*start + out.len())),
            RowKind::Route(router) => {
                out.copy_from_slice(input(0..out.len()));
                router.route(vectors, out, &mut space.chosen);
            }
            RowKind::Element(_) | RowKind::Copy => out.copy_from_slice(input(0..out.len())),
        }
    }

    /// Runs an elementwise op on columns `cols` of a row.
    fn element(&self, element: &Element, rows: Rows<'_>, row: usize, cols: Range<usize>) {
        let vectors = self.vectors;
        let out = self.write(&element.out, row, cols.clone());
        if element.out.buffer != element.input.buffer {
            out.copy_from_slice(self.read(&element.input, rows, row, cols.clone()));
        }
        match &element.kind {
            ElementKind::Activation(kind) => elementwise::activate(vectors, *kind, out),
            ElementKind::Gated(kind, up) => elementwise::gate(vectors, *kind, out, self.read(up, rows, row, cols)),
            ElementKind::Add(other) => vector::add(vectors, out, self.read(other, rows, row, cols)),
            ElementKind::Mul(other) => vector::mul(vectors, out, self.read(other, rows, row, cols)),
            ElementKind::Scale(by) => vector::scale(vectors, out, *by),
            ElementKind::Softcap(cap) => vector::softcap(vectors, out, *cap),
        }
    }

    fn matmul(
        &self,
        matmul: &Matmul,
        next: Option<&Matmul>,
        rows: Rows<'_>,
        worker: &Worker<'_>,
        space: &mut ThreadSpace,
    ) {
        let mut prepare = |row: usize, inputs: &[Activations]| {
            let cols = matmul.input.cols;
            let mut input = self.read(&matmul.input, rows, row, 0..cols);
            if let Some(norm) = &matmul.norm {
                let normed = &mut space.row[..cols];
                norm.apply(self.vectors, input, normed);
                input = normed;
            }
            for &activation in &matmul.activations {
                // SAFETY: this row of these inputs is this thread's.
                unsafe { inputs[activation].quantize_shared(self.isa, row, 0, input) };
            }
        };
        let private = rows.count <= PRIVATE_ROWS;
        if !private {
            worker.share(rows.count, grain(rows.count, worker, 4), |claimed| {
                claimed.for_each(|row| prepare(row, &self.inputs));
            });
        }
        let inputs = if private { &space.inputs } else { &self.inputs };
        let mut prepared = !private;
        let total = matmul.row_blocks();
        // Few tokens go through long stretches of the weights, many stay with what the caches hold of them.
        let small = grain(total, worker, if private { 6 } else { 16 });
        let grains = small..=if private { total.max(small) } else { small };
        let run = |claimed: Range<usize>| {
            if !prepared {
                (0..rows.count).for_each(|row| prepare(row, inputs));
                prepared = true;
            }
            let mut start = 0;
            for bundle in &matmul.bundles {
                let end = start + bundle.cols.div_ceil(ROWS);
                let (from, to) = (claimed.start.max(start), claimed.end.min(end));
                if from < to {
                    self.bundle(bundle, inputs, rows, from - start..to - start);
                }
                start = end;
            }
        };
        let mut asked = 0;
        worker.share_spans(total, grains, run, || {
            if let Some(next) = next
                && asked < ASKED_BYTES
            {
                self.ask_for(next, worker, asked);
                asked += LINE_BYTES;
            }
        });
    }

    /// Row blocks `blocks` of a bundle for all rows, and what is done to their columns. These are this thread's.
    fn bundle(&self, bundle: &Bundle, inputs: &[Activations], rows: Rows<'_>, blocks: Range<usize>) {
        let cols = blocks.start * ROWS..bundle.cols.min(blocks.end * ROWS);
        // What was just computed is near when elementwise ops read it.
        for first in (0..rows.count).step_by(ROWS_AT_ONCE) {
            let tokens = first..rows.count.min(first + ROWS_AT_ONCE);
            for part in &bundle.parts {
                let (weights, input) = (&self.matrices[part.matrix], &inputs[part.activation]);
                let output = self.output(&part.out, rows.count);
                // SAFETY: the inputs are only read since they were prepared; these columns are this thread's.
                unsafe { part.kernel.run(weights, input, tokens.clone(), blocks.clone(), output) };
            }
            for row in tokens {
                for part in &bundle.parts {
                    if let Some(bias) = &part.bias {
                        let out = self.write(&part.out, row, cols.clone());
                        vector::add(self.vectors, out, &bias[cols.clone()]);
                    }
                }
                for element in &bundle.elements {
                    self.element(element, rows, row, cols.clone());
                }
            }
        }
    }

    /// Asks for the weights that this thread reads `byte` bytes after it begins with `matmul`.
    fn ask_for(&self, matmul: &Matmul, worker: &Worker<'_>, byte: usize) {
        let mut block = pool::span(worker.index, worker.threads(), matmul.row_blocks()).start;
        for bundle in &matmul.bundles {
            let blocks = bundle.cols.div_ceil(ROWS);
            if block < blocks {
                bundle.parts.iter().for_each(|part| self.matrices[part.matrix].prefetch(block, byte));
                return;
            }
            block -= blocks;
        }
    }

    /// A buffer as a kernel's output.
    fn output(&self, operand: &Operand, rows: usize) -> Output<'_> {
        output(&self.buffers[operand.buffer], rows)
    }

    fn sample(
        &self,
        step: &StepData,
        wants: Range<usize>,
        outputs: &Outputs,
        sampled: &[AtomicU32],
        worker: &Worker<'_>,
        space: &mut ThreadSpace,
    ) {
        let slot_of = |index: usize| {
            let want = step.wants[index];
            want.has(Want::SAMPLE).then(|| step.slot(want.row as usize))
        };
        worker.share(wants.len(), 1, |claimed| {
            let first = wants.start + claimed.start;
            let slot = slot_of(first);
            // A slot that is sampled several times belongs to the task that has its first want.
            if slot.is_some() && (wants.start..first).any(|earlier| slot_of(earlier) == slot) {
                return;
            }
            for (index, sampled) in sampled.iter().enumerate().take(wants.end).skip(first) {
                if index != first && (slot.is_none() || slot_of(index) != slot) {
                    continue;
                }
                // SAFETY: the logits were written in the phase before, and this want is this task's.
                unsafe {
                    let logits = self.buffers[self.plan.logits].row(index - wants.start, 0..self.vocab);
                    let (vectors, scratch) = (self.vectors, &mut space.sampler);
                    let token = sampler::answer(vectors, step, index, logits, &self.slots, outputs, scratch);
                    if let Some(token) = token {
                        sampled.store(token, Ordering::Relaxed);
                    }
                }
            }
        });
    }
}

/// `rows` rows of a matrix as a kernel's output.
fn output(matrix: &Matrix, rows: usize) -> Output<'_> {
    let len = rows * matrix.stride();
    // SAFETY: the matrix has these rows; kernels write through the pointer only what `Kernel::run` names.
    unsafe { Output::from_raw(matrix.as_mut_ptr(rows), len, matrix.stride()) }
}

/// Tasks that a thread claims at once, so that each claims about `shares` times.
fn grain(total: usize, worker: &Worker<'_>, shares: usize) -> usize {
    match worker.threads() {
        1 => total.max(1),
        threads => total.div_ceil(threads * shares).max(1),
    }
}
