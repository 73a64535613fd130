//! The device, in safe hands: memory, streams, events and kernels that free themselves.
//!
//! A thin layer over cudarc's bindings. What it adds is ownership, the current context of whichever thread calls,
//! and errors that say what failed. Copies and launches only queue work: memory that a queue still uses is kept
//! alive by whoever queues, which the executable does by waiting before it drops anything.

use std::ffi::{CString, c_void};
use std::fmt::Display;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};
use setu_core::{Error, ErrorKind, Result};

use crate::product::{Half, Halves};

/// A device with its primary context.
#[derive(Clone, Debug)]
pub struct Device {
    context: Arc<CudaContext>,
}

/// Names what was attempted in front of what the driver says.
fn failed(what: impl Display) -> impl FnOnce(DriverError) -> Error {
    move |error| {
        let kind = match error.0 {
            sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => ErrorKind::Exhausted,
            _ => ErrorKind::Device,
        };
        Error::new(kind, format!("{what}: {}", name_of(error)))
    }
}

/// The driver's name of an error, such as `CUDA_ERROR_OUT_OF_MEMORY`.
pub fn name_of(error: DriverError) -> String {
    error.error_name().map_or_else(|_| format!("error {}", error.0 as u32), |name| name.to_string_lossy().into_owned())
}

impl Device {
    /// Opens device `ordinal`. The driver must have been [probed](crate::probe::devices).
    pub fn open(ordinal: u32) -> Result<Device> {
        let context = CudaContext::new(ordinal as usize).map_err(failed(format!("CUDA device {ordinal}")))?;
        Ok(Device { context })
    }

    pub fn name(&self) -> Result<String> {
        self.context.name().map_err(failed("the device's name"))
    }

    /// Compute capability, such as (9, 0).
    pub fn capability(&self) -> Result<(i32, i32)> {
        self.context.compute_capability().map_err(failed("the device's compute capability"))
    }

    pub fn multiprocessors(&self) -> Result<usize> {
        let attribute = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        self.context.attribute(attribute).map(|count| count as usize).map_err(failed("the device's multiprocessors"))
    }

    /// Most shared memory that a block can have.
    pub fn shared_bytes(&self) -> Result<usize> {
        let attribute = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        self.context.attribute(attribute).map(|bytes| bytes as usize).map_err(failed("the device's shared memory"))
    }

    /// Free bytes and all.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let (free, total) = self.context.mem_get_info().map_err(failed("the device's memory"))?;
        Ok((free as u64, total as u64))
    }

    /// Makes the device's context that of the calling thread; to be called before a series of other calls.
    pub fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(failed("the device's context"))
    }

    pub fn stream(&self) -> Result<Stream> {
        self.bind()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("a stream"))?;
        Ok(Stream { device: self.clone(), raw, overlaps: false })
    }

    pub fn event(&self) -> Result<Event> {
        self.bind()?;
        let raw = result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT).map_err(failed("an event"))?;
        Ok(Event { device: self.clone(), raw })
    }

    /// `bytes` of memory, of which nobody knows the content. `what` they are for is told if there are too few.
    pub fn allocate(&self, bytes: usize, what: &str) -> Result<Memory> {
        self.bind()?;
        let out = |error: DriverError| {
            let free = self.memory().map_or(0, |(free, _)| free);
            let (wanted, free) = (mib(bytes as u64), mib(free));
            failed(format!("{wanted} MiB of device memory for {what}, of which {free} MiB are free"))(error)
        };
        // A null pointer for what is empty would be taken for "not there" by kernels.
        // SAFETY: plain allocation; it is freed once, in `Drop`.
        let address = unsafe { result::malloc_sync(bytes.max(256)) }.map_err(out)?;
        Ok(Memory { device: self.clone(), address, bytes })
    }

    /// A matrix of halves on the device, of which boxes of `box_rows` by [`BOX_COLS`] are copied to shared memory, their
    /// sixteen-byte pieces permuted as tensor cores want them.
    pub fn tensor_map(&self, matrix: Halves, rows: usize, cols: usize, box_rows: usize) -> Result<TensorMap> {
        self.bind()?;
        let dtype = match matrix.half {
            Half::F16 => sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Half::BF16 => sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (size, strides) = ([cols as u64, rows as u64], [2 * matrix.stride as u64]);
        let (of_box, steps) = ([BOX_COLS as u32, box_rows as u32], [1_u32, 1]);
        // SAFETY: the arrays are as long as the rank says; the driver writes the map and keeps nothing.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                dtype,
                2,
                matrix.address as *mut c_void,
                size.as_ptr(),
                strides.as_ptr(),
                of_box.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(failed(format!("the map of a matrix of {rows} by {cols}")))?;
        Ok(TensorMap(map.opaque))
    }

    /// Loads compiled kernels.
    pub fn load(&self, image: &[u8]) -> Result<Module> {
        self.bind()?;
        // SAFETY: the image is a whole CUBIN; the driver reads its length from its header.
        let raw = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(failed("compiled kernels"))?;
        Ok(Module { device: self.clone(), raw })
    }
}

