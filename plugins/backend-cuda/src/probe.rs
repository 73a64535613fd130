//! What there is of CUDA on this machine.
//!
//! cudarc panics where the driver's library or a symbol of it is missing, so nothing else is called before this
//! has found a driver that is recent enough to have them all.

use cudarc::driver::{CudaContext, result, sys};
use setu_core::{Error, Result};

use crate::gpu::name_of;

/// The oldest driver whose interface the bindings know.
const OLDEST_DRIVER: i32 = 12_000;

/// How many devices the driver has.
///
/// # Errors
/// `Unsupported`: there is no driver, it is too old, or it has no device. The message says what was looked for and
/// what to do.
pub fn devices() -> Result<u32> {
    // SAFETY: loading the driver's library runs its initialisers, as in any program that uses CUDA.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::unsupported(
            "no NVIDIA driver was found (looked for libcuda.so.1 in the library path): install the driver, version 525 \
             or later, or use [backend] type = \"cpu\"",
        ));
    }
    let no_driver = |error| {
        Error::unsupported(format!(
            "the NVIDIA driver (libcuda.so.1) doesn't start: {}; see what `nvidia-smi` says, or use [backend] type = \
             \"cpu\"",
            name_of(error)
        ))
    };
    result::init().map_err(no_driver)?;
    let (major, minor) = version();
    if 1000 * major + 10 * minor < OLDEST_DRIVER {
        return Err(Error::unsupported(format!(
            "the NVIDIA driver is for CUDA {major}.{minor}, and 12.0 is the least that is needed: install version 525 \
             or later"
        )));
    }
    match CudaContext::device_count().map_err(no_driver)? {
        count @ 1.. => Ok(count as u32),
        _ => Err(Error::unsupported(
            "the NVIDIA driver has no device: see what `nvidia-smi -L` lists and whether CUDA_VISIBLE_DEVICES hides \
             it, or use [backend] type = \"cpu\"",
        )),
    }
}

/// The version of CUDA that the driver is for, once [`devices`] has found it.
pub fn version() -> (i32, i32) {
    let mut version = 0;
    // SAFETY: the driver writes one integer; if it fails, none is what it knows.
    let _ = unsafe { sys::cuDriverGetVersion(&mut version) };
    (version / 1000, version % 1000 / 10)
}
