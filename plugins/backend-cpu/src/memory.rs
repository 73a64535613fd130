//! Zeroed memory that costs nothing until it is touched.

use std::ptr::NonNull;

use setu_core::{Error, Result};

/// Anonymous memory, page-aligned and zeroed by the system on first use.
#[derive(Debug)]
pub struct Region {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory is owned; a region hands out nothing but a raw pointer.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// # Errors
    /// The system doesn't give `len` bytes; `what` says in the message what they were for.
    pub fn zeroed(len: usize, what: &str) -> Result<Region> {
        let failed = || {
            let mib = len.div_ceil(1 << 20);
            Error::exhausted(format!("the system gives no {mib} MiB of memory for {what}"))
        };
        if len == 0 {
            return Ok(Region { start: NonNull::dangling(), len });
        }
        // SAFETY: a fresh anonymous mapping overlaps nothing.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(failed());
        }
        NonNull::new(start.cast()).map(|start| Region { start, len }).ok_or_else(failed)
    }

    /// Asks for large pages, where touching a part may as well bring in its neighbours.
    pub fn prefer_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        if self.len > 0 {
            // SAFETY: the range is this region's own; the advice changes no content.
            unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_HUGEPAGE) };
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: mapped in `zeroed` with this length and never given away.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        }
    }
}

pub const LINE_BYTES: usize = 64;

/// Asks for the cache line of `at`, which may lie anywhere.
#[inline(always)]
pub fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction, and it reads nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// An f32 matrix that the phases of a step pass on. Threads write disjoint parts of it between two barriers.
#[derive(Debug)]
pub struct Matrix {
    region: Region,
    rows: usize,
    stride: usize,
}

impl Matrix {
    /// Room for `rows × cols`.
    ///
    /// # Errors
    /// The size overflows or the system doesn't give it.
    pub fn zeroed(rows: usize, cols: usize, what: &str) -> Result<Matrix> {
        // Rows begin at cache lines, so that threads that share a matrix by rows share no line.
        let stride = cols.next_multiple_of(16);
        let bytes = rows.checked_mul(stride).and_then(|elements| elements.checked_mul(4));
        let bytes = bytes.ok_or_else(|| Error::exhausted(format!("{rows} × {cols} f32 are too many for {what}")))?;
        Ok(Matrix { region: Region::zeroed(bytes, what)?, rows, stride })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn stride(&self) -> usize {
        self.stride
    }

    pub fn byte_len(&self) -> usize {
        self.region.len()
    }

    /// Columns `cols` of a row.
    ///
    /// # Safety
    /// No thread may write these elements while the slice lives.
    ///
    /// # Panics
    /// The row or the columns are out of range.
    pub unsafe fn row(&self, row: usize, cols: std::ops::Range<usize>) -> &[f32] {
        assert!(row < self.rows && cols.start <= cols.end && cols.end <= self.stride, "elements of this matrix");
        // SAFETY: in bounds as just checked; the caller keeps writers out.
        unsafe {
            let start = self.region.as_ptr().cast::<f32>().add(row * self.stride + cols.start);
            std::slice::from_raw_parts(start, cols.len())
        }
    }

    /// As [`row`](Matrix::row), to write.
    ///
    /// # Safety
    /// No other thread and no other slice may touch these elements while the slice lives.
    ///
    /// # Panics
    /// The row or the columns are out of range.
    #[allow(clippy::mut_from_ref, reason = "threads share the matrix and write disjoint parts, as the caller vouches")]
    pub unsafe fn row_mut(&self, row: usize, cols: std::ops::Range<usize>) -> &mut [f32] {
        assert!(row < self.rows && cols.start <= cols.end && cols.end <= self.stride, "elements of this matrix");
        // SAFETY: in bounds as just checked; the caller keeps others out.
        unsafe {
            let start = self.region.as_ptr().cast::<f32>().add(row * self.stride + cols.start);
            std::slice::from_raw_parts_mut(start, cols.len())
        }
    }

    /// The first element of `rows` rows.
    ///
    /// # Panics
    /// There are fewer rows.
    pub fn as_mut_ptr(&self, rows: usize) -> *mut f32 {
        assert!(rows <= self.rows, "rows of this matrix");
        self.region.as_ptr().cast()
    }
}