/// Columns of a tensor map's box: 128 bytes of halves.
const BOX_COLS: usize = 64;

/// A matrix as the copies of `kernels/tma.cuh` want it described.
#[derive(Clone, Copy, Debug)]
pub struct TensorMap(pub [u64; 16]);

/// Bytes in MiB, rounded up.
pub fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Memory on the device.
#[derive(Debug)]
pub struct Memory {
    device: Device,
    address: u64,
    bytes: usize,
}

impl Memory {
    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn len(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A failure leaves nothing to do: the context is gone, and the memory with it.
        let _ = self.device.bind();
        // SAFETY: allocated in `allocate`, freed here alone; freeing waits for what the device still does.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// A queue of work for the device.
#[derive(Debug)]
pub struct Stream {
    device: Device,
    raw: sys::CUstream,
    /// Whether a kernel may start while the one before it ends: it waits by itself, see `kernels/common.cuh`.
    overlaps: bool,
}

// SAFETY: the driver's streams may be used from any thread.
unsafe impl Send for Stream {}

impl Stream {
    /// Lets kernels start while the ones before them end, where device and driver can do that.
    pub fn overlapping(mut self) -> Result<Stream> {
        // Graphs take such launches in from CUDA 12.3 on.
        self.overlaps = self.device.capability()?.0 >= 9 && crate::probe::version() >= (12, 3);
        Ok(self)
    }

    /// The driver's handle, for libraries that queue work by themselves.
    pub fn raw(&self) -> *mut c_void {
        self.raw.cast()
    }

    /// Queues a copy to the device.
    ///
    /// # Safety
    /// `from` lives and doesn't change until the copy was made, if it is pinned; the addresses from `to` on are
    /// allocated.
    pub unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: as the caller vouches.
        unsafe { result::memcpy_htod_async(to, from, self.raw) }.map_err(failed("a copy to the device"))
    }

    /// Queues a copy to the host.
    ///
    /// # Safety
    /// `to` lives and is not touched until the copy was made; the addresses from `from` on are allocated.
    pub unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: as the caller vouches.
        unsafe { result::memcpy_dtoh_async(to, from, self.raw) }.map_err(failed("a copy from the device"))
    }

    /// Queues a copy on the device.
    ///
    /// # Safety
    /// Both ranges are allocated.
    pub unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as the caller vouches.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.raw) }.map_err(failed("a copy on the device"))
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// The arguments are those that the kernel takes, in number, order and type, and what it does with them stays
    /// within allocated memory.
    pub unsafe fn launch(&self, kernel: &Kernel, shape: Shape, arguments: &Arguments) -> Result<()> {
        let mut places: Vec<*mut c_void> = arguments.places().collect();
        let (grid, threads) = (shape.grid, shape.threads);
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.0,
            gridDimY: grid.1,
            gridDimZ: grid.2,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared_bytes,
            hStream: self.raw,
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.overlaps),
        };
        // SAFETY: as the caller vouches; the driver copies configuration and arguments before it returns.
        unsafe { sys::cuLaunchKernelEx(&raw const config, kernel.raw, places.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(failed(format!("the kernel {} in {grid:?} blocks of {threads}", kernel.name)))
    }

    /// Has what `queue` queues be kept as a graph instead of run.
    pub fn capture(&self, queue: impl FnOnce() -> Result<()>) -> Result<LaunchGraph> {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { result::stream::begin_capture(self.raw, mode) }.map_err(failed("capturing a graph"))?;
        let queued = queue();
        // SAFETY: as above; a capture is ended whatever became of it.
        let graph = unsafe { result::stream::end_capture(self.raw) };
        queued?;
        let graph = graph.map_err(failed("a captured graph"))?;
        // No flags.
        // SAFETY: the graph was just captured; flags of 0 are none.
        let flags = unsafe { std::mem::zeroed::<sys::CUgraphInstantiate_flags>() };
        // SAFETY: as above.
        let raw = unsafe { result::graph::instantiate(graph, flags) };
        // SAFETY: what was made of it doesn't need it.
        let _ = unsafe { result::graph::destroy(graph) };
        Ok(LaunchGraph { device: self.device.clone(), raw: raw.map_err(failed("a captured graph"))? })
    }

    /// Queues all of a graph.
    ///
    /// # Safety
    /// As for what was queued when it was captured.
    pub unsafe fn launch_graph(&self, graph: &LaunchGraph) -> Result<()> {
        // SAFETY: as the caller vouches.
        unsafe { result::graph::launch(graph.raw, self.raw) }.map_err(failed("a captured graph"))
    }

    pub fn record(&self, event: &Event) -> Result<()> {
        // SAFETY: both live.
        unsafe { result::event::record(event.raw, self.raw) }.map_err(failed("an event"))
    }

    /// Waits until everything queued is done.
    pub fn wait(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.raw) }.map_err(failed("the device"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.wait();
        // SAFETY: created in `Device::stream`, destroyed here alone.
        let _ = unsafe { result::stream::destroy(self.raw) };
    }
}

