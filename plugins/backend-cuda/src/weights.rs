//! Weights on the device: matrices as the checkpoint stores them, vectors as f32.

use std::collections::HashMap;

use setu_core::backend::WeightData;
use setu_core::graph::WeightId;
use setu_core::{DType, Error, Graph, Result};

use crate::gpu::{Arguments, Device, Event, Memory, Shape, Stream};
use crate::kernels::{Kernels, Unit};
use crate::pinned::Pinned;

/// Bytes that are copied to pinned memory while the ones before go up.
const STAGING_BYTES: usize = 8 << 20;

/// The checkpoint's weights, and what of them is on the device.
#[derive(Debug)]
pub struct Weights<'a> {
    graph: &'a Graph,
    data: &'a [WeightData<'a>],
    device: Device,
    stream: Stream,
    staging: [(Pinned, Event); 2],
    matrices: HashMap<Vec<WeightId>, u64>,
    vectors: HashMap<Vec<WeightId>, u64>,
    /// By the address of bytes on the host, where they are on the device to stay, and how many. Dummy weights are the same
    /// bytes again and again.
    uploaded: HashMap<*const u8, (u64, usize)>,
    memory: Vec<Memory>,
}

/// A weight in its own format.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    pub address: u64,
    pub dtype: DType,
}

