//! What a backend says of itself, steps in flight, and what it must refuse without harm.

use setu_core::backend::{Carry, PageCopy, Want};
use setu_core::graph::{GraphBuilder, Op, Shard};
use setu_core::ids::Ticket;
use setu_core::{Backend, DType, ErrorKind, KvDType};

use super::graphs::{self, MAX_LEN, SMALL};
use super::rig::{NO_SLOT, Rig, Sequence, compare, options, reference};
use super::{Checked, Options, Suite, ensure};
use crate::reference::Matrix;
use crate::steps::{PageTableData, SlotData, StepData};
use crate::weights::WeightSet;

pub fn check(suite: &mut Suite<'_>) {
    suite.check("contract/devices", |backend, _| {
        let devices = backend.devices();
        ensure!(!devices.is_empty(), "there is no device");
        ensure!(devices.iter().all(|device| !device.name.is_empty()), "a device has no name: {devices:?}");
        Ok(())
    });
    suite.check("contract/an op that isn't known", unknown_op);
    suite.check("contract/KV memory within its limit", kv_memory);
    suite.check("contract/steps in flight", in_flight);
    suite.check("contract/steps that must be refused", refused);
}

fn unknown_op(backend: &mut dyn Backend, _: &Options) -> Checked {
    let mut g = GraphBuilder::new("custom", 8, MAX_LEN);
    let table = g.weight("embed", "embed", &[8, 4], Shard::Replicated);
    let x = g.embed("embed", table)?;
    let op = Op::Custom { id: "nobody.knows".into(), attributes: "{}".into(), cols: vec![8] };
    let x = g.node("custom", op, &[x])?[0];
    let x = g.select("select", x)?;
    g.output("logits", x);
    let graph = g.finish()?;
    let weights = WeightSet::random(&graph, DType::F32, 1);
    let mut options = options();
    options.kv_pages = Vec::new();
    match backend.compile(&graph, &weights.data(), &options) {
        Ok(_) => super::fail("a graph with an op that nobody knows is compiled"),
        Err(error) if error.kind() == ErrorKind::Unsupported && error.message().contains("nobody.knows") => Ok(()),
        Err(error) => super::fail(format!("the error must be Unsupported and name `nobody.knows`: {error}")),
    }
}

fn kv_memory(backend: &mut dyn Backend, _: &Options) -> Checked {
    let graph = graphs::windows(SMALL)?;
    let weights = WeightSet::random(&graph, DType::F32, 2);
    let mut options = options();
    options.kv_bytes = 1 << 20;
    let info = backend.compile(&graph, &weights.data(), &options)?.info();
    ensure!(info.kv_pages.len() == 2, "there are two KV groups and {} pools", info.kv_pages.len());
    ensure!(info.kv_pages.iter().all(|&pages| pages > 0), "a KV group has no pages: {:?}", info.kv_pages);
    let needed: u64 = info
        .kv_pages
        .iter()
        .zip(0..)
        .map(|(&pages, group)| {
            u64::from(pages) * u64::from(options.page_tokens) * graph.kv_token_bytes(group, KvDType::F32) as u64
        })
        .sum();
    ensure!(needed <= options.kv_bytes, "{needed} bytes of KV are more than the {} allowed", options.kv_bytes);
    Ok(())
}

/// One step that computes `count` tokens of a sequence and wants the last one's logits.
fn plain_step(rig: &mut Rig<'_>, sequence: &mut Sequence, count: usize) -> StepData {
    let mut step = rig.step();
    let row = rig.add(&mut step, sequence, count);
    step.wants.push(Want::new(row, count as u32 - 1, Want::LOGITS));
    step
}

