//! Buffers for values: a value takes the buffer of one that is needed no more.

use super::{BufferSpec, Phase};

/// Replaces values by buffers in `phases`, body and tail one behind the other. `spaces` and `cols` are those of the
/// values, `same` says of a value that it is written in place of another; `kept` is needed to the end.
/// Returns the buffers and the one that holds `kept`.
pub fn assign(
    phases: &mut [&mut Phase],
    values: &[BufferSpec],
    same: &[Option<usize>],
    kept: usize,
) -> (Vec<BufferSpec>, usize) {
    let root = |mut value: usize| {
        while let Some(other) = same[value] {
            value = other;
        }
        value
    };
    // First and last phase that names a value, by its root.
    let mut lives: Vec<Option<(usize, usize)>> = vec![None; values.len()];
    for (index, phase) in phases.iter_mut().enumerate() {
        for operand in phase.operands_mut() {
            let life = lives[root(operand.buffer)].get_or_insert((index, index));
            life.1 = index;
        }
    }
    if let Some(life) = &mut lives[root(kept)] {
        life.1 = phases.len();
    }
    let mut buffers: Vec<BufferSpec> = Vec::new();
    let mut buffer_of = vec![usize::MAX; values.len()];
    // Buffers in use with the last phase of what they hold.
    let mut busy: Vec<(usize, usize)> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    for index in 0..phases.len() {
        busy.retain(|&(buffer, last)| {
            let over = last < index;
            if over {
                free.push(buffer);
            }
            !over
        });
        for value in 0..values.len() {
            let Some((_, last)) = lives[value].filter(|life| life.0 == index) else { continue };
            let buffer = take(&mut buffers, &mut free, values[value]);
            buffer_of[value] = buffer;
            busy.push((buffer, last));
        }
    }
    for phase in phases {
        for operand in phase.operands_mut() {
            operand.buffer = buffer_of[root(operand.buffer)];
        }
    }
    (buffers, buffer_of[root(kept)])
}

/// The smallest free buffer that suffices, or the largest one made larger, or a new one.
fn take(buffers: &mut Vec<BufferSpec>, free: &mut Vec<usize>, wanted: BufferSpec) -> usize {
    let candidates = free.iter().enumerate().filter(|&(_, &buffer)| buffers[buffer].space == wanted.space);
    let fitting = candidates.clone().filter(|&(_, &buffer)| buffers[buffer].cols >= wanted.cols);
    let best = fitting.min_by_key(|&(_, &buffer)| buffers[buffer].cols);
    let best = best.or_else(|| candidates.max_by_key(|&(_, &buffer)| buffers[buffer].cols));
    match best.map(|(at, _)| at) {
        Some(at) => {
            let buffer = free.swap_remove(at);
            buffers[buffer].cols = buffers[buffer].cols.max(wanted.cols);
            buffer
        }
        None => {
            buffers.push(wanted);
            buffers.len() - 1
        }
    }
}

#[cfg(test)]
mod tests {
    use setu_core::graph::RowSpace;

    use super::*;
    use crate::plan::{ElementKind, Operand, RowKind, RowOp};

    fn copy(from: usize, to: usize) -> Phase {
        let operand = |buffer| Operand { buffer, cols: 4, gather: false };
        let kind = RowKind::Element(ElementKind::Scale(1.0));
        Phase::Rows(vec![RowOp { kind, input: Some(operand(from)), out: operand(to) }])
    }

    #[test]
    fn buffers_are_shared_by_values_that_never_meet() {
        let tokens = |cols| BufferSpec { space: RowSpace::Tokens, cols };
        let wanted = BufferSpec { space: RowSpace::Wanted, cols: 4 };
        let values = [tokens(4), tokens(4), tokens(8), tokens(4), wanted];
        let mut phases = [copy(0, 1), copy(1, 2), copy(2, 3), copy(3, 4)];
        let mut phases: Vec<&mut Phase> = phases.iter_mut().collect();
        let (buffers, kept) = assign(&mut phases, &values, &[None; 5], 4);
        assert_eq!(buffers, [tokens(8), tokens(4), wanted]);
        assert_eq!(kept, 2);
    }

    #[test]
    fn values_written_in_place_share_a_buffer_and_its_life() {
        let tokens = BufferSpec { space: RowSpace::Tokens, cols: 4 };
        let same = [None, Some(0), None];
        let mut phases = [copy(0, 1), copy(1, 2)];
        let mut phases: Vec<&mut Phase> = phases.iter_mut().collect();
        let (buffers, kept) = assign(&mut phases, &[tokens; 3], &same, 2);
        assert_eq!((buffers.len(), kept), (2, 1));
    }
}
