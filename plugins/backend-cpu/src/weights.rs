//! Weights on their way from the checkpoint into packed matrices.

use std::sync::Mutex;

use setu_core::backend::WeightData;
use setu_core::graph::WeightId;
use setu_core::{DType, Error, Graph, Result};

use crate::machine;
use crate::matmul::{PackedFormat, PackedMatrix, Precision, ROWS, Source, dequantize_row};
use crate::pool::Pool;

/// Bytes of packed weights that a thread takes on at a time.
const TASK_BYTES: usize = 256 << 10;

/// The checkpoint's weights, and which of them are to be packed.
#[derive(Debug)]
pub struct Weights<'a> {
    graph: &'a Graph,
    data: &'a [WeightData<'a>],
    packing: Vec<Packing>,
    tables: Vec<WeightId>,
}

/// Rows of a weight that become a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packing {
    weight: WeightId,
    /// Index of the matrix where the weight has several.
    matrix: usize,
    format: PackedFormat,
    rows: usize,
    cols: usize,
}

/// Rows of a weight as they lie in the checkpoint.
#[derive(Debug)]
pub struct Table {
    dtype: DType,
    row_bytes: usize,
    /// Start and length of each part.
    parts: Vec<(*const u8, usize)>,
}

// SAFETY: the bytes are only read, and stay mapped while the executable lives, as the contract says.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