fn in_flight(backend: &mut dyn Backend, checks: &Options) -> Checked {
    let graph = graphs::llama(SMALL, true)?;
    let weights = WeightSet::random(&graph, DType::F32, 3);
    let reference = reference(&graph, &weights, KvDType::F32)?;
    let mut rig = Rig::new(backend, &graph, &weights, options())?;
    let most = rig.info.max_in_flight as usize;
    let mut sequence = rig.random_sequence(64);
    let mut submitted = Vec::new();
    for _ in 0..most {
        let step = plain_step(&mut rig, &mut sequence, 5);
        submitted.push((rig.submit(&step)?, step));
    }
    let before = sequence.clone();
    let step = plain_step(&mut rig, &mut sequence, 5);
    ensure!(rig.submit(&step).is_err(), "more than max_in_flight = {most} steps are accepted");
    sequence.computed = before.computed;
    let unknown = Ticket(submitted[most - 1].0.0.wrapping_add(1000));
    ensure!(rig.wait(unknown, &step).is_err(), "a ticket that was never given is waited for");
    if let [_, .., last] = &submitted[..] {
        ensure!(rig.wait(last.0, &last.1).is_err(), "tickets are waited for out of order");
    }
    let expected = reference.logits(&sequence.tokens)?;
    let row = |computed: usize| Matrix { cols: expected.cols, data: expected.row(computed - 1).to_vec() };
    let mut computed = 0;
    for (ticket, step) in &submitted {
        let outputs = rig.wait(*ticket, step)?;
        computed += 5;
        look_at(&rig, &[outputs.logits], &row(computed), checks)?;
        ensure!(rig.wait(*ticket, step).is_err(), "a ticket is waited for twice");
    }
    let step = plain_step(&mut rig, &mut sequence, 7);
    let outputs = rig.run(&step)?;
    look_at(&rig, &[outputs.logits], &row(computed + 7), checks)
}

/// Compares rows of logits, where steps compute any.
fn look_at(rig: &Rig<'_>, found: &[Vec<f32>], expected: &Matrix, checks: &Options) -> Checked {
    if rig.info.virtual_time { Ok(()) } else { compare(found, expected, 3.0 * checks.f32_tolerance, 0.1) }
}

