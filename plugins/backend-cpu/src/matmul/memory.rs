//! Zeroed memory aligned to cache lines.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use setu_core::{Error, Result};

const ALIGNMENT: usize = 64;

/// Owned bytes at a multiple of 64. They come zeroed from the system, so that no page is touched before its use.
#[derive(Debug)]
pub(super) struct AlignedBytes {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the bytes are owned, and `&AlignedBytes` gives only shared access to them or a raw pointer.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    pub(super) fn zeroed(len: usize) -> Result<AlignedBytes> {
        let too_large = || Error::exhausted(format!("cannot allocate {len} bytes of memory for the CPU backend"));
        if len == 0 {
            return Ok(AlignedBytes { start: NonNull::dangling(), len });
        }
        let layout = Layout::from_size_align(len, ALIGNMENT).map_err(|_| too_large())?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(too_large)?;
        Ok(AlignedBytes { start, len })
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `start` is valid for `len` initialized bytes, which `&mut self` borrows alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeroed` with this size and alignment, which were valid there.
            unsafe { dealloc(self.start.as_ptr(), Layout::from_size_align_unchecked(self.len, ALIGNMENT)) };
        }
    }
}