impl<'a> Weights<'a> {
    /// # Errors
    /// A weight's data isn't as long as its shape says.
    pub fn new(graph: &'a Graph, data: &'a [WeightData<'a>]) -> Result<Weights<'a>> {
        if data.len() != graph.weights.len() {
            let (given, wanted) = (data.len(), graph.weights.len());
            return Err(Error::contract(format!("data of {given} weights for a graph of {wanted}")));
        }
        for (weight, data) in graph.weights.iter().zip(data) {
            let fail = |what: String| Err(Error::invalid(format!("weight `{}`: {what}", weight.name)));
            let cols = weight.shape.last().copied().unwrap_or(0);
            let (Some(bytes), Some(row_bytes)) = (data.dtype.size_of(&weight.shape), data.dtype.size_of(&[cols]))
            else {
                return fail(format!("rows of {cols} elements are no whole number of {} blocks", data.dtype));
            };
            if data.parts.iter().map(|part| part.len()).sum::<usize>() != bytes {
                return fail(format!("{:?} in {} takes {bytes} bytes, the data has others", weight.shape, data.dtype));
            }
            if row_bytes == 0 || data.parts.iter().any(|part| part.len() % row_bytes != 0) {
                return fail("a part is no whole number of rows".to_owned());
            }
        }
        Ok(Weights { graph, data, packing: Vec::new(), tables: Vec::new() })
    }

    pub fn dtype(&self, id: WeightId) -> DType {
        self.data[id.0 as usize].dtype
    }

    /// A vector, as f32.
    pub fn vector(&self, id: WeightId) -> Result<Vec<f32>> {
        let data = &self.data[id.0 as usize];
        let mut values = vec![0.0; self.graph.weight(id).shape.iter().product()];
        let bytes = data.parts.concat();
        dequantize_row(data.dtype, &bytes, &mut values).map_err(|error| error.within(&self.graph.weight(id).name))?;
        Ok(values)
    }

    /// The index of a weight's matrix, packed for activations of `precision`; of the `matrix`-th where its shape has
    /// three dimensions.
    pub fn matrix(&mut self, id: WeightId, matrix: usize, precision: Precision) -> usize {
        let shape = &self.graph.weight(id).shape;
        let (rows, cols) = (shape[shape.len() - 2], shape[shape.len() - 1]);
        let format = PackedFormat::new(self.dtype(id), precision);
        let packing = Packing { weight: id, matrix, format, rows, cols };
        let known = self.packing.iter().position(|known| *known == packing);
        known.unwrap_or_else(|| {
            self.packing.push(packing);
            self.packing.len() - 1
        })
    }

    /// The index of a weight's [`Table`].
    pub fn table(&mut self, id: WeightId) -> usize {
        let known = self.tables.iter().position(|known| *known == id);
        known.unwrap_or_else(|| {
            self.tables.push(id);
            self.tables.len() - 1
        })
    }

    /// The tables that were asked for.
    pub fn tables(&self) -> Vec<Table> {
        let table = |id: &WeightId| {
            let data = &self.data[id.0 as usize];
            let cols = self.graph.weight(*id).shape.last().copied().unwrap_or(0);
            Table {
                dtype: data.dtype,
                row_bytes: data.dtype.size_of(&[cols]).unwrap_or(0),
                parts: data.parts.iter().map(|part| (part.as_ptr(), part.len())).collect(),
            }
        };
        self.tables.iter().map(table).collect()
    }

    /// Packs the matrices that were asked for, on all threads. What was packed is given back to the system, which
    /// reads it from the file again where a table is looked up: the weights are never in memory twice.
    ///
    /// # Errors
    /// A format isn't known or memory ran out; the message names the weight.
    pub fn pack(&self, pool: &mut Pool) -> Result<Vec<PackedMatrix>> {
        let name = |packing: &Packing| &self.graph.weight(packing.weight).name;
        let mut matrices = Vec::with_capacity(self.packing.len());
        let mut parts = Vec::with_capacity(self.packing.len());
        for packing in &self.packing {
            let matrix = PackedMatrix::zeroed(packing.format, packing.rows, packing.cols);
            matrices.push(matrix.map_err(|error| error.within(name(packing)))?);
            parts.push(self.rows_of(packing));
        }
        let mapped = machine::file_mappings();
        let mut tasks = Vec::new();
        for ((matrix, packing), parts) in matrices.iter_mut().zip(&self.packing).zip(&parts) {
            let source = Source::new(packing.format, packing.cols, parts);
            let source = source.map_err(|error| error.within(name(packing)))?;
            let mut blocks = matrix.blocks_mut().enumerate().peekable();
            while let Some((_, block)) = blocks.peek() {
                let count = (TASK_BYTES / block.len().max(1)).max(1);
                tasks.push((source, packing, parts, blocks.by_ref().take(count).collect::<Vec<_>>()));
            }
        }
        // Threads take tasks from the end, so that they walk through the file in its order.
        tasks.reverse();
        let (tasks, failure) = (Mutex::new(tasks), Mutex::new(None));
        pool.run(|_| {
            while let Some((source, packing, parts, blocks)) = lock(&tasks).pop() {
                let first = blocks.first().map_or(0, |(index, _)| index * ROWS);
                let end = packing.rows.min(first + blocks.len() * ROWS);
                for (index, block) in blocks {
                    if let Err(error) = source.pack_block(index, block) {
                        lock(&failure).get_or_insert(error.within(name(packing)));
                        return;
                    }
                }
                if let [part] = parts[..] {
                    let row_bytes = part.len() / packing.rows.max(1);
                    machine::drop_pages(&part[first * row_bytes..end * row_bytes], &mapped);
                }
            }
        });
        let failure = lock(&failure).take();
        failure.map_or(Ok(()), Err)?;
        Ok(matrices)
    }

    /// The bytes of a matrix, as far as they lie together.
    fn rows_of(&self, packing: &Packing) -> Vec<&'a [u8]> {
        let data = &self.data[packing.weight.0 as usize];
        let bytes = data.dtype.size_of(&[packing.rows, packing.cols]).unwrap_or(0);
        let mut skip = packing.matrix * bytes;
        let mut left = bytes;
        let mut found = Vec::new();
        for part in &data.parts {
            let start = skip.min(part.len());
            let end = part.len().min(start + left);
            skip -= start;
            left -= end - start;
            if end > start {
                found.push(&part[start..end]);
            }
        }
        found
    }
}

impl Table {
    /// Writes row `row` as f32 to `out`.
    ///
    /// # Panics
    /// There is no such row, or it isn't as long as `out`.
    pub fn row(&self, mut row: usize, out: &mut [f32]) {
        for &(start, len) in &self.parts {
            let rows = len / self.row_bytes;
            if row >= rows {
                row -= rows;
                continue;
            }
            // SAFETY: the row lies in this part, which stays mapped while the executable lives.
            let bytes = unsafe { std::slice::from_raw_parts(start.add(row * self.row_bytes), self.row_bytes) };
            let read = dequantize_row(self.dtype, bytes, out);
            return read.expect("formats and sizes were checked when the weight was");
        }
        panic!("row {row} is past the table's end");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
