//! Small whole models: ragged steps over shuffled pages, windows, page copies, batch invariance.

use setu_core::backend::{PageCopy, Want};
use setu_core::graph::{Graph, Op, WeightId};
use setu_core::{Backend, DType, KvDType, Result};

use super::graphs::{self, BLOCKS, SMALL};
use super::rig::{Rig, Sequence, compare, compare_settled, options, reference};
use super::{Checked, Options, Suite, ensure};
use crate::weights::WeightSet;

type Model = (&'static str, fn() -> Result<Graph>);

/// The models that run in F32.
const MODELS: [Model; 3] = [
    ("llama", || graphs::llama(SMALL, true)),
    ("windows", || graphs::windows(SMALL)),
    ("experts", || graphs::experts(SMALL, 5, 2)),
];

pub fn check(suite: &mut Suite<'_>) {
    for (name, graph) in MODELS {
        suite.numeric(format!("models/{name}/ragged steps"), |backend, options| ragged(backend, options, &graph()?));
        suite.numeric(format!("models/{name}/page copies"), |backend, options| copies(backend, options, &graph()?));
        suite.numeric(format!("models/{name}/batch invariance"), |backend, _| {
            invariance(backend, &graph()?, DType::F32)
        });
        suite.numeric(format!("models/{name}/a NaN stays in its sequence"), |backend, _| {
            not_a_number(backend, &graph()?)
        });
    }
    for dtype in DType::ALL {
        suite.numeric(format!("models/weights in {dtype}"), |backend, options| {
            quantized(backend, options, &graphs::llama(BLOCKS, true)?, dtype)?;
            quantized(backend, options, &graphs::experts(BLOCKS, 4, 2)?, dtype)
        });
        suite.numeric(format!("models/batch invariance in {dtype}"), |backend, _| {
            invariance(backend, &graphs::llama(BLOCKS, true)?, dtype)
        });
    }
    suite.numeric("models/unaligned weights", |backend, _| unaligned(backend));
}

fn ragged(backend: &mut dyn Backend, checks: &Options, graph: &Graph) -> Checked {
    let weights = WeightSet::random(graph, DType::F32, 21);
    let reference = reference(graph, &weights, KvDType::F32)?;
    let mut rig = Rig::new(backend, graph, &weights, options())?;
    // Twice, so that the second round finds pages that others have left something in.
    for lengths in [[1, 16, 17, 40, 64], [33, 2, 48, 15, 31]] {
        let mut sequences = lengths.map(|len| rig.random_sequence(len));
        let found = rig.mixed(&mut sequences, 23)?;
        for (found, sequence) in found.iter().zip(&sequences) {
            // Rounding adds up over the layers.
            compare(found, &reference.logits(&sequence.tokens)?, 3.0 * checks.f32_tolerance, 0.1)?;
        }
        sequences.into_iter().for_each(|sequence| rig.release(sequence));
    }
    Ok(())
}

fn quantized(backend: &mut dyn Backend, checks: &Options, graph: &Graph, dtype: DType) -> Checked {
    let weights = WeightSet::random(graph, dtype, 22);
    let reference = reference(graph, &weights, KvDType::F32)?;
    let mut rig = Rig::new(backend, graph, &weights, options())?;
    let mut sequences = [rig.random_sequence(19), rig.random_sequence(7)];
    let found = rig.mixed(&mut sequences, 9)?;
    for (found, sequence) in found.iter().zip(&sequences) {
        let (expected, margins) = (reference.logits(&sequence.tokens)?, reference.routing_margins(&sequence.tokens)?);
        compare_settled(found, &expected, &margins, checks.tolerance(dtype))?;
    }
    Ok(())
}

/// A sequence forks in the middle of a page, and both branches go on.
fn copies(backend: &mut dyn Backend, checks: &Options, graph: &Graph) -> Checked {
    let weights = WeightSet::random(graph, DType::F32, 23);
    let reference = reference(graph, &weights, KvDType::F32)?;
    let mut rig = Rig::new(backend, graph, &weights, options())?;
    let prompt = rig.rng.tokens(21, graph.vocab_size);
    let mut first = rig.sequence(prompt.clone());
    let mut step = rig.step();
    rig.add(&mut step, &mut first, prompt.len());
    rig.run(&step)?;
    let mut branches = [first.clone(), first];
    let mut step = rig.step();
    for (group, (_, pages)) in branches[1].pages.iter_mut().enumerate() {
        let Some(last) = pages.last_mut() else { continue };
        let copy = rig.page(group);
        step.copies.push(PageCopy::new(group as u32, *last, copy));
        *last = copy;
    }
    // The copies are used in the step that makes them.
    for (branch, len) in branches.iter_mut().zip([6, 20]) {
        branch.tokens.extend(rig.rng.tokens(len, graph.vocab_size));
        let row = rig.add(&mut step, branch, 3);
        step.wants.extend((0..3).map(|index| Want::new(row, index, Want::LOGITS)));
    }
    let outputs = rig.run(&step)?;
    let rest = rig.mixed(&mut branches, 5)?;
    for (index, (branch, rest)) in branches.iter().zip(rest).enumerate() {
        let mut found: Vec<Vec<f32>> = (0..3).map(|row| outputs.logits_row(3 * index + row).to_vec()).collect();
        found.extend(rest);
        let mut expected = reference.logits(&branch.tokens)?;
        expected.data.drain(..prompt.len() * expected.cols);
        compare(&found, &expected, 3.0 * checks.f32_tolerance, 0.1)?;
    }
    Ok(())
}

/// A token's logits don't change by a bit, whatever runs beside it, in which chunks and in which pages.
fn invariance(backend: &mut dyn Backend, graph: &Graph, dtype: DType) -> Checked {
    let weights = WeightSet::random(graph, dtype, 24);
    let mut rig = Rig::new(backend, graph, &weights, options())?;
    if !rig.info.batch_invariant {
        return Err(super::Stop::NotTested("the backend doesn't claim batch invariance".into()));
    }
    let tokens = rig.rng.tokens(45, graph.vocab_size);
    let whole = rig.alone(&tokens, 64)?;
    for chunk in [1, 16, 31] {
        let found = rig.alone(&tokens, chunk)?;
        ensure!(found == whole, "chunks of {chunk} change the logits {}", difference(&found, &whole));
    }
    let mut sequences: Vec<Sequence> = [30, 64, 1, 17, 52].iter().map(|&len| rig.random_sequence(len)).collect();
    sequences.push(rig.sequence(tokens));
    let found = rig.mixed(&mut sequences, 13)?;
    ensure!(found[5] == whole, "strangers in the step change the logits {}", difference(&found[5], &whole));
    Ok(())
}

fn difference(found: &[Vec<f32>], expected: &[Vec<f32>]) -> String {
    let at = found.iter().zip(expected).position(|(found, expected)| found != expected).unwrap_or(0);
    let mut columns = found[at].iter().zip(&expected[at]);
    let column = columns.position(|(found, expected)| found != expected).unwrap_or(0);
    format!("at token {at}, column {column}: {} and {}", found[at][column], expected[at][column])
}

/// A token whose embedding is NaN spoils its own sequence from there on and nothing else.
fn not_a_number(backend: &mut dyn Backend, graph: &Graph) -> Checked {
    let weights = WeightSet::random(graph, DType::F32, 25);
    let mut table = crate::blocks::decode(DType::F32, weights.data()[0].parts[0]);
    let cols = graph.weights[0].shape[1];
    table[5 * cols..6 * cols].fill(f64::NAN);
    let spoilt = weights.clone().with(0, &table);
    let clean = |tokens: Vec<u32>| tokens.into_iter().map(|token| if token == 5 { 6 } else { token }).collect();
    let mut rig = Rig::new(backend, graph, &weights, options())?;
    let tokens: Vec<u32> = clean(rig.rng.tokens(20, graph.vocab_size));
    let before = rig.alone(&tokens, 64)?;
    drop(rig);
    let mut rig = Rig::new(backend, graph, &spoilt, options())?;
    let mut victim: Vec<u32> = clean(rig.rng.tokens(20, graph.vocab_size));
    victim[9] = 5;
    let mut sequences = [rig.sequence(victim), rig.sequence(tokens.clone())];
    let mut found = rig.mixed(&mut sequences, 20)?;
    // Pages that held a NaN serve others next.
    sequences.into_iter().rev().for_each(|sequence| rig.release(sequence));
    found.push(rig.alone(&tokens, 7)?);
    let tied = graph.nodes.iter().any(|node| matches!(node.op, Op::Linear { weight: WeightId(0), .. }));
    // With a tied head the spoilt row of the table is a logit of everybody.
    let spoilt_column = |column: usize| tied && column == 5;
    for (position, row) in found[0].iter().enumerate() {
        let good = row.iter().enumerate().all(|(column, logit)| spoilt_column(column) || !logit.is_nan());
        ensure!(good == (position < 9), "the NaN of token 9 shows wrongly at token {position}: {:?}", &row[..4]);
    }
    for (found, where_from) in [(&found[1], "in another sequence"), (&found[2], "that a page held before")] {
        for (position, (found, before)) in found.iter().zip(&before).enumerate() {
            let close = |found: f32, before: f32| (found - before).abs() <= 1e-3 * (1.0 + before.abs());
            let mut columns = found.iter().zip(before).enumerate();
            let same = columns.all(|(column, (&found, &before))| spoilt_column(column) || close(found, before));
            ensure!(same, "a NaN {where_from} changes token {position}");
        }
    }
    Ok(())
}

fn unaligned(backend: &mut dyn Backend) -> Checked {
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q4_1, DType::Q6K] {
        let graph = graphs::llama(BLOCKS, true)?;
        let weights = WeightSet::random(&graph, dtype, 26);
        let mut rig = Rig::new(backend, &graph, &weights, options())?;
        let tokens = rig.rng.tokens(10, graph.vocab_size);
        let aligned = rig.alone(&tokens, 64)?;
        drop(rig);
        let weights = weights.unaligned();
        let mut rig = Rig::new(backend, &graph, &weights, options())?;
        let found = rig.alone(&tokens, 64)?;
        ensure!(
            found == aligned,
            "{dtype} weights at odd addresses change the logits {}",
            difference(&found, &aligned)
        );
    }
    Ok(())
}