/// A step with one thing wrong about it.
type Mistake = (&'static str, fn(&mut StepData));

const MISTAKES: [Mistake; 36] = [
    ("a token outside the vocabulary", |step| step.tokens[1] = SMALL.vocab),
    ("a token that is u32::MAX and not carried", |step| step.tokens[1] = u32::MAX),
    ("row offsets that fall", |step| step.row_offsets[1] = 40),
    ("row offsets that don't start at 0", |step| step.row_offsets[0] = 1),
    ("row offsets that end early", |step| step.row_offsets[2] -= 1),
    ("row offsets past the end", |step| step.row_offsets[2] = u32::MAX),
    ("too few row offsets", |step| step.row_offsets.truncate(2)),
    ("no row offsets", |step| step.row_offsets.clear()),
    ("too few positions", |step| step.positions.truncate(1)),
    ("too few slots", |step| step.slots.truncate(1)),
    ("a position past max_model_len", |step| step.positions[1] = MAX_LEN - 5),
    ("a position that overflows", |step| step.positions[1] = u32::MAX),
    ("a slot that doesn't exist", |step| step.slots[0] = 8),
    ("a page that doesn't exist", |step| step.page_tables[0].pages[0] = 96),
    ("two rows that write one page", |step| step.page_tables[0].pages[2] = step.page_tables[0].pages[1]),
    ("a page that is u32::MAX", |step| step.page_tables[0].pages[1] = u32::MAX),
    ("too few pages", |step| {
        step.page_tables[0].pages.pop();
        step.page_tables[0].offsets[2] -= 1;
    }),
    ("page offsets past the end", |step| step.page_tables[0].offsets[2] += 1),
    ("page offsets that fall", |step| step.page_tables[0].offsets[1] = 90),
    ("too few page offsets", |step| step.page_tables[0].offsets.truncate(2)),
    ("pages left out without a window", |step| step.page_tables[0].skipped[0] = 1),
    ("too few entries of skipped", |step| step.page_tables[0].skipped.truncate(1)),
    ("no page table", |step| step.page_tables.clear()),
    ("a page table too many", |step| step.page_tables.push(PageTableData::default())),
    ("a want of a row that doesn't exist", |step| step.wants[0].row = 2),
    ("a want of a token that doesn't exist", |step| step.wants[0].index = 1),
    ("a sample without a slot", |step| step.slots[0] = NO_SLOT),
    ("a score of a token outside the vocabulary", |step| {
        step.wants[1] = Want::new(1, 0, Want::SCORE);
        step.wants[1].target = SMALL.vocab;
    }),
    ("a carry into a token that doesn't exist", |step| step.carries[0].token = 99),
    ("a carry of a want that doesn't exist", |step| step.carries[0].want = 3),
    ("a carry of a want that samples nothing", |step| step.carries[0].want = 1),
    ("a copy of a page that doesn't exist", |step| step.copies.push(PageCopy::new(0, 96, 0))),
    ("a copy to a page that doesn't exist", |step| step.copies.push(PageCopy::new(0, 0, u32::MAX))),
    ("a copy in a group that doesn't exist", |step| step.copies.push(PageCopy::new(1, 0, 1))),
    ("opening a slot that doesn't exist", |step| step.opened_slots.push(SlotData { slot: 8, ..SlotData::default() })),
    ("more rows than max_rows", |step| {
        for _ in 0..7 {
            step.row_offsets.push(step.tokens.len() as u32);
            step.positions.push(0);
            step.slots.push(NO_SLOT);
            let table = &mut step.page_tables[0];
            table.offsets.push(table.pages.len() as u32);
            table.skipped.push(0);
        }
    }),
];

fn refused(backend: &mut dyn Backend, checks: &Options) -> Checked {
    let graph = graphs::llama(SMALL, true)?;
    let weights = WeightSet::random(&graph, DType::F32, 4);
    let reference = reference(&graph, &weights, KvDType::F32)?;
    let mut rig = Rig::new(backend, &graph, &weights, options())?;
    let mut first = rig.random_sequence(20);
    first.slot = 0;
    let mut step = rig.step();
    step.opened_slots.push(SlotData::default());
    let row = rig.add(&mut step, &mut first, 20);
    step.wants = vec![Want::new(row, 19, Want::SAMPLE), Want::new(row, 18, Want::LOGITS)];
    let token = rig.run(&step)?.tokens[0];
    let mut second = rig.random_sequence(18);
    let mut good = rig.step();
    rig.add_carried(&mut good, &mut first, 0);
    rig.add(&mut good, &mut second, 18);
    good.wants = vec![Want::new(0, 0, Want::SAMPLE | Want::LOGITS), Want::new(1, 17, Want::LOGITS)];
    ensure!(good.carries == [Carry::new(0, 0)], "the suite's own step is wrong");
    let mut accepted = Vec::new();
    let too_many = |step: &mut StepData| {
        let extra = rig.options.max_tokens;
        step.tokens.extend(vec![1; extra as usize]);
        step.row_offsets[2] += extra;
        let table = &mut step.page_tables[0];
        table.pages.extend(90..96);
        table.offsets[2] += 6;
    };
    let mut long = good.clone();
    too_many(&mut long);
    let mistakes = MISTAKES.map(|(name, make)| {
        let mut bad = good.clone();
        make(&mut bad);
        (name, bad)
    });
    for (name, bad) in mistakes.into_iter().chain([("more tokens than max_tokens", long)]) {
        if let Ok(ticket) = rig.submit(&bad) {
            accepted.push(name);
            let _ = rig.wait(ticket, &bad);
        }
    }
    ensure!(accepted.is_empty(), "these steps are accepted: {}", accepted.join("; "));
    // Nothing of what was refused has left a trace.
    let outputs = rig.run(&good)?;
    first.tokens.push(token);
    for (index, sequence) in [first, second].iter().enumerate() {
        let expected = reference.logits(&sequence.tokens)?;
        let last = expected.row(sequence.tokens.len() - 1).to_vec();
        let last = Matrix { cols: expected.cols, data: last };
        look_at(&rig, &[outputs.logits_row(index).to_vec()], &last, checks)?;
    }
    Ok(())
}
