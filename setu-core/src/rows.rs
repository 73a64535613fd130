//! Borrowed memory that crosses the ABI as it is: columns of plain values and rows of growing structs.
//!
//! A slice of structs fixes the struct's size in both sides' code, so a struct that gains a field would
//! make an older plugin read garbage. [`Rows`] therefore carries the stride: the side that reads sees the
//! prefix it knows of every row. [`Column`] is for primitives, which never grow.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A type whose values may be read across the ABI.
///
/// # Safety
/// The type is `#[repr(C)]` and holds only plain data or references to such; fields are only ever
/// added at the end; every bit pattern that the writing side can produce is valid to read.
pub unsafe trait Row {}

/// Rows of a struct, at a stride that the writing side chose.
#[repr(C)]
pub struct Rows<'a, T> {
    first: *const T,
    len: usize,
    stride: usize,
    lifetime: PhantomData<&'a [T]>,
}

// SAFETY: Rows is a shared borrow of memory that holds T.
unsafe impl<T: Sync> Send for Rows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Rows<'_, T> {}

impl<T> Clone for Rows<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Rows<'_, T> {}

impl<'a, T> Rows<'a, T> {
    /// All of `rows`.
    pub const fn new(rows: &'a [T]) -> Rows<'a, T> {
        Rows { first: rows.as_ptr(), len: rows.len(), stride: size_of::<T>(), lifetime: PhantomData }
    }

    pub const fn len(&self) -> usize {
        self.len
    }

    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<'a, T: Row> Rows<'a, T> {
    /// Row `index`, or `None` past the end.
    pub fn get(&self, index: usize) -> Option<&'a T> {
        if index >= self.len {
            return None;
        }
        // SAFETY: the writing side made `len` rows at `stride` bytes that live for 'a, each beginning
        // with a T: a reader is never newer than the writer, which the loader checks.
        Some(unsafe { &*self.first.byte_add(index * self.stride) })
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a T> + use<'a, T> {
        let rows = *self;
        (0..rows.len).map(move |index| rows.get(index).expect("index below len"))
    }
}

impl<T> Default for Rows<'_, T> {
    fn default() -> Self {
        Rows::new(&[])
    }
}

impl<T: Row> std::ops::Index<usize> for Rows<'_, T> {
    type Output = T;

    fn index(&self, index: usize) -> &T {
        self.get(index).unwrap_or_else(|| panic!("row {index} of {}", self.len))
    }
}

impl<T: Row + std::fmt::Debug> std::fmt::Debug for Rows<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// A column of primitive values; reads as a slice.
#[repr(C)]
pub struct Column<'a, T> {
    first: *const T,
    len: usize,
    lifetime: PhantomData<&'a [T]>,
}

// SAFETY: Column is a shared borrow of a slice.
unsafe impl<T: Sync> Send for Column<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Column<'_, T> {}

impl<T> Clone for Column<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Column<'_, T> {}

impl<'a, T> Column<'a, T> {
    pub const fn new(values: &'a [T]) -> Column<'a, T> {
        Column { first: values.as_ptr(), len: values.len(), lifetime: PhantomData }
    }

    /// The values, for as long as the memory behind them lives.
    pub const fn as_slice(&self) -> &'a [T] {
        // SAFETY: made from a slice of this length and lifetime.
        unsafe { std::slice::from_raw_parts(self.first, self.len) }
    }
}

impl<T> Default for Column<'_, T> {
    fn default() -> Self {
        Column::new(&[])
    }
}

impl<T> Deref for Column<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.as_slice()
    }
}

impl<'a, T> From<&'a [T]> for Column<'a, T> {
    fn from(values: &'a [T]) -> Self {
        Column::new(values)
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for Column<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_slice().fmt(f)
    }
}

/// A column that the callee fills.
#[repr(C)]
pub struct ColumnMut<'a, T> {
    first: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: ColumnMut is an exclusive borrow of a slice.
unsafe impl<T: Send> Send for ColumnMut<'_, T> {}

impl<'a, T> ColumnMut<'a, T> {
    pub const fn new(values: &'a mut [T]) -> ColumnMut<'a, T> {
        ColumnMut { first: values.as_mut_ptr(), len: values.len(), lifetime: PhantomData }
    }
}

impl<T> Default for ColumnMut<'_, T> {
    fn default() -> Self {
        ColumnMut::new(&mut [])
    }
}

impl<T> Deref for ColumnMut<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: made from a slice of this length and lifetime.
        unsafe { std::slice::from_raw_parts(self.first, self.len) }
    }
}

impl<T> DerefMut for ColumnMut<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: made from a slice of this length that is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Grown {
        known: u32,
        added: u32,
    }

    #[repr(C)]
    struct Known {
        known: u32,
    }

    // SAFETY: plain repr(C) data.
    unsafe impl Row for Grown {}
    // SAFETY: plain repr(C) data.
    unsafe impl Row for Known {}

    #[test]
    fn an_older_reader_sees_the_prefix_of_every_row() {
        let grown = [Grown { known: 1, added: 9 }, Grown { known: 2, added: 9 }, Grown { known: 3, added: 9 }];
        assert_eq!(grown[0].added, 9);
        let rows = Rows::new(&grown);
        let older: Rows<'_, Known> =
            Rows { first: rows.first.cast(), len: rows.len, stride: rows.stride, lifetime: PhantomData };
        assert_eq!(older.iter().map(|row| row.known).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(older.get(3).is_none());
    }

    #[test]
    fn columns_read_and_write_as_slices() {
        let mut values = [1u32, 2, 3];
        ColumnMut::new(&mut values)[1] = 7;
        assert_eq!(&Column::new(&values)[..], [1, 7, 3]);
        assert!(Column::<u32>::default().is_empty());
    }
}
