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
    matrices: HashMap<WeightId, u64>,
    vectors: HashMap<WeightId, u64>,
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
            memory: Vec::new(),
        })
    }

    /// A weight as it is.
    pub fn matrix(&mut self, id: WeightId) -> Result<Matrix> {
        let dtype = self.data[id.0 as usize].dtype;
        let address = match self.matrices.get(&id) {
            Some(&address) => address,
            None => {
                let memory = self.upload(id)?;
                let address = memory.address();
                self.memory.push(memory);
                self.matrices.insert(id, address);
                address
            }
        };
        Ok(Matrix { address, dtype })
    }

    /// A vector as f32: decoded on the device, as the row of a table of one row.
    pub fn vector(&mut self, id: WeightId, kernels: &mut Kernels) -> Result<u64> {
        if let Some(&address) = self.vectors.get(&id) {
            return Ok(address);
        }
        let len = self.graph.weight(id).shape.iter().product();
        let unit = Unit { file: "embed", format: Some(self.data[id.0 as usize].dtype) };
        let embed = kernels.get(unit, "embed")?;
        let raw = self.upload(id)?;
        let vector = self.device.allocate(4 * len, &self.graph.weight(id).name)?;
        let row = self.device.allocate(4, "a row number")?;
        let arguments = Arguments::new().address(row.address()).address(raw.address()).float(1.0);
        let arguments = arguments.address(vector.address()).int(len).int(len);
        // SAFETY: one row number; the arguments are those of `embed`: the table has one row of `len` elements, and
        // the result room for them. All is waited for before anything is freed.
        unsafe {
            self.stream.upload(row.address(), &[0; 4])?;
            self.stream.launch(&embed, Shape::new((1, 1, 1), 256), &arguments)?;
        }
        self.stream.wait()?;
        let address = vector.address();
        self.memory.push(vector);
        self.vectors.insert(id, address);
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

    fn upload(&mut self, id: WeightId) -> Result<Memory> {
        let (weight, data) = (self.graph.weight(id), &self.data[id.0 as usize]);
        let bytes = data.parts.iter().map(|part| part.len()).sum();
        let memory = self.device.allocate(bytes, &weight.name)?;
        let mut address = memory.address();
        for chunk in data.parts.iter().flat_map(|part| part.chunks(STAGING_BYTES)) {
            self.staging.swap(0, 1);
            let (buffer, event) = &mut self.staging[0];
            event.wait()?;
            buffer.bytes_mut()[..chunk.len()].copy_from_slice(chunk);
            // SAFETY: the chunks together are as long as the memory; the buffer isn't touched before its event.
            unsafe { self.stream.upload(address, &buffer.bytes()[..chunk.len()])? };
            self.stream.record(event)?;
            address += chunk.len() as u64;
        }
        Ok(memory)
    }
}
