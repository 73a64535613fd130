//! Looks for scales that are no finite number: one of them turns every answer into nonsense, long after
//! loading seemed to succeed.
//!
//! Only the exponent bits matter. Adding one to an exponent of all ones carries into the bit above, so a
//! whole run of values is checked by adding and or-ing, and only a run that fails is looked through.

use std::sync::atomic::{AtomicUsize, Ordering};

use setu_core::{DType, Error, Result};

use super::map::Shown;
use super::tensors::Tensor;

/// Bytes that a thread takes at a time, in whole blocks.
const PIECE: usize = 4 << 20;
/// Values whose verdicts are or-ed before one is looked at.
const RUN: usize = 256;

/// Checks that every block scale and minimum of `tensor`, or every value of a float format, is finite.
///
/// # Errors
/// Names the tensor and the block, or the element of a float format.
pub fn scan_scales(tensor: &Tensor<'_>) -> Result<()> {
    match first_bad(tensor.dtype, tensor.data) {
        None => Ok(()),
        Some(block) => Err(not_finite(tensor, block)),
    }
}

/// As [`scan_scales`] for all of `tensors`, on `threads` threads. Of several errors the one that comes
/// first in the order of `tensors` is returned.
///
/// # Errors
/// Names the tensor and the block, or the element of a float format.
pub fn scan_all(tensors: &[Tensor<'_>], threads: usize) -> Result<()> {
    // Pieces rather than tensors, because the embedding is often a quarter of a model.
    let piece_blocks = |tensor: &Tensor<'_>| (PIECE / tensor.dtype.block_bytes()).max(1);
    let pieces: Vec<(usize, usize)> = (0..tensors.len())
        .flat_map(|index| {
            let tensor = &tensors[index];
            let blocks = tensor.data.len() / tensor.dtype.block_bytes();
            (0..blocks).step_by(piece_blocks(tensor)).map(move |block| (index, block))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut worst: Option<(usize, usize)> = None;
        while let Some(&(index, block)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let tensor = &tensors[index];
            let bytes = tensor.dtype.block_bytes();
            let piece = &tensor.data[block * bytes..];
            let piece = &piece[..piece.len().min(piece_blocks(tensor) * bytes)];
            if let Some(bad) = first_bad(tensor.dtype, piece) {
                // Pieces are handed out in order, so this thread finds nothing earlier.
                worst = Some((index, block + bad));
                break;
            }
        }
        worst
    };
    let worst = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(pieces.len())).map(|_| scope.spawn(work)).collect();
        let mut found: Vec<_> = work().into_iter().collect();
        found.extend(others.into_iter().filter_map(|thread| thread.join().unwrap_or_default()));
        found.into_iter().min()
    });
    worst.map_or(Ok(()), |(index, block)| Err(not_finite(&tensors[index], block)))
}

fn not_finite(tensor: &Tensor<'_>, block: usize) -> Error {
    let (thing, place) = if tensor.dtype.is_float() { ("value", "element") } else { ("scale", "block") };
    Error::invalid(format!(
        "the tensor {} ({}) has a {thing} that is no finite number, first in {place} {block}: \
         the file is damaged or was converted wrongly",
        Shown(tensor.name),
        tensor.dtype
    ))
}

/// The first block with a scale that is not finite.
fn first_bad(dtype: DType, data: &[u8]) -> Option<usize> {
    match dtype {
        DType::F32 => first_bad_value(data, |bytes| (u32::from_le_bytes(bytes) & 0x7F80_0000) + 0x0080_0000, 1 << 31),
        DType::F16 => first_bad_value(data, |bytes| (u16::from_le_bytes(bytes) & 0x7C00) + 0x0400, 1 << 15),
        DType::BF16 => first_bad_value(data, |bytes| (u16::from_le_bytes(bytes) & 0x7F80) + 0x0080, 1 << 15),
        DType::Q4_0 => first_bad_scale::<18, 0>(data),
        DType::Q4_1 => first_bad_pair::<20, 0>(data),
        DType::Q5_0 => first_bad_scale::<22, 0>(data),
        DType::Q5_1 => first_bad_pair::<24, 0>(data),
        DType::Q8_0 => first_bad_scale::<34, 0>(data),
        DType::Q2K => first_bad_pair::<84, 80>(data),
        DType::Q3K => first_bad_scale::<110, 108>(data),
        DType::Q4K => first_bad_pair::<144, 0>(data),
        DType::Q5K => first_bad_pair::<176, 0>(data),
        DType::Q6K => first_bad_scale::<210, 208>(data),
        // A format that this module doesn't know has nothing that it could check.
        _ => None,
    }
}

/// Blocks of `N` bytes with one half-precision scale at `AT`.
fn first_bad_scale<const N: usize, const AT: usize>(data: &[u8]) -> Option<usize> {
    let scale = |block: [u8; N]| (u16::from_le_bytes([block[AT], block[AT + 1]]) & 0x7C00) + 0x0400;
    first_bad_value(data, scale, 1 << 15)
}

/// Blocks of `N` bytes with a half-precision scale at `AT` and a minimum behind it.
fn first_bad_pair<const N: usize, const AT: usize>(data: &[u8]) -> Option<usize> {
    let pair = |block: [u8; N]| {
        let pair = u32::from_le_bytes([block[AT], block[AT + 1], block[AT + 2], block[AT + 3]]);
        (pair & 0x7C00_7C00) + 0x0400_0400
    };
    first_bad_value(data, pair, 1 << 31 | 1 << 15)
}

/// The first block of `N` bytes whose `verdict` has a bit of `bad` set.
fn first_bad_value<const N: usize, V>(data: &[u8], verdict: impl Fn([u8; N]) -> V, bad: V) -> Option<usize>
where
    V: Copy + Default + PartialEq + std::ops::BitOr<Output = V> + std::ops::BitAnd<Output = V>,
{
    let clean = V::default();
    let blocks = data.as_chunks::<N>().0;
    blocks.chunks(RUN).enumerate().find_map(|(run, blocks)| {
        let together = blocks.iter().fold(clean, |together, block| together | verdict(*block));
        if together & bad == clean {
            return None;
        }
        blocks.iter().position(|block| verdict(*block) & bad != clean).map(|at| run * RUN + at)
    })
}