/// Launches that are queued at once.
#[derive(Debug)]
pub struct LaunchGraph {
    device: Device,
    raw: sys::CUgraphExec,
}

// SAFETY: the driver's graphs may be used from any thread, by one at a time.
unsafe impl Send for LaunchGraph {}

impl Drop for LaunchGraph {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: made in `Stream::capture`, destroyed here alone.
        let _ = unsafe { result::graph::exec_destroy(self.raw) };
    }
}

/// A mark in a stream.
#[derive(Debug)]
pub struct Event {
    device: Device,
    raw: sys::CUevent,
}

// SAFETY: the driver's events may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// Waits until the stream has come to it.
    pub fn wait(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.raw) }.map_err(failed("the device"))
    }

    /// Seconds from `start` to it; the stream has come to both.
    pub fn seconds_since(&self, start: &Event) -> Result<f64> {
        // SAFETY: both events live.
        let ms = unsafe { result::event::elapsed(start.raw, self.raw) }.map_err(failed("the time of a step"))?;
        Ok(f64::from(ms) * 1e-3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: created in `Device::event`, destroyed here alone.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// Compiled kernels on the device.
#[derive(Debug)]
pub struct Module {
    device: Device,
    raw: sys::CUmodule,
}

// SAFETY: modules and their functions are the context's, not a thread's.
unsafe impl Send for Module {}

impl Module {
    /// The kernel called `name`.
    pub fn kernel(&self, name: &str) -> Result<Kernel> {
        self.device.bind()?;
        let missing = || Error::internal(format!("{name:?} can't be the name of a kernel"));
        let symbol = CString::new(name).map_err(|_| missing())?;
        // SAFETY: the module lives.
        let raw = unsafe { result::module::get_function(self.raw, symbol) }
            .map_err(failed(format!("the kernel {name}, which the compiled file should hold")))?;
        // The driver loads a kernel when it is first asked something of it. A first launch while a graph is captured would
        // be too late.
        let registers = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_NUM_REGS;
        // SAFETY: as above.
        unsafe { result::function::get_function_attribute(raw, registers) }
            .map_err(failed(format!("loading the kernel {name}")))?;
        Ok(Kernel { name: name.to_owned(), raw })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: loaded in `Device::load`, unloaded here alone; kernels are dropped with it.
        let _ = unsafe { result::module::unload(self.raw) };
    }
}

/// A kernel of a [`Module`], which must outlive it.
#[derive(Clone, Debug)]
pub struct Kernel {
    name: String,
    raw: sys::CUfunction,
}

// SAFETY: as for `Module`.
unsafe impl Send for Kernel {}

impl Kernel {
    /// Lets launches use up to `bytes` of dynamic shared memory.
    pub fn allow_shared(&self, bytes: usize) -> Result<()> {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the kernel's module lives.
        unsafe { result::function::set_function_attribute(self.raw, attribute, bytes as i32) }
            .map_err(failed(format!("{bytes} bytes of shared memory for the kernel {}", self.name)))
    }
}

/// Blocks of a launch, and threads and dynamic shared memory of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub grid: (u32, u32, u32),
    pub threads: u32,
    pub shared_bytes: u32,
}

impl Shape {
    pub fn new(grid: (usize, usize, usize), threads: usize) -> Shape {
        Shape { grid: (grid.0 as u32, grid.1 as u32, grid.2 as u32), threads: threads as u32, shared_bytes: 0 }
    }

    pub fn shared(mut self, bytes: usize) -> Shape {
        self.shared_bytes = bytes as u32;
        self
    }
}

/// Two integers of four bytes that lie side by side in a struct.
pub fn pair(low: usize, high: usize) -> u64 {
    low as u32 as u64 | (high as u64) << 32
}

/// A kernel's arguments, one behind the other.
#[derive(Debug, Default)]
pub struct Arguments {
    /// Eight-byte words, in which each argument begins a new one.
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl Arguments {
    pub fn new() -> Arguments {
        Arguments::default()
    }

    fn push(mut self, words: &[u64]) -> Arguments {
        self.starts.push(self.words.len());
        self.words.extend(words);
        self
    }

    /// A pointer.
    pub fn address(self, address: u64) -> Arguments {
        self.push(&[address])
    }

    pub fn int(self, value: usize) -> Arguments {
        self.push(&[value as u32 as u64])
    }

    pub fn float(self, value: f32) -> Arguments {
        self.push(&[u64::from(value.to_bits())])
    }

    /// A struct of eight-byte alignment.
    pub fn structure(self, words: &[u64]) -> Arguments {
        self.push(words)
    }

    fn places(&self) -> impl Iterator<Item = *mut c_void> {
        self.starts.iter().map(|&start| (&raw const self.words[start]).cast_mut().cast())
    }
}
