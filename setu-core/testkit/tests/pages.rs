//! What the plain backend says to an engine that mishandles pages.

use setu_core::backend::{Backend, Carry, CompileOptions, Executable, PageCopy, Want};
use setu_core::graph::{Graph, GraphBuilder, KvGroupKind, KvLayer, Shard};
use setu_core::{DType, KvDType};
use setu_testkit::plain::PlainBackend;
use setu_testkit::steps::{Outputs, PageTableData, SlotData, StepData};
use setu_testkit::weights::WeightSet;

/// One attention layer over pages of four tokens.
fn graph() -> Graph {
    let mut g = GraphBuilder::new("tiny", 16, 64);
    let table = g.weight("embed", "embed", &[16, 8], Shard::Replicated);
    let x = g.embed("embed", table).unwrap();
    let group = g.kv_group("full", KvGroupKind::Full);
    let layer = g.kv_layer(KvLayer { group, heads: 1, k_dim: 8, v_dim: 8 });
    let x = g.attention("attention", [x, x, x], layer, 1, 1.0).unwrap();
    let x = g.select("select", x).unwrap();
    let x = g.linear("head", x, table, None).unwrap();
    g.output("logits", x);
    g.finish().unwrap()
}

fn executable() -> Box<dyn Executable> {
    let graph = graph();
    let weights = WeightSet::random(&graph, DType::F32, 1);
    let mut options = CompileOptions::new(32, 4, 64);
    options.page_tokens = 4;
    options.kv_dtype = KvDType::F32;
    options.kv_pages = vec![16];
    PlainBackend::default().compile(&graph, &weights.data(), &options).unwrap()
}

/// One row: its first position, its tokens and its pages.
fn row(position: u32, tokens: &[u32], pages: &[u32]) -> StepData {
    StepData {
        row_offsets: vec![0, tokens.len() as u32],
        positions: vec![position],
        slots: vec![0],
        tokens: tokens.to_vec(),
        page_tables: vec![PageTableData {
            offsets: vec![0, pages.len() as u32],
            pages: pages.to_vec(),
            skipped: vec![0],
        }],
        wants: vec![Want::new(0, tokens.len() as u32 - 1, Want::LOGITS)],
        ..StepData::default()
    }
}

fn run(exec: &mut dyn Executable, step: &StepData) -> setu_core::Result<Outputs> {
    let ticket = step.with(|step| exec.submit(step))?;
    let mut outputs = Outputs::of(step, 16);
    exec.wait(ticket, &mut outputs.lend())?;
    Ok(outputs)
}

#[test]
fn a_page_may_not_be_given_away_while_a_step_uses_it() {
    let mut exec = executable();
    run(&mut *exec, &row(0, &[1, 2, 3, 4, 5], &[3, 7])).unwrap();
    let decode = row(5, &[6], &[3, 7]);
    let first = decode.with(|step| exec.submit(step)).unwrap();
    let stolen = row(0, &[9, 9], &[7]).with(|step| exec.submit(step)).unwrap_err();
    assert_eq!(stolen.message(), "step 0 is in flight: page 7 of group 0 is written while it is in use");
    let mut copied = row(0, &[9, 9], &[8]);
    copied.copies.push(PageCopy::new(0, 8, 3));
    assert!(copied.with(|step| exec.submit(step)).is_err());
    // The sequence itself may go on in its page, and afterwards the page is anybody's.
    let next = row(6, &[7], &[3, 7]);
    let second = next.with(|step| exec.submit(step)).unwrap();
    exec.wait(first, &mut Outputs::of(&decode, 16).lend()).unwrap();
    exec.wait(second, &mut Outputs::of(&next, 16).lend()).unwrap();
    run(&mut *exec, &row(0, &[9, 9], &[7])).unwrap();
}

#[test]
fn pages_must_hold_the_sequence_that_reads_them() {
    let mut exec = executable();
    let unwritten = run(&mut *exec, &row(4, &[5], &[0, 1])).unwrap_err();
    assert_eq!(unwritten.message(), "step 0: row 0 reads position 0 from page 0 of group 0, which doesn't hold it");
    run(&mut *exec, &row(0, &[1, 2, 3, 4, 5, 6, 7, 8], &[0, 1])).unwrap();
    run(&mut *exec, &row(0, &[8, 7, 6, 5, 4, 3, 2, 1], &[2, 3])).unwrap();
    let mixed = run(&mut *exec, &row(8, &[1], &[0, 3, 4])).unwrap_err();
    assert_eq!(
        mixed.message(),
        "step 0: page 3 of group 0 is not of the sequence of row 0: position 4 follows another"
    );
    let swapped = run(&mut *exec, &row(8, &[1], &[1, 0, 4])).unwrap_err();
    assert_eq!(swapped.message(), "step 0: row 0 reads position 0 from page 1 of group 0, which doesn't hold it");
    run(&mut *exec, &row(8, &[1], &[0, 1, 4])).unwrap();
}

#[test]
fn rows_of_a_step_may_share_what_neither_writes() {
    let mut exec = executable();
    run(&mut *exec, &row(0, &[1, 2, 3, 4], &[0])).unwrap();
    let two = |pages: [u32; 4]| StepData {
        row_offsets: vec![0, 1, 2],
        positions: vec![4, 4],
        slots: vec![0, 1],
        tokens: vec![5, 6],
        page_tables: vec![PageTableData { offsets: vec![0, 2, 4], pages: pages.to_vec(), skipped: vec![0, 0] }],
        ..StepData::default()
    };
    run(&mut *exec, &two([0, 1, 0, 2])).unwrap();
    let clash = run(&mut *exec, &two([0, 1, 0, 1])).unwrap_err();
    assert_eq!(clash.message(), "page 1 of group 0 is written while it is in use");
}

#[test]
fn a_carried_token_must_be_sampled_by_the_step_before() {
    let mut exec = executable();
    let mut prefill = row(0, &[1, 2], &[0]);
    prefill.opened_slots.push(SlotData::default());
    prefill.wants = vec![Want::new(0, 0, Want::LOGITS), Want::new(0, 1, Want::SAMPLE)];
    let mut decode = row(2, &[u32::MAX], &[0]);
    decode.carries.push(Carry::new(0, 1));
    assert!(decode.with(|step| exec.submit(step)).is_err(), "there is no step before");
    let sampled = run(&mut *exec, &prefill).unwrap().tokens[1];
    let carried = run(&mut *exec, &decode).unwrap();
    let stale = decode.with(|step| exec.submit(step)).unwrap_err();
    assert!(stale.message().starts_with("a carry names a want that the step before doesn't sample"), "{stale}");
    let mut named = executable();
    run(&mut *named, &prefill).unwrap();
    assert_eq!(run(&mut *named, &row(2, &[sampled], &[0])).unwrap().logits, carried.logits);
}
