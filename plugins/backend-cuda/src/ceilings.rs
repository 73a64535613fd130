//! What a device can do at most: how fast it copies its memory, and how fast cuBLAS multiplies. Benches show their figures
//! beside these, measured in the same run; nothing else uses cuBLAS.

use std::ffi::{CString, c_int, c_void};

use setu_core::{Error, Result};

use crate::gpu::{Device, Memory, Stream};
use crate::probe;

/// Names of the library, the newest first.
const NAMES: [&str; 3] = ["libcublas.so.13", "libcublas.so.12", "libcublas.so"];

/// The values of cuBLAS's enumerations that are used here.
const OP_NONE: c_int = 0;
const OP_TRANSPOSED: c_int = 1;
const TYPE_BF16: c_int = 14;
const COMPUTE_F32: c_int = 68;
const ALGORITHM_DEFAULT: c_int = -1;

type Handle = *mut c_void;
type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
type Destroy = unsafe extern "C" fn(Handle) -> c_int;
type SetStream = unsafe extern "C" fn(Handle, *mut c_void) -> c_int;
type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// A device to measure.
#[derive(Debug)]
pub struct Ceilings {
    device: Device,
    stream: Stream,
}

impl Ceilings {
    /// # Errors
    /// There is no such device.
    pub fn new(ordinal: u32) -> Result<Ceilings> {
        probe::devices()?;
        let device = Device::open(ordinal)?;
        Ok(Ceilings { stream: device.stream()?, device })
    }

    /// The driver's version and the device's name.
    ///
    /// # Errors
    /// The driver fails.
    pub fn names(&self) -> Result<((i32, i32), String)> {
        Ok((probe::version(), self.device.name()?))
    }

    /// Bytes read and written in a second by copies of `bytes` bytes on the device.
    ///
    /// # Errors
    /// There is no memory for them.
    pub fn copy_bandwidth(&self, bytes: usize) -> Result<f64> {
        let [from, to] = [self.filled(bytes)?, self.filled(bytes)?];
        // SAFETY: both are as long as is copied, and live until all is waited for.
        let seconds = self.time(10, || unsafe { self.stream.copy(to.address(), from.address(), bytes) })?;
        Ok(2.0 * bytes as f64 / seconds)
    }

    /// Operations in a second of cuBLAS's products of `[m, k]` by `[n, k]` in bfloat16, sums in float.
    ///
    /// # Errors
    /// `Unsupported` if there is no cuBLAS.
    pub fn matmul_rate(&self, m: usize, n: usize, k: usize) -> Result<f64> {
        let library = NAMES.iter().map(|name| open(name)).find_map(Result::ok);
        let library = library.ok_or_else(|| {
            Error::unsupported(format!("cuBLAS is not in the library path (tried {})", NAMES.join(", ")))
        })?;
        // SAFETY: the functions have these types in all versions from 11 on.
        let (create, destroy, set_stream, gemm) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Create>(symbol(library, "cublasCreate_v2")?),
                std::mem::transmute::<*mut c_void, Destroy>(symbol(library, "cublasDestroy_v2")?),
                std::mem::transmute::<*mut c_void, SetStream>(symbol(library, "cublasSetStream_v2")?),
                std::mem::transmute::<*mut c_void, GemmEx>(symbol(library, "cublasGemmEx")?),
            )
        };
        let [x, w, y] = [self.filled(2 * m * k)?, self.filled(2 * n * k)?, self.filled(2 * m * n)?];
        self.device.bind()?;
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: the context is current; the function writes one handle.
        succeeded(unsafe { create(&mut handle) }, "cublasCreate")?;
        // SAFETY: the stream outlives the handle.
        succeeded(unsafe { set_stream(handle, self.stream.raw()) }, "cublasSetStream")?;
        let (one, zero) = (1.0_f32, 0.0_f32);
        let seconds = self.time(20, || {
            // cuBLAS counts by columns: it computes the transposed product. The three matrices are as large as the
            // sizes say and live until all is waited for.
            // SAFETY: as above.
            let status = unsafe {
                gemm(
                    handle,
                    OP_TRANSPOSED,
                    OP_NONE,
                    n as c_int,
                    m as c_int,
                    k as c_int,
                    (&raw const one).cast(),
                    w.address() as *const c_void,
                    TYPE_BF16,
                    k as c_int,
                    x.address() as *const c_void,
                    TYPE_BF16,
                    k as c_int,
                    (&raw const zero).cast(),
                    y.address() as *mut c_void,
                    TYPE_BF16,
                    n as c_int,
                    COMPUTE_F32,
                    ALGORITHM_DEFAULT,
                )
            };
            succeeded(status, "cublasGemmEx")
        });
        // SAFETY: created above, destroyed once.
        unsafe { destroy(handle) };
        Ok(2.0 * m as f64 * n as f64 * k as f64 / seconds?)
    }

    /// Memory with numbers in it that look like activations, since what a product costs depends on them.
    fn filled(&self, bytes: usize) -> Result<Memory> {
        let mut state = 1_u32;
        let pattern: Vec<u8> = (0..(1 << 20).min(bytes / 2 + 1))
            .flat_map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // A bfloat16 of either sign, from a quarter to 4.
                ((state >> 16 & 0x81ff | 0x3e80) as u16).to_le_bytes()
            })
            .collect();
        let memory = self.device.allocate(bytes, "a measurement")?;
        for start in (0..bytes).step_by(pattern.len()) {
            let part = &pattern[..pattern.len().min(bytes - start)];
            // SAFETY: the part ends within the memory; it isn't pinned, so that it is copied when the call returns.
            unsafe { self.stream.upload(memory.address() + start as u64, part)? };
        }
        self.stream.wait()?;
        Ok(memory)
    }

    /// Seconds that each of `times` runs takes, after a few that aren't counted.
    fn time(&self, times: usize, run: impl Fn() -> Result<()>) -> Result<f64> {
        let (start, end) = (self.device.event()?, self.device.event()?);
        (0..3).try_for_each(|_| run())?;
        self.stream.record(&start)?;
        (0..times).try_for_each(|_| run())?;
        self.stream.record(&end)?;
        end.wait()?;
        Ok(end.seconds_since(&start)? / times as f64)
    }
}

fn open(name: &str) -> Result<*mut c_void> {
    let name = CString::new(name).map_err(|_| Error::internal("a library's name has a NUL"))?;
    // SAFETY: loading the library runs its initialisers; it is NVIDIA's.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() { Err(Error::unsupported("it can't be loaded")) } else { Ok(library) }
}

fn symbol(library: *mut c_void, name: &str) -> Result<*mut c_void> {
    let symbol = CString::new(name).map_err(|_| Error::internal("a function's name has a NUL"))?;
    // SAFETY: the library is loaded and stays so.
    let found = unsafe { libc::dlsym(library, symbol.as_ptr()) };
    if found.is_null() { Err(Error::unsupported(format!("cuBLAS has no {name}"))) } else { Ok(found) }
}

fn succeeded(status: c_int, what: &str) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(Error::unsupported(format!("{what} fails with status {status}"))) }
}
