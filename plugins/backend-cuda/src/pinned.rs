//! Host memory that the device copies from and to by itself.

use cudarc::driver::{result, sys};
use setu_core::{Error, Result};

use crate::gpu::{Device, mib, name_of};

/// Pinned host memory.
#[derive(Debug)]
pub struct Pinned {
    device: Device,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: plain owned memory.
unsafe impl Send for Pinned {}

impl Pinned {
    /// `bytes` of memory, zeroed.
    ///
    /// # Errors
    /// The system doesn't give them.
    pub fn zeroed(device: &Device, bytes: usize) -> Result<Pinned> {
        device.bind()?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: plain allocation; it is freed once, in `Drop`.
        let start = unsafe { result::malloc_host(bytes.max(1), flags) }.map_err(|error| {
            Error::exhausted(format!("{} MiB of pinned host memory: {}", mib(bytes as u64), name_of(error)))
        })?;
        let start = start.cast::<u8>();
        // SAFETY: the memory was just allocated with this length.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Pinned { device: device.clone(), start, bytes })
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: owned and initialised; the device writes only between a queued download and its end, when
        // nobody reads.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: allocated in `zeroed`, freed here alone.
        let _ = unsafe { result::free_host(self.start.cast()) };
    }
}