impl<'a> Weights<'a> {
    /// # Errors
    /// A weight's data isn't as long as its shape says.
    pub fn new(device: &Device, graph: &'a Graph, data: &'a [WeightData<'a>]) -> Result<Weights<'a>> {
        if data.len() != graph.weights.len() {
            let (given, wanted) = (data.len(), graph.weights.len());
            return Err(Error::contract(format!("data of {given} weights for a graph of {wanted}")));
        }
        for (weight, data) in graph.weights.iter().zip(data) {
            let bytes: usize = data.parts.iter().map(|part| part.len()).sum();
            if data.dtype.size_of(&weight.shape) != Some(bytes) {
                let (name, shape, dtype) = (&weight.name, &weight.shape, data.dtype);
                return Err(Error::invalid(format!("weight `{name}`: {shape:?} in {dtype} can't have {bytes} bytes")));
            }
        }
        let buffer = || Ok::<_, Error>((Pinned::zeroed(device, STAGING_BYTES)?, device.event()?));
        Ok(Weights {
            graph,
            data,
            device: device.clone(),
            stream: device.stream()?,
            staging: [buffer()?, buffer()?],
            matrices: HashMap::new(),
            vectors: HashMap::new(),
            uploaded: HashMap::new(),
            memory: Vec::new(),
        })
    }

    pub fn dtype(&self, id: WeightId) -> DType {
        self.data[id.0 as usize].dtype
    }

    /// A weight as it is.
    pub fn matrix(&mut self, id: WeightId) -> Result<Matrix> {
        self.matrices(&[id])
    }

    /// Weights of one format, as they are and one behind the other. A weight that is in several such lists is on the
    /// device several times.
    pub fn matrices(&mut self, ids: &[WeightId]) -> Result<Matrix> {
        let dtype = self.dtype(ids[0]);
        if let Some(&address) = self.matrices.get(ids) {
            return Ok(Matrix { address, dtype });
        }
        let bytes = ids.iter().map(|&id| self.byte_len(id)).sum();
        let memory = self.device.allocate(bytes, &self.graph.weight(ids[0]).name)?;
        let address = memory.address();
        self.memory.push(memory);
        let mut place = address;
        for &id in ids {
            self.bring(id, place)?;
            place += self.byte_len(id) as u64;
        }
        self.matrices.insert(ids.to_vec(), address);
        Ok(Matrix { address, dtype })
    }

    /// Vectors as f32, one behind the other: each decoded on the device, as the row of a table of one row.
    pub fn vectors(&mut self, ids: &[WeightId], kernels: &mut Kernels) -> Result<u64> {
        if let Some(&address) = self.vectors.get(ids) {
            return Ok(address);
        }
        let len_of = |id: WeightId| self.graph.weight(id).shape.iter().product::<usize>();
        let vector = self
            .device
            .allocate(4 * ids.iter().map(|&id| len_of(id)).sum::<usize>(), &self.graph.weight(ids[0]).name)?;
        let row = self.device.allocate(4, "a row number")?;
        let mut place = vector.address();
        for &id in ids {
            let len = self.graph.weight(id).shape.iter().product();
            let unit = Unit { file: "embed", format: Some(self.dtype(id).name()) };
            let embed = kernels.get(unit, "embed")?;
            let raw = self.device.allocate(self.byte_len(id), &self.graph.weight(id).name)?;
            let mut to = raw.address();
            for chunk in chunks(&self.data[id.0 as usize]) {
                self.upload(chunk, to)?;
                to += chunk.len() as u64;
            }
            let arguments = Arguments::new().address(row.address()).address(raw.address()).float(1.0);
            let arguments = arguments.address(place).int(len).int(len);
            // SAFETY: one row number; the arguments are those of `embed`: the table has one row of `len` elements, and
            // the result room for them. All is waited for before anything is freed.
            unsafe {
                self.stream.upload(row.address(), &[0; 4])?;
                self.stream.launch(&embed, Shape::new((1, 1, 1), 256), &arguments)?;
            }
            self.stream.wait()?;
            place += 4 * len as u64;
        }
        let address = vector.address();
        self.memory.push(vector);
        self.vectors.insert(ids.to_vec(), address);
        Ok(address)
    }

    /// Other constants.
    pub fn constant(&mut self, bytes: &[u8], what: &str) -> Result<u64> {
        let memory = self.device.allocate(bytes.len(), what)?;
        // SAFETY: the memory is as long as the bytes, which are waited for.
        unsafe { self.stream.upload(memory.address(), bytes)? };
        self.stream.wait()?;
        let address = memory.address();
        self.memory.push(memory);
        Ok(address)
    }

    /// Waits until all is on the device: the memory that holds it.
    pub fn finish(self) -> Result<Vec<Memory>> {
        self.stream.wait()?;
        Ok(self.memory)
    }

    fn byte_len(&self, id: WeightId) -> usize {
        self.data[id.0 as usize].parts.iter().map(|part| part.len()).sum()
    }

    /// Brings a weight to memory that has room for it and stays: what is on the device already is copied there.
    fn bring(&mut self, id: WeightId, mut address: u64) -> Result<()> {
        let data = self.data;
        for chunk in chunks(&data[id.0 as usize]) {
            match self.uploaded.get(&chunk.as_ptr()) {
                // SAFETY: the chunks together are as long as the memory, and as many bytes were uploaded there before, on
                // the same stream.
                Some(&(from, len)) if chunk.len() <= len => unsafe { self.stream.copy(address, from, chunk.len())? },
                _ => {
                    self.upload(chunk, address)?;
                    self.uploaded.insert(chunk.as_ptr(), (address, chunk.len()));
                }
            }
            address += chunk.len() as u64;
        }
        Ok(())
    }

    /// Copies at most `STAGING_BYTES` to memory that has room for them.
    fn upload(&mut self, bytes: &[u8], address: u64) -> Result<()> {
        self.staging.swap(0, 1);
        let (buffer, event) = &mut self.staging[0];
        event.wait()?;
        buffer.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: the memory has room for the bytes, says the caller; the buffer isn't touched before its event.
        unsafe { self.stream.upload(address, &buffer.bytes()[..bytes.len()])? };
        self.stream.record(event)
    }
}

/// A weight's bytes, as they go through staging.
fn chunks<'a>(data: &'a WeightData<'a>) -> impl Iterator<Item = &'a [u8]> {
    data.parts.iter().flat_map(|part| part.chunks(STAGING_BYTES))
}
